"""Task objects through a model: accuracy with its standard error, pass@k, every reply on disk; and ChatCORE.

A categorical task (multiple choice) is read off the logits: of the listed letters, which is the likeliest first token
of the answer? Prompts of like length are scored together, padded on the right. A generative task is answered by the
engine, many problems at a time, and judged by the task while others are still being written. Problems are strided over
the ranks; a problem's seed depends on its number alone, so neither ranks nor batches change what is drawn.

    ChatCORE = mean over the tasks of (accuracy - baseline) / (1 - baseline)

accuracy is pass@1: with several samples a problem, the share of samples that are right. The published code counts a
problem as solved if any of its n samples is: that is pass@n here.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanochat import chat, paths
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.runtime import Runtime
from nanochat.sampling import Sampling, child_seed

JUDGES = 4  # verdicts reached at the same time (HumanEval's wait for processes)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate, from n samples of which c are right, of the chance that one of k is (arXiv 2107.03374)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} can't be estimated from {c} right of {n} samples")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(
    task,
    engine: Engine,
    tokenizer,
    *,
    runtime: Runtime,
    max_problems: int | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int | None = 50,
    seed: int = 42,
    batch_size: int = 32,
    path: Path | None = None,
    name: str = "",
) -> dict[str, Any]:
    """{"accuracy", "stderr", "centered", "baseline", "n", "samples", "pass_at_k", "seconds"} of a task, over all ranks.

    max_problems: only the first so many. num_samples, max_new_tokens, temperature, top_k, seed: of generative tasks.
    batch_size: prompts scored together in categorical ones. path: a JSON-lines file that rank 0 writes, a problem a
    line: {"index", "prompt", "replies", "verdicts"}. name: on the progress bar.
    """
    began = time.monotonic()
    count = len(task) if max_problems is None else min(max_problems, len(task))
    if count < 1:
        raise UserError(f"The task {name or type(task).__name__} has no problem to ask: raise --max-problems.")
    mine = range(count)[runtime.rank :: runtime.world]
    with _bar(name or type(task).__name__, len(mine), runtime) as bar, torch.inference_mode():
        if task.eval_type == "categorical":
            rows = _categorical(task, engine.model, tokenizer, mine, batch_size, runtime.device, bar)
        else:
            params = Sampling(temperature=temperature, top_k=top_k, max_tokens=max_new_tokens)
            rows = _generative(task, engine, tokenizer, mine, params, num_samples, seed, bar)
    rows = sorted((row for part in runtime.gather(rows) for row in part), key=lambda row: row["index"])
    if path is not None and runtime.main:
        with paths.atomic_write(path, "w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return _summary(task, rows, began)


def _summary(task, rows: list[dict], began: float) -> dict[str, Any]:
    """The figures of a task, from the verdicts on all problems."""
    n = len(rows)
    counts = [(len(row["verdicts"]), sum(row["verdicts"])) for row in rows]
    shares = [right / samples for samples, right in counts]
    accuracy = sum(shares) / n
    baseline = _baseline(task, rows)
    samples = min(samples for samples, _ in counts)
    ks = sorted({1, samples, *(2**i for i in range(samples.bit_length()))})
    return {
        "accuracy": accuracy,
        "stderr": math.sqrt(sum((share - accuracy) ** 2 for share in shares) / max(n - 1, 1) / n),
        "centered": (accuracy - baseline) / (1 - baseline),
        "baseline": baseline,
        "n": n,
        "samples": samples,
        "pass_at_k": {str(k): sum(pass_at_k(all_, right, k) for all_, right in counts) / n for k in ks},
        "seconds": time.monotonic() - began,
    }


def _baseline(task, rows: list[dict]) -> float:
    """The accuracy of chance: what the task says, else one over the number of letters."""
    stated = getattr(task, "baseline", None)
    if stated is not None:
        return stated
    return sum(1 / len(row["letters"]) if "letters" in row else 0.0 for row in rows) / len(rows)


def chat_core(results: Mapping[str, Mapping[str, Any]]) -> float:
    """ChatCORE of these tasks' results, as `evaluate` gives them."""
    return sum(result["centered"] for result in results.values()) / len(results)


