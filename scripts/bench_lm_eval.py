"""lm-evaluation-harness on an exported folder: its loader, tokenizer and scoring on local parquet and JSON, offline.

    python -m scripts.export -i sft && python -m scripts.bench_lm_eval --model=EXPORTED_FOLDER

Writes three local tasks (ARC-Easy from parquet, COPA from the CORE bundle's JSON lines, GSM8K as text to be generated)
and runs `lm_eval` on them in a process of its own with HF_HUB_OFFLINE=1. ARC is also scored by nanochat itself on the
same items: the two must agree on how many are right.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import torch
import yaml

from nanochat import cli, gpt, hardware, paths
from nanochat.errors import UserError
from nanochat.export import hub
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


def harness(model: Path, names: list[str], folder: Path, limit: int) -> dict:
    """Run lm_eval; returns its results by task."""
    out = folder / "results"
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
        f"pretrained={model},trust_remote_code=True,dtype=float32,add_bos_token=True",
        "--tasks", ",".join(names), "--include_path", str(folder), "--device", "cpu", "--batch_size", "8",
        "--limit", str(limit), "--output_path", str(out), "--log_samples",
    ]  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"),
           "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    files = sorted(out.rglob("results_*.json"))
    if done.returncode or not files:
        raise UserError(
            f"lm_eval failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no output'}"
        )
    return json.loads(files[-1].read_text())["results"]


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
    folder = Path(cfg.model)
    if not (folder / "nanochat.json").exists():
        raise UserError("--model must name a folder that `python -m scripts.export` wrote.")
    if not (Path(cfg.data) / "tasks").is_dir():
        raise UserError(f"--data={cfg.data} has no folder tasks/: give the folder of measuring data.")
    model, tokenizer = hub.model_of(folder)
    with tempfile.TemporaryDirectory() as place:
        files = tasks(Path(cfg.data), Path(place), cfg.limit)
        results = harness(folder.resolve(), [task["task"] for task in files], Path(place), cfg.limit)
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
