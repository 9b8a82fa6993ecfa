"""Talk with a model of the embedded world and count what is right: the pocket run's own benchmark.

    python -m scripts.bench_chat -i sft
    python -m scripts.bench_chat -i rl --show 20

200 questions about facts in wordings that no training text uses (greedy replies), 200 sums and products of held-out
pairs of two- and three-digit numbers (right only through the calculator), ten ways to ask who it is, and 200 validation
documents begun and continued freely by the base model, read by the world's own checker. Prints the rule for right, a
table with n and standard errors, and the wrong answers; writes every answer to <base>/bench_chat/ as JSON and Markdown.
"""

import dataclasses
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated

import tyro

from nanochat import attention, chat, checkpoint, cli, paths, runtime
from nanochat.engine import Engine
from nanochat.errors import refuse
from nanochat.sampling import Sampling
from nanochat.tinyworld import check, exam
from nanochat.tinyworld.documents import document
from tasks import common


@dataclasses.dataclass(frozen=True)
class Config:
    """What to ask, and whom."""

    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "sft"  # sft or rl: the model that is asked
    model_tag: str = ""  # its run; empty: the deepest
    step: int = -1  # its step; -1: the newest
    free_source: str = "base"  # base, sft or rl: the model that continues documents; of the same run
    num: int = 200  # questions, sums and continuations, each; 0: none
    seed: int = 1  # of everything that is drawn
    temperature: float = 0.0  # of the free continuations; 0 is greedy, as the replies are
    max_new_tokens: int = 64  # longest reply or continuation, tokens
    train_documents: int = 100_000  # training documents searched for copies; at least as many as the run read
    slots: int = 64  # sequences decoded together
    show: int = 10  # wrong answers printed a section
    device_type: str = ""  # cuda, mps or cpu; empty: the best there is
    out: str = ""  # folder for the answers; empty: <base>/bench_chat


def check_config(cfg: Config) -> None:
    """Refuse what makes no sense, all at once."""
    problems = [
        f"--{name.replace('_', '-')}={getattr(cfg, name)} must be {least} or more."
        for name, least in (("num", 0), ("show", 0), ("max_new_tokens", 1), ("slots", 1), ("train_documents", 0))
        if getattr(cfg, name) < least
    ]
    if cfg.source not in ("sft", "rl"):
        problems.append(f"--source={cfg.source} is unknown: use sft or rl.")
    if cfg.free_source not in ("base", "sft", "rl"):
        problems.append(f"--free-source={cfg.free_source} is unknown: use base, sft or rl.")
    refuse(problems)


def load(source: str, cfg: Config, rt: runtime.Runtime, tag: str, step: int | None):
    """(engine, tokenizer, meta) of a checkpoint."""
    backend = attention.choose(rt.device, rt.dtype)
    model, tokenizer, meta = checkpoint.build_model(
        source, tag or None, step, device=rt.device, dtype=rt.dtype, attend=backend.attend
    )
    return Engine(model, tokenizer, slots=cfg.slots), tokenizer, meta


def ask(engine: Engine, tokenizer, items: list[exam.Item], cfg: Config) -> list[dict]:
    """Greedy replies to the items, judged: {"section", "question", "expected", "reply", "calls", "right"} each."""
    asked = [{"messages": [{"role": "user", "content": item.question}]} for item in items]
    prompts = [chat.render_for_completion(conversation, tokenizer) for conversation in asked]
    replies = engine.complete(prompts, Sampling(temperature=0.0, max_tokens=cfg.max_new_tokens))
    return [judged(item, chat.parse_reply(reply.ids, tokenizer)) for item, (reply,) in zip(items, replies, strict=True)]


def judged(item: exam.Item, parts: list[dict]) -> dict:
    """One reply (content parts) with its verdict."""
    text, calls = common.text_of(parts), common.tool_calls(parts)
    return {
        "section": item.section,
        "question": item.question,
        "expected": item.expected,
        "reply": text,
        "calls": [list(call) for call in calls],
        "right": item.right(text, calls),
    }


def go_on(engine: Engine, tokenizer, cfg: Config) -> list[dict]:
    """Free continuations of validation documents, each with the checker's verdict and whether it is copied."""
    rng = Random(f"free {cfg.seed}")
    prompts = [exam.opening(document("val", i), rng) for i in range(cfg.num)]
    ids = [tokenizer.encode(prompt, prepend="<|bos|>") for prompt in prompts]
    params = [
        Sampling(temperature=cfg.temperature, max_tokens=cfg.max_new_tokens, seed=cfg.seed * 100_003 + i)
        for i in range(cfg.num)
    ]
    texts = [reply.text for (reply,) in engine.complete(ids, params)]
    copies = check.verbatim(texts, (document("train", i) for i in range(cfg.train_documents)))
    return [
        {"prompt": prompt, "continuation": text, "verbatim": copy} | exam.verdict(prompt, text)
        for prompt, text, copy in zip(prompts, texts, copies, strict=True)
    ]


