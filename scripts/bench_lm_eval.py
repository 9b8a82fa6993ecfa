"""lm-evaluation-harness on an exported folder: its loader, tokenizer and scoring on local parquet and JSON, offline.

    python -m scripts.export -i sft && python -m scripts.bench_lm_eval --model=EXPORTED_FOLDER

Writes three local tasks (ARC-Easy from parquet, COPA from the CORE bundle's JSON lines, GSM8K as text to be generated)
and runs the harness on them with HF_HUB_OFFLINE=1. ARC is also scored by nanochat itself on the
same items: the two must agree on how many are right.
"""

import dataclasses
import json
import os
import tempfile
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import torch
import yaml

from nanochat import cli, gpt, hardware, paths
from nanochat.errors import UserError
from nanochat.export import hub, parity
from nanochat.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = ""  # folder that scripts.export wrote
    data: str = "../shared/data"  # folder with tasks/ and eval_bundle.zip
    limit: int = 40  # items a task
    output: str = ""  # JSON file; empty: only print


def tasks(data: Path, folder: Path, limit: int) -> list[dict]:
    """Write the task files and their data; returns their contents."""
    arc = pq.read_table(data / "tasks/arc/ARC-Easy_test.parquet").slice(0, limit)
    pq.write_table(arc, folder / "arc.parquet")
    with zipfile.ZipFile(data / "eval_bundle.zip") as bundle:
        name = next(n for n in bundle.namelist() if n.endswith("/copa.jsonl"))
        lines = bundle.read(name).decode().splitlines()[:limit]
    (folder / "copa.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pq.write_table(pq.read_table(data / "tasks/gsm8k/test.parquet").slice(0, limit), folder / "gsm8k.parquet")
    load = lambda kind, file: {"dataset_path": kind, "dataset_kwargs": {"data_files": {"test": str(folder / file)}}}
    accuracy = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    found = [
        {"task": "local_arc", **load("parquet", "arc.parquet"), "output_type": "multiple_choice", "test_split": "test",
         "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "{{choices.text}}",
         "doc_to_target": "{{choices.label.index(answerKey)}}", "metric_list": accuracy},
        {"task": "local_copa", **load("json", "copa.jsonl"), "output_type": "multiple_choice", "test_split": "test",
         "doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
         "metric_list": accuracy},
        {"task": "local_gsm8k", **load("parquet", "gsm8k.parquet"), "output_type": "generate_until",
         "test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "{{answer.split('####')[-1].strip()}}",
         "generation_kwargs": {"max_gen_toks": 24, "until": ["\n\n"], "do_sample": False},
         "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]},
    ]  # fmt: skip
    for task in found:
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return found


class Exported:
    """Made into a model of the harness by `harness`: what transformers loads from the folder scores and continues."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        super().__init__()
        self.model, self.tokens = parity.load_hf(folder), AutoTokenizer.from_pretrained(folder)
        self.context = self.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self.tokens.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.tokens(string)["input_ids"]  # bos first, as in every row the model has seen

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        found = []
        for _, context, continuation in requests:
            ids = (context + continuation)[-self.context :]
            n = len(continuation)
            likely = self.model(torch.tensor([ids])).logits[0, -n - 1 : -1].log_softmax(-1)
            target = torch.tensor(ids[-n:])
            total = float(likely.gather(1, target[:, None]).sum())
            found.append((total, bool((likely.argmax(-1) == target).all())))
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        raise UserError("Rolling likelihoods are not part of these tasks.")

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        found = []
        for text, options in (request.args for request in requests):
            most = options.get("max_gen_toks", 24)
            ids = torch.tensor([self.tok_encode(text)[-(self.context - most) :]])
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False)
            said = self.tokens.decode(out[0, ids.size(1) :], skip_special_tokens=True)
            for stop in options.get("until", []):
                said = said.split(stop)[0]
            found.append(said)
        return found


def harness(model: Path, files: list[dict], folder: Path, limit: int) -> dict:
    """Run lm-eval on the task files; returns its results by task.

    Through a model class of ours, because the harness' own `--model hf` needs the package accelerate; where that is
    installed, `lm_eval run --model hf --model_args pretrained=FOLDER,trust_remote_code=True,add_bos_token=True` does.
    """
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

    kind = type("ExportedLM", (Exported, TemplateLM), {})
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    names = [task["task"] for task in files]
    return simple_evaluate(model=kind(model), tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0)[
        "results"
    ]


@torch.no_grad()
def own_accuracy(model: gpt.GPT, tokenizer: Tokenizer, items: list[dict]) -> float:
    """ARC as the task file asks, by our own code: the choice whose tokens have the largest summed log probability."""
    right = 0
    for item in items:
        scores = []
        for choice in item["choices"]["text"]:
            context = f"Question: {item['question']}\nAnswer:"
            ids = tokenizer.encode(f"{context} {choice}", prepend="<|bos|>")
            start = len(tokenizer.encode(context, prepend="<|bos|>"))
            cut = max(len(ids) - model.config.sequence_len, 0)
            likely = model(torch.tensor([ids[cut:]]))[0].log_softmax(-1)
            scores.append(sum(float(likely[i - 1 - cut, ids[i]]) for i in range(start, len(ids))))
        right += scores.index(max(scores)) == item["choices"]["label"].index(item["answerKey"])
    return right / len(items)


def main(cfg: Config) -> dict:
    """Run, compare, print, write."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    folder = Path(cfg.model)
    if not (folder / "nanochat.json").exists():
        raise UserError("--model must name a folder that `python -m scripts.export` wrote.")
    if not (Path(cfg.data) / "tasks").is_dir():
        raise UserError(f"--data={cfg.data} has no folder tasks/: give the folder of measuring data.")
    model, tokenizer = hub.model_of(folder)
    with tempfile.TemporaryDirectory() as place:
        files = tasks(Path(cfg.data), Path(place), cfg.limit)
        results = harness(folder.resolve(), files, Path(place), cfg.limit)
        items = pq.read_table(Path(place) / "arc.parquet").to_pylist()
    ours = own_accuracy(model, tokenizer, items)
    found = hardware.about() | {"command": cli.command(main), "results": results, "arc_by_nanochat": ours,
                                "arc_agrees": abs(ours - results["local_arc"]["acc,none"]) < 1e-9}  # fmt: skip
    print(json.dumps({name: {k: v for k, v in one.items() if "," in k} for name, one in results.items()}, indent=1))
    print(f"ARC by nanochat itself: {ours:.4f}")
    if cfg.output:
        paths.write_json(Path(cfg.output), found)
    return found


if __name__ == "__main__":
    cli.run(main, Config)
