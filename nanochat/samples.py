"""What a base model writes, to be looked at: greedy continuations of seven prompts, and text from nothing."""

from nanochat.engine import Engine
from nanochat.record import Record
from nanochat.sampling import Sampling

PROMPTS = (  # facts, sums and opposites that a good model completes
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


def continuations(model, tokenizer, log: Record, step: int) -> list[tuple[str, str]]:
    """16 greedy tokens behind each prompt that the context holds, printed and recorded; returns (prompt, text).

    For rank 0, model resting.
    """
    engine = Engine(model, tokenizer)
    ids = {prompt: tokenizer.encode(prompt, prepend=tokenizer.bos) for prompt in PROMPTS}
    ids = {prompt: tokens for prompt, tokens in ids.items() if len(tokens) < engine.max_len}
    replies = engine.complete(list(ids.values()), Sampling(temperature=0.0, max_tokens=16))
    return _show(ids, [reply.text for (reply,) in replies], log, step)


def from_nothing(model, tokenizer, log: Record, step: int, count: int = 8, seed: int = 42) -> list[tuple[str, str]]:
    """`count` texts of 128 tokens behind bos alone, at temperature 1."""
    params = Sampling(temperature=1.0, max_tokens=128, seed=seed)
    (replies,) = Engine(model, tokenizer).complete([[tokenizer.bos]], params, n=count)
    return _show([""] * count, [reply.text for reply in replies], log, step)


def _show(prompts, texts: list[str], log: Record, step: int) -> list[tuple[str, str]]:
    for prompt, text in zip(prompts, texts):
        log.event("sample", step=step, prompt=prompt, text=text)
        log.say(f"  {prompt}|{text!r}")
    return list(zip(prompts, texts))
