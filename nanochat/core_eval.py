"""CORE: 22 in-context tasks, each accuracy centred on chance, then averaged (DCLM, arXiv 2406.11794, as published).

    centred = (accuracy - baseline) / (1 - baseline)            CORE = mean over the tasks

A task's items become prompts: few-shot examples and the item itself, separated by blank lines. Three kinds are scored:

    multiple_choice      the choice whose tokens (after what all choices share) have the lowest mean loss
    schema               the context after which the shared ending has the lowest mean loss
    language_modeling    right if every token of the continuation is the model's first guess

Rows of many examples and all their choices are scored together, like lengths beside each other, padded on the right
with bos, which a causal model cannot see: the scores are those of one row at a time. Only scored positions get logits,
and what the choices of a question share, the few-shot examples above all, is read once for all of them (prefix.py).

Item i's few-shot examples are Random(1234 + i).sample of the other items, as published; but always of all of them, so
`max_per_task` changes which items are asked and never their prompts (pitfall 34; the published code samples from the
truncated list, so its numbers with a limit differ, and those without are the same). A task with fewer items than shots
takes all others. A prompt longer than the model's context keeps its last tokens.
"""

import csv
import io
import json
import math
import os
import random
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat import paths
from nanochat.errors import UserError
from nanochat.prefix import Endings, Prefixes
from nanochat.runtime import Runtime

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
BUNDLE_SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"
KINDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
ORDER_SEED, SHOTS_SEED = 1337, 1234
EXAMPLES_TOGETHER = 256  # tokenised and sorted by length at a time
LOGITS_TOGETHER = 1 << 26  # fp32 logits of a forward: 256 MiB
SHARED_AT_LEAST = 32  # tokens that a question's rows must share for a forward of their own to pay


# ---- the bundle ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """One task of the bundle."""

    label: str
    kind: str  # a key of KINDS
    uri: str
    shots: int
    delimiter: str  # between context and continuation
    baseline: float  # accuracy of chance, 0 to 1


class Bundle:
    """The tasks' data, read where they are: a folder or a zip, each with core.yaml at its top or in eval_bundle/."""

    def __init__(self, path: Path):
        self.path = path
        if not path.exists():
            raise UserError(f"The CORE bundle {path} does not exist: mend --bundle or NANOCHAT_EVAL_BUNDLE.")
        self.archive = None if path.is_dir() else self._opened(path)
        names = ("core.yaml", "eval_bundle/core.yaml")
        inside = next((name for name in names if self._has(name)), None)
        if inside is None:
            raise UserError(f"{path} is not a CORE bundle: it has no core.yaml.")
        self.top = inside.removesuffix("core.yaml")

    @staticmethod
    def _opened(path: Path) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(
                f"The CORE bundle {path} can't be opened ({error}): remove it and fetch it again."
            ) from error

    def _has(self, name: str) -> bool:
        return (self.path / name).is_file() if self.archive is None else name in self.archive.namelist()

    def text(self, name: str) -> str:
        """A file of the bundle; a damaged or missing one is a UserError."""
        try:
            if self.archive is None:
                return (self.path / self.top / name).read_text(encoding="utf-8")
            return self.archive.read(self.top + name).decode("utf-8")
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{name} of the CORE bundle {self.path} can't be read ({error}): fetch it again."
            ) from error

    def specs(self) -> list[Spec]:
        """The tasks, in the order of core.yaml."""
        import yaml

        rows = csv.DictReader(io.StringIO(self.text("eval_meta_data.csv")))
        try:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
            tasks = yaml.safe_load(self.text("core.yaml"))["icl_tasks"]
            return [self._spec(task, baselines) for task in tasks]
        except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"core.yaml or eval_meta_data.csv of {self.path} is damaged ({error!r}).") from error

    @staticmethod
    def _spec(task: dict, baselines: dict[str, float]) -> Spec:
        label, kind = task["label"], task["icl_task_type"]
        if kind not in KINDS:
            raise ValueError(f"{label} has the unknown type {kind}")
        delimiter = task.get("continuation_delimiter", " ")
        return Spec(label, kind, task["dataset_uri"], task["num_fewshot"][0], delimiter, baselines[label])

    def items(self, spec: Spec) -> list[dict]:
        """All items of a task, in the order of evaluation."""
        lines = self.text(f"eval_data/{spec.uri}").strip().split("\n")
        items = [_item(line, number, spec) for number, line in enumerate(lines, 1)]
        random.Random(ORDER_SEED).shuffle(items)
        return items