def rows_of(answers: list[dict], free: list[dict]) -> list[tuple[str, list[bool]]]:
    """The table's rows: (what, verdicts)."""
    of = lambda section: [a["right"] for a in answers if a["section"] == section]
    return [
        ("facts, held-out wordings", of("facts")),
        ("sums through the calculator", of("sums")),
        ("says it is nanochat", of("identity")),
        ("continuations grammatical", [f["grammatical"] for f in free]),
        ("continuations consistent", [f["consistent"] for f in free]),
        ("continuations both", [f["grammatical"] and f["consistent"] for f in free]),
        ("continuations verbatim", [f["verbatim"] for f in free]),
    ]


def table(rows: list[tuple[str, list[bool]]]) -> str:
    """A Markdown table: what, n, right, share and standard error in percent."""
    lines = ["| what | n | count | share % | s.e. % |", "|---|---:|---:|---:|---:|"]
    for name, verdicts in rows:
        p, error = exam.share(verdicts)
        lines.append(f"| {name} | {len(verdicts)} | {sum(verdicts)} | {100 * p:.1f} | {100 * error:.1f} |")
    return "\n".join(lines)


def told(answer: dict) -> str:
    """One answer on one line."""
    calls = "".join(f"[{expression} = {output}] " for expression, output in answer["calls"])
    mark = "right" if answer["right"] else "WRONG"
    return f"{mark}: {answer['question']} -> {calls}{answer['reply']} (expected: {answer['expected']})"


def told_free(answer: dict) -> str:
    """One continuation on one line."""
    good = "good" if answer["grammatical"] and answer["consistent"] else "BAD"
    notes = "; ".join(answer["problems"])
    return f"{good}: {answer['prompt']} [...]{answer['continuation']!r}" + (f" ({notes})" if notes else "")


def wrong_ones(answers: list[dict], free: list[dict], most: int) -> list[str]:
    """Up to `most` wrong answers of each section, told."""
    wrong = [a for a in answers if not a["right"]]
    lines = [told(a) for name in ("facts", "sums", "identity") for a in islice(of_section(wrong, name), most)]
    bad = (f for f in free if not (f["grammatical"] and f["consistent"]))
    return lines + [told_free(f) for f in islice(bad, most)]


def of_section(answers: list[dict], section: str):
    """The answers of one section."""
    return (a for a in answers if a["section"] == section)


def write(folder: Path, name: str, cfg: Config, text: str, answers: list[dict], free: list[dict]) -> Path:
    """All answers as <name>.json and <name>.md; returns the Markdown file's path."""
    whole = {"config": dataclasses.asdict(cfg), "rules": exam.RULES, "answers": answers, "free": free}
    paths.write_json(folder / f"{name}.json", whole)
    lines = [f"# bench_chat: {name}", "", text, "", *(f"- {key}: {rule}" for key, rule in exam.RULES.items()), ""]
    lines += ["## Answers", "", *(f"- {told(a)}" for a in answers), "", "## Continuations", ""]
    lines += [f"- {told_free(f)}" for f in free]
    with paths.atomic_write(folder / f"{name}.md", "w") as file:
        file.write("\n".join(lines) + "\n")
    return folder / f"{name}.md"


def main(cfg: Config) -> dict:
    """Ask, judge, print, write; returns the shares by row."""
    check_config(cfg)
    # -- 1 runtime and model ----------------------------------------------------------------------------------------
    rt = runtime.start(cfg.device_type, cfg.seed)
    path = checkpoint.find(cfg.source, cfg.model_tag or None, None if cfg.step < 0 else cfg.step)
    tag = path.parent.name
    engine, tokenizer, meta = load(cfg.source, cfg, rt, tag, None if cfg.step < 0 else cfg.step)
    # -- 2 questions, sums, identity ----------------------------------------------------------------------------------
    items = exam.fact_items(cfg.num, cfg.seed) + exam.sum_items(cfg.num, cfg.seed) + exam.identity_items()
    answers = ask(engine, tokenizer, items, cfg)
    # -- 3 free continuations -----------------------------------------------------------------------------------------
    if cfg.num and cfg.free_source != cfg.source:
        engine, tokenizer, _ = load(cfg.free_source, cfg, rt, tag, None)
    free = go_on(engine, tokenizer, cfg) if cfg.num else []
    # -- 4 summary ----------------------------------------------------------------------------------------------------
    rows = rows_of(answers, free)
    text = table(rows) + f"\n\nReplies are greedy, continuations drawn at temperature {cfg.temperature} (0: greedy)."
    name = f"{cfg.source}_{tag}_{meta['step']:06d}_seed{cfg.seed}"
    written = write(Path(cfg.out) if cfg.out else paths.base_dir() / "bench_chat", name, cfg, text, answers, free)
    for line in (*(f"{key}: {rule}" for key, rule in exam.RULES.items()), "", text, ""):
        print(line)
    for line in wrong_ones(answers, free, cfg.show):
        print(line)
    print(f"all answers: {written}")
    runtime.stop(rt)
    return {name: exam.share(verdicts)[0] for name, verdicts in rows} | {"answers": str(written)}


if __name__ == "__main__":
    cli.run(main, Config)