def _bar(name: str, total: int, runtime: Runtime) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=name, leave=False, disable=None if runtime.main else True)


# ---- categorical ----------------------------------------------------------------------------------------------------


def _categorical(task, model, tokenizer, indices, batch_size: int, device, bar) -> list[dict]:
    """A row {"index", "prompt", "letters", "replies": [letter], "verdicts": [bool]} for each problem."""
    examples = {i: task[i] for i in indices}
    context = model.config.sequence_len
    prompts = {i: chat.render_for_completion(examples[i], tokenizer, context, cut=True) for i in indices}
    order = sorted(indices, key=lambda i: len(prompts[i]))
    rows = []
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        logits = _last_logits(model, [prompts[i] for i in some], tokenizer.bos, device)
        for i, scores in zip(some, logits.cpu()):
            letters = examples[i]["letters"]
            letter = letters[int(scores[[_letter_id(tokenizer, each) for each in letters]].argmax())]
            verdict = bool(task.evaluate(examples[i], letter))
            prompt = tokenizer.decode(prompts[i])
            rows.append({"index": i, "prompt": prompt, "letters": letters, "replies": [letter], "verdicts": [verdict]})
        bar.update(len(some))
    return rows


def _last_logits(model, prompts: list[list[int]], pad: int, device) -> torch.Tensor:
    """Prompts -> logits (B, V) behind each one's last token."""
    width = max(map(len, prompts))
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids in prompts]).to(device)  # (B, T)
    last = torch.tensor([len(ids) - 1 for ids in prompts]).to(device)
    return model(ids, last=last)[:, 0]


def _letter_id(tokenizer, letter: str) -> int:
    """The one token that an answer letter is."""
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise UserError(
            f"The answer {letter!r} is {len(ids)} tokens in this tokenizer, and must be one to be compared."
        )
    return ids[0]


# ---- generative -----------------------------------------------------------------------------------------------------


def _generative(task, engine, tokenizer, indices, params: Sampling, n: int, seed: int, bar) -> list[dict]:
    """A row {"index", "prompt", "replies": [text], "verdicts": [bool]} for each problem, n of each."""
    room = max(engine.max_len // 2, engine.max_len - params.max_tokens)  # a long prompt gives way, by half at most
    groups, waiting, verdicts = {}, {}, []
    try:
        with ThreadPoolExecutor(min(JUDGES, os.cpu_count() or 1)) as pool:
            for i in indices:
                ids = chat.render_for_completion(task[i], tokenizer, room, cut=True)
                groups[i] = engine.submit(ids, replace(params, seed=child_seed(seed, i + 1)), n)
                waiting |= {id(sequence): i for sequence in groups[i]}
            left = dict.fromkeys(groups, n)
            while waiting:
                for event in engine.step():
                    i = waiting.pop(id(event.sequence), None) if event.finished else None
                    if i is None:
                        continue
                    left[i] -= 1
                    if not left[i]:
                        replies = [sequence.completion(tokenizer) for sequence in groups[i]]
                        job = pool.submit(_judged, task, tokenizer, i, groups[i][0].prompt.ids, replies)
                        job.add_done_callback(lambda _: bar.update())
                        verdicts.append(job)
            return [job.result() for job in verdicts]
    finally:
        for sequence in (sequence for group in groups.values() for sequence in group):
            engine.cancel(sequence)


def _judged(task, tokenizer, i: int, prompt: list[int], replies: list) -> dict:
    """The row of a problem."""
    example = task[i]
    verdicts = [bool(task.evaluate(example, chat.parse_reply(reply.ids, tokenizer))) for reply in replies]
    texts = [reply.text for reply in replies]
    return {"index": i, "prompt": tokenizer.decode(prompt), "replies": texts, "verdicts": verdicts}