def _item(line: str, number: int, spec: Spec) -> dict:
    try:
        item = json.loads(line)
        missing = [key for key in KINDS[spec.kind] if key not in item]
    except (ValueError, TypeError) as error:
        raise UserError(f"Line {number} of the CORE task {spec.label} is not JSON ({error}).") from error
    if missing:
        raise UserError(f"Line {number} of the CORE task {spec.label} has no {' and no '.join(missing)}.")
    return item


def bundle(runtime: Runtime, path: str | Path | None = None) -> Bundle:
    """The bundle at `path`, else NANOCHAT_EVAL_BUNDLE, else in the base dir (folder or zip), else downloaded there."""
    chosen = path or os.environ.get("NANOCHAT_EVAL_BUNDLE")
    if chosen:
        return Bundle(Path(chosen).expanduser())
    folder, archive = paths.base_dir() / "eval_bundle", paths.base_dir() / "eval_bundle.zip"
    if folder.is_dir():
        return Bundle(folder)
    problem = None
    if runtime.main:
        try:
            paths.fetch(BUNDLE_URL, archive, BUNDLE_SHA256)
        except UserError as error:
            problem = (
                f"{error} CORE needs it: point NANOCHAT_EVAL_BUNDLE at a copy, or leave CORE out "
                "(--core-metric-every=-1 in training, --eval=bpb,sample in base_eval)."
            )
    if (problem := runtime.broadcast(problem)) is not None:
        raise UserError(problem)
    return Bundle(archive)


# ---- from an item to rows of tokens ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One prompt: the tokens, of which [start, len) are scored."""

    ids: list[int]
    start: int

    @property
    def span(self) -> int:
        return len(self.ids) - self.start


def shots_of(items: Sequence[dict], i: int, count: int) -> list[dict]:
    """The few-shot examples of item i: `count` others, or all there are."""
    others = len(items) - 1
    picked = random.Random(SHOTS_SEED + i).sample(range(others), min(count, others))
    return [items[j + (j >= i)] for j in picked]  # position j in the list without item i


def prompts(spec: Spec, item: dict, shots: Sequence[dict]) -> list[str]:
    """An item's prompts: one a choice; for language modelling one without and one with the continuation."""
    before = "".join(_solved(spec, shot) + "\n\n" for shot in shots)
    if spec.kind == "multiple_choice":
        return [f"{before}{item['query']}{spec.delimiter}{choice}" for choice in item["choices"]]
    if spec.kind == "schema":
        return [f"{before}{option}{spec.delimiter}{item['continuation']}" for option in item["context_options"]]
    context = f"{before}{item['context'].strip()}{spec.delimiter}"
    return [context.strip(), context + item["continuation"]]


def _solved(spec: Spec, item: dict) -> str:
    """An item with its answer."""
    if spec.kind == "multiple_choice":
        return f"{item['query']}{spec.delimiter}{item['choices'][item['gold']]}"
    if spec.kind == "schema":
        return f"{item['context_options'][item['gold']]}{spec.delimiter}{item['continuation']}"
    return f"{item['context'].strip()}{spec.delimiter}{item['continuation']}"


def rows_of(spec: Spec, tokens: list[list[int]], context: int) -> list[Row]:
    """The rows to score, from the tokens of an item's prompts; at most `context` tokens each, the last ones."""
    if spec.kind == "multiple_choice":
        shared = _shared(tokens)
        rows = [Row(ids, shared) for ids in tokens]
    elif spec.kind == "schema":
        shared = _shared([ids[::-1] for ids in tokens])
        rows = [Row(ids, len(ids) - shared) for ids in tokens]
    else:
        rows = [
            Row(tokens[1], _shared(tokens))
        ]  # all of the prompt without the continuation, unless a token spans both
    return [_cropped(row, context) for row in rows]


