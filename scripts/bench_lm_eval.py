"""lm-evaluation-harness on an exported folder, item by item beside our own evaluations; local files, offline.

    python -m scripts.export -i sft && python -m scripts.bench_lm_eval --model=EXPORTED_FOLDER

Writes five task files and their data, and runs the harness' own `hf` model on them, as
`lm_eval run --model hf --model_args pretrained=FOLDER,trust_remote_code=True,add_bos_token=True` does. Beside it:

    copa, winograd, lambada_openai   JSON of the CORE bundle; nanochat/core_eval.py
    arc_easy                         parquet, as chat, the answer a letter; nanochat/chat_eval.py
    gsm8k                            parquet, as chat, greedy text without the calculator; GPT.generate_naive

An item agrees where both are right or both are wrong, and both gave the same log-likelihoods (or the same text). Left
out are those that don't fit the model's context (each side shortens a prompt in its own way), and of winograd those
whose options end in the same token, which CORE scores with the ending.
"""

import dataclasses
import json
import os
import tempfile
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from nanochat import chat, chat_eval, cli, core_eval, gpt, hardware, paths
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.export import hub
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from tasks import arc, gsm8k

TOLERANCE = 1e-3  # nats: of a sum over the tokens of an answer
ANSWER = 24  # tokens generated for a problem of GSM8K
CORE = {  # the harness' way of asking a task of the CORE bundle
    "copa": {"output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}",
             "doc_to_target": "{{gold}}"},
    "winograd": {"output_type": "multiple_choice", "doc_to_text": "{{gold}}", "doc_to_choice": "{{context_options}}",
                 "doc_to_target": "{{continuation}}"},
    "lambada_openai": {"output_type": "loglikelihood", "doc_to_text": "{{context|trim}}",
                       "doc_to_target": "{{' ' + continuation}}"},
}  # fmt: skip
CHAT = {
    "arc_easy": {
        "output_type": "multiple_choice",  # tasks.common.multiple_choice as a template
        "doc_to_text": "Multiple Choice question: {{question}}\n{% for text in choices.text %}- {{text}}="
        "{{choices.label[loop.index0]}}\n{% endfor %}\nRespond only with the letter of the correct answer.",
        "doc_to_choice": "{{choices.label}}",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
    },
    "gsm8k": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer.split('####')[-1].strip()}}",
        "generation_kwargs": {"max_gen_toks": ANSWER, "until": [], "do_sample": False},
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = ""  # folder that scripts.export wrote
    data: str = "../shared/data"  # folder with tasks/ and eval_bundle.zip
    limit: int = 100  # items a task
    output: str = ""  # JSON file; empty: only print


@dataclasses.dataclass(frozen=True)
class Item:
    """What one side found for one item."""

    right: bool
    scores: list[float] = dataclasses.field(default_factory=list)  # log-likelihood of each choice, in nats
    text: str = ""  # what was generated
    same: bool = True  # do both sides score the same tokens?


# ---- the harness -----------------------------------------------------------------------------------------------------