def _shared(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with."""
    return next((k for k, column in enumerate(zip(*rows)) if len(set(column)) > 1), min(map(len, rows)))


def _cropped(row: Row, context: int) -> Row:
    cut = max(0, len(row.ids) - context)
    return Row(row.ids[cut:], max(1, row.start - cut))  # the first token has nothing to be predicted from


# ---- scoring ---------------------------------------------------------------------------------------------------------


def batches(rows: Sequence[Row], tokens: int, positions: int) -> Iterator[list[int]]:
    """Indices of rows to score together: like lengths, at most `tokens` with padding, at most `positions` scored."""
    batch: list[int] = []
    length = span = 0
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].ids)):
        length, span = max(length, len(rows[i].ids)), max(span, rows[i].span)
        if batch and ((len(batch) + 1) * length > tokens or (len(batch) + 1) * span > positions):
            yield batch
            batch, length, span = [], len(rows[i].ids), rows[i].span
        batch.append(i)
    if batch:
        yield batch


def _padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> torch.Tensor:  # (B, T)
    length = max(map(len, rows))
    return torch.tensor([ids + [pad] * (length - len(ids)) for ids in rows]).to(device)


@torch.no_grad()
def score(model, rows: Sequence[Row], pad: int, device: torch.device, **cache) -> tuple[list[float], list[bool]]:
    """For each row of a batch: (mean loss over the span, in nats; is every token of the span the first guess?).

    A row without a span (a choice that the others begin with) has the loss NaN and is no hit. cache: what the rows
    stand behind, for the model.
    """
    length, span = max(len(row.ids) for row in rows), max(1, max(row.span for row in rows))
    ids = _padded([row.ids for row in rows], pad, device)
    starts = torch.tensor([row.start for row in rows]).unsqueeze(1)  # (B, 1)
    ends = torch.tensor([len(row.ids) for row in rows]).unsqueeze(1)
    places = starts + torch.arange(span)  # (B, K) positions of the scored tokens
    inside = (places < ends).to(device)
    places = places.clamp(max=length - 1).to(device)
    logits = model(ids, last=(places - 1).clamp(min=0), **cache)  # (B, K, V) fp32
    targets = ids.gather(1, places)
    losses = logits.logsumexp(-1) - logits.gather(2, targets.unsqueeze(2)).squeeze(2)
    sums = torch.where(inside, losses, 0).sum(1)
    hits = (~inside | (logits.argmax(-1) == targets)).all(1) & inside.any(1)
    counts = (ends - starts).squeeze(1).tolist()
    means = [total / count if count > 0 else math.nan for total, count in zip(sums.tolist(), counts)]
    return means, hits.tolist()


@torch.no_grad()
def score_shared(
    model, rows: Sequence[Row], groups: Sequence[int], pad: int, device: torch.device
) -> tuple[list[float], list[bool]]:
    """`score` where rows of one group (neighbours) begin alike: the common beginning goes through the model once."""
    members = [[row for row, g in zip(rows, groups) if g == group] for group in dict.fromkeys(groups)]
    # the token before the scored ones stays with the ending: its logits are wanted
    common = [min(_shared([row.ids for row in some]), *(row.start for row in some)) - 1 for some in members]
    prefixes = Prefixes(common, model.attend)
    model(_padded([some[0].ids[:n] for some, n in zip(members, common)], pad, device), cache=prefixes, last_only=True)
    owners = [i for i, some in enumerate(members) for _ in some]
    endings = [Row(row.ids[n:], row.start - n) for some, n in zip(members, common) for row in some]
    return score(model, endings, pad, device, cache=Endings(prefixes, owners, model.config.sequence_len))


def verdict(spec: Spec, item: dict, losses: list[float], hits: list[bool]) -> bool:
    """Is the model right about an item, given its rows' scores?

    Of two choices one of which is NaN the first is taken, as published (4 items of PIQA; no task has it otherwise).
    """
    return hits[0] if spec.kind == "language_modeling" else losses.index(min(losses)) == item["gold"]


class Scorer:
    """A model and how much of it to run at once."""

    def __init__(self, model, tokenizer, runtime: Runtime, device_batch_size: int = 32):
        self.model, self.tokenizer, self.runtime = model, tokenizer, runtime
        self.context = model.config.sequence_len
        self.tokens = device_batch_size * self.context  # of a forward, padding included
        self.positions = max(1, LOGITS_TOGETHER // model.config.vocab_size)

    def right(self, spec: Spec, items: list[dict], indices: Sequence[int]) -> list[bool]:
        """The verdicts on some items of a task."""
        texts = [prompts(spec, items[i], shots_of(items, i, spec.shots)) for i in indices]
        flat = iter(self.tokenizer.encode([text for group in texts for text in group], prepend=self.tokenizer.bos))
        groups = [rows_of(spec, [next(flat) for _ in group], self.context) for group in texts]
        rows = [row for group in groups for row in group]
        owners = [g for g, group in enumerate(groups) for _ in group]
        sharing = [self._shares(group) for group in groups]
        losses, hits = [0.0] * len(rows), [False] * len(rows)
        for together, tell in ((False, self._score), (True, self._score_shared)):
            chosen = [i for i, g in enumerate(owners) if sharing[g] == together]
            for batch in batches([rows[i] for i in chosen], self.tokens, self.positions):
                some = sorted(chosen[i] for i in batch)
                for i, loss, hit in zip(some, *tell([rows[i] for i in some], [owners[i] for i in some])):
                    losses[i], hits[i] = loss, hit
        verdicts, at = [], 0
        for i, group in zip(indices, groups):
            verdicts.append(verdict(spec, items[i], losses[at : at + len(group)], hits[at : at + len(group)]))
            at += len(group)
        return verdicts

    def _shares(self, group: list[Row]) -> bool:
        """Is it worth while, and is the model one that takes a cache?"""
        if len(group) < 2 or not hasattr(self.model, "attend"):
            return False
        return min(_shared([row.ids for row in group]), *(row.start for row in group)) > SHARED_AT_LEAST

    def _score(self, rows: list[Row], owners: list[int]):
        return score(self.model, rows, self.tokenizer.bos, self.runtime.device)

    def _score_shared(self, rows: list[Row], owners: list[int]):
        return score_shared(self.model, rows, owners, self.tokenizer.bos, self.runtime.device)

    def task(self, data: Bundle, spec: Spec, max_per_task: int = -1) -> dict[str, Any]:
        """Accuracy of one task over all ranks: its first `max_per_task` items, or all."""
        from tqdm import tqdm

        began = time.monotonic()
        items = data.items(spec)
        count = min(max_per_task, len(items)) if max_per_task > 0 else len(items)
        mine = range(count)[self.runtime.rank :: self.runtime.world]
        correct = torch.zeros((), dtype=torch.int64, device=self.runtime.device)
        with tqdm(total=len(mine), desc=spec.label, leave=False, disable=None if self.runtime.main else True) as bar:
            for start in range(0, len(mine), EXAMPLES_TOGETHER):
                some = mine[start : start + EXAMPLES_TOGETHER]
                correct += sum(self.right(spec, items, some))
                bar.update(len(some))
        accuracy = int(self.runtime.sum(correct)) / count
        return {
            "accuracy": accuracy,
            "centered": (accuracy - spec.baseline) / (1 - spec.baseline),
            "stderr": math.sqrt(accuracy * (1 - accuracy) / count),
            "baseline": spec.baseline,
            "n": count,
            "seconds": time.monotonic() - began,
        }


def evaluate(
    model,
    tokenizer,
    data: Bundle | str | Path,
    *,
    tasks: Sequence[str] | None = None,
    max_per_task: int = -1,
    device_batch_size: int = 32,
    runtime: Runtime,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """{"core": mean of the centred accuracies, "tasks": {label: {"accuracy", "centered", "stderr", "n", ...}}}.

    model: `model(ids (B, T), last=positions (B, K)) -> logits (B, K, V)` with `.config.sequence_len` and `.vocab_size`.
    tasks: labels; None means all. max_per_task: items of each, -1 for all. device_batch_size: rows of full context
    whose tokens fit a forward. say: called with a line as each task is done. UserError: unknown task, damaged bundle.
    """
    data = data if isinstance(data, Bundle) else Bundle(Path(data))
    specs = data.specs()
    unknown = sorted(set(tasks or ()) - {spec.label for spec in specs})
    if unknown:
        raise UserError(f"CORE has no task {', '.join(unknown)}: there are {', '.join(spec.label for spec in specs)}.")
    scorer = Scorer(model, tokenizer, runtime, device_batch_size)
    results = {}
    for spec in specs:
        if tasks is None or spec.label in tasks:
            results[spec.label] = one = scorer.task(data, spec, max_per_task)
            if say is not None:
                say(line(spec.label, one))
    core = sum(one["centered"] for one in results.values()) / len(results)
    return {"core": core, "tasks": results, "max_per_task": max_per_task, "bundle": str(data.path)}


def line(label: str, one: dict) -> str:
    """A task's result for people."""
    return (
        f"{label:<34} accuracy {one['accuracy']:.4f} +- {one['stderr']:.4f} | centred {one['centered']:+.4f} | "
        f"{one['n']} items, {one['seconds']:.1f} s"
    )


def table(results: dict) -> str:
    """The results as CSV with padded columns: Task, Accuracy, Centered, and a last row CORE."""
    rows = [("Task", "Accuracy", "Centered")]
    rows += [(label, f"{one['accuracy']:.6f}", f"{one['centered']:.6f}") for label, one in results["tasks"].items()]
    rows.append(("CORE", "", f"{results['core']:.6f}"))
    return "".join(f"{task:<35}, {accuracy:<10}, {centred:<10}\n" for task, accuracy, centred in rows)