def write_task(folder: Path, name: str, form: dict, rows: list[dict]) -> None:
    """A task's file and its data: CORE's as JSON lines, the others as parquet."""
    kind = "json" if name in CORE else "parquet"
    file = folder / f"{name}.{kind}"
    if kind == "json":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    metric = "exact_match" if form["output_type"] == "generate_until" else "acc"
    content = {
        "task": name, "dataset_path": kind, "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}], **form,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def harness(model: Path, folder: Path, names: list[str], as_chat: bool) -> dict[str, list[Item]]:
    """Run lm-eval on task files of `folder`; returns what it found for every item, in the files' order."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    options = {"pretrained": str(model), "trust_remote_code": True, "add_bos_token": True, "dtype": "float32"}
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model="hf", model_args=options, device="cpu", batch_size=8, tasks=names, bootstrap_iters=0,
                            task_manager=manager, apply_chat_template=as_chat, log_samples=True)  # fmt: skip
    samples = {name: sorted(found["samples"][name], key=lambda one: one["doc_id"]) for name in names}
    return {name: [_said(one) for one in samples[name]] for name in names}


def _said(sample: dict) -> Item:
    """An item of the harness' log. One answer: a text, or (log-likelihood, greedy?); several: one pair a choice."""
    right = bool(sample.get("acc", sample.get("exact_match")))
    answers = [answer[0] for answer in sample["resps"]]
    if isinstance(answers[0], str):
        return Item(right, text=answers[0])
    return Item(right, scores=[float(answer[0]) for answer in answers])


# ---- ourselves -------------------------------------------------------------------------------------------------------


def own_core(model: gpt.GPT, tokenizer: Tokenizer, spec: core_eval.Spec, items: list[dict]) -> list[Item]:
    """CORE's scores of its items. Right by the sum of the choices' tokens, as the harness has it; CORE takes the mean.

    What all choices begin with is no part of CORE's scores: they are the harness' but for a constant an item.
    """
    found = []
    for item in items:
        texts = core_eval.prompts(spec, item, [])
        ids = [tokenizer.encode(text, prepend=tokenizer.bos) for text in texts]
        rows = core_eval.rows_of(spec, ids, model.config.sequence_len)
        losses, hits = core_eval.score(model, rows, tokenizer.bos, torch.device("cpu"))
        sums = [-loss * row.span if row.span else 0.0 for loss, row in zip(losses, rows)]
        right = hits[0] if spec.kind == "language_modeling" else sums.index(max(sums)) == item["gold"]
        same = max(map(len, ids)) <= model.config.sequence_len
        if spec.kind == "schema":
            before = [len(tokenizer.encode(option, prepend=tokenizer.bos)) for option in item["context_options"]]
            same = same and before == [row.start for row in rows]
        found.append(Item(right, scores=sums, same=same))
    return found


def own_arc(model: gpt.GPT, tokenizer: Tokenizer, task: arc.ARC, place: Path, count: int) -> list[Item]:
    """chat_eval's verdicts, and the letters' log-likelihoods."""
    path = place / "own_arc.jsonl"
    engine = Engine(model, tokenizer, slots=1)
    chat_eval.evaluate(task, engine, tokenizer, runtime=Runtime.single(), max_problems=count, path=path, batch_size=8)
    found = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        ids = chat.render_for_completion(task[i], tokenizer)
        fits = len(ids) < model.config.sequence_len
        with torch.no_grad():
            likely = model(torch.tensor([ids]), last_only=True)[0, -1].log_softmax(-1) if fits else None
        letters = [tokenizer.encode(letter)[0] for letter in task[i]["letters"]]
        scores = [float(likely[j]) for j in letters] if fits else []
        found.append(Item(json.loads(line)["verdicts"][0], scores, same=fits))
    return found


def own_gsm8k(model: gpt.GPT, tokenizer: Tokenizer, task: gsm8k.GSM8K, answers: list[str]) -> list[Item]:
    """Greedy replies, right where they are the bare answer, as the task file has it."""
    found = []
    for i, answer in enumerate(answers):
        ids = chat.render_for_completion(task[i], tokenizer)
        if len(ids) + ANSWER > model.config.sequence_len:
            found.append(Item(False, same=False))
            continue
        said, end = [], tokenizer.special("<|assistant_end|>")
        for token in model.generate_naive(ids, ANSWER, temperature=0):
            if token in (end, tokenizer.bos):
                break
            said.append(token)
        text = tokenizer.decode([token for token in said if token not in tokenizer.specials.values()])
        found.append(Item(text == answer, text=text))
    return found


# ---- beside each other -----------------------------------------------------------------------------------------------


def compare(theirs: list[Item], ours: list[Item]) -> dict:
    """Accuracies, which items differ, and the largest difference of a log-likelihood, in nats.

    Of several choices what counts is by how much each is likelier than the first. Items that are not the same to both
    sides are left out.
    """
    pairs = {i: pair for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[1].same}
    centred = lambda scores: [score - scores[0] for score in scores] if len(scores) > 1 else scores
    off = {i: max((abs(a - b) for a, b in zip(centred(x.scores), centred(y.scores), strict=True)), default=0.0)
           for i, (x, y) in pairs.items()}  # fmt: skip
    different = [i for i, (x, y) in pairs.items() if x.right != y.right or x.text != y.text or off[i] > TOLERANCE]
    digits = lambda side: "".join(str(int(pair[side].right)) for pair in pairs.values())
    return {
        "items": len(pairs), "left_out": len(theirs) - len(pairs), "different": different,
        "harness": digits(0).count("1") / max(len(pairs), 1), "nanochat": digits(1).count("1") / max(len(pairs), 1),
        "largest_score_difference": max(off.values(), default=0.0),
        "right_by_harness": digits(0), "right_by_nanochat": digits(1),
    }  # fmt: skip


def evaluate(cfg: Config, model: gpt.GPT, tokenizer: Tokenizer, place: Path) -> dict[str, dict]:
    """Every task through the harness and through ourselves."""
    data = Path(cfg.data)
    bundle = core_eval.Bundle(data / "eval_bundle.zip")
    specs = {spec.label: spec for spec in bundle.specs() if spec.label in CORE}
    items = {name: bundle.items(specs[name])[: cfg.limit] for name in CORE}
    easy = arc.ARC("ARC-Easy", "test", folder=data / "tasks")
    sums = gsm8k.GSM8K("main", "test", folder=data / "tasks")
    items["arc_easy"] = [easy.rows[i] for i in range(min(cfg.limit, len(easy)))]
    items["gsm8k"] = [sums.rows[i] for i in range(min(cfg.limit, len(sums)))]
    theirs: dict[str, list[Item]] = {}
    for forms, as_chat in ((CORE, False), (CHAT, True)):
        for name, form in forms.items():
            write_task(place, name, form, items[name])
        theirs |= harness(Path(cfg.model).resolve(), place, list(forms), as_chat)
    ours = {name: own_core(model, tokenizer, specs[name], items[name]) for name in CORE}
    ours["arc_easy"] = own_arc(model, tokenizer, easy, place, len(items["arc_easy"]))
    answers = [row["answer"].split("####")[-1].strip() for row in items["gsm8k"]]
    ours["gsm8k"] = own_gsm8k(model, tokenizer, sums, answers)
    found = {name: compare(theirs[name], ours[name]) for name in ours}
    scorer = core_eval.Scorer(model, tokenizer, Runtime.single(), device_batch_size=8)
    for name in CORE:  # zero shots: the items' order doesn't matter
        found[name]["core_accuracy"] = sum(scorer.right(specs[name], items[name], range(len(items[name])))) / len(
            items[name]
        )
    return found


def main(cfg: Config) -> dict:
    """Run, compare, print, write; returns {"tasks": {name: compare()}, ...}."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    folder = Path(cfg.model)
    if not (folder / "nanochat.json").exists():
        raise UserError("--model must name a folder that `python -m scripts.export` wrote.")
    if not (Path(cfg.data) / "tasks").is_dir():
        raise UserError(f"--data={cfg.data} has no folder tasks/: give the folder of measuring data.")
    model, tokenizer = hub.model_of(folder)
    with tempfile.TemporaryDirectory() as place:
        found = evaluate(cfg, model, tokenizer, Path(place))
    for name, one in found.items():
        print(
            f"{name:<15} {one['items']:4d} items | harness {one['harness']:.4f}, nanochat {one['nanochat']:.4f} | "
            f"{len(one['different'])} differ | log-likelihoods within {one['largest_score_difference']:.1e}"
        )
    command = cli.command(main).replace(cfg.model, folder.name)  # no machine's paths
    versions = {name: metadata.version(name) for name in ("lm-eval", "transformers", "accelerate")}
    result = hardware.about() | {"command": command, "versions": versions, "tasks": found}
    if cfg.output:
        paths.write_json(Path(cfg.output), result)
    return result


if __name__ == "__main__":
    cli.run(main, Config)
