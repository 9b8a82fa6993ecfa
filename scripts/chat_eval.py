"""Judge a chat model by tasks: multiple choice by its logits, the rest by what it writes; and ChatCORE over them all.

    python -m scripts.chat_eval -i sft                      # the suite of the model's corpus
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i sft
    python -m scripts.chat_eval -i rl -a "GSM8K|HumanEval" -n 4 -t 1.0 -x 100

Needs a checkpoint of scripts.chat_sft or chat_rl, and the tasks' data: from the hub, or --tasks-dir (layout in
tasks/source.py); the tasks of a tinyworld model are embedded. Writes beside the checkpoint: chat_eval_<step>.json, in
chat_eval_<step>/ every prompt, reply and verdict, and rows into record.jsonl. HumanEval runs the model's code in a cage
of namespaces; on a machine that has none it is left out, or refused at once where it was asked for by name.
"""

import dataclasses
from typing import Annotated

import tyro

from nanochat import attention, chat_eval, checkpoint, cli, paths, record, runtime
from nanochat.engine import Engine
from nanochat.errors import refuse
from tasks import suite


def flag(*aliases: str):
    """Short names of a flag."""
    return tyro.conf.arg(aliases=aliases)


@dataclasses.dataclass(frozen=True)
class Config:
    """Which model, which tasks, how many problems, and how replies are drawn."""

    source: Annotated[str, flag("-i")] = "sft"  # sft or rl (or base, which was never taught the chat format)
    task_name: Annotated[str, flag("-a")] = ""  # names separated by |; empty: the suite of the model's corpus
    temperature: Annotated[float, flag("-t")] = 0.0  # of written replies; 0 is greedy
    max_new_tokens: Annotated[int, flag("-m")] = 512  # longest reply
    num_samples: Annotated[int, flag("-n")] = 1  # replies a problem; accuracy is the share that is right (pass@1)
    top_k: Annotated[int, flag("-k")] = 50  # keep the k likeliest tokens; 0: all
    batch_size: Annotated[int, flag("-b")] = 32  # prompts scored, and replies written, at the same time
    model_tag: Annotated[str, flag("-g")] = ""  # e.g. d12; empty: the largest there is
    step: Annotated[int, flag("-s")] = -1  # of the checkpoint; -1: the newest
    max_problems: Annotated[int, flag("-x")] = -1  # of each task, the first so many; -1: all
    device_type: str = ""  # cuda, mps or cpu; empty: the best there is
    seed: int = 42  # of the replies
    tasks_dir: str = ""  # folder of task data; empty: NANOCHAT_TASKS_DIR, else the hub
    allow_unsafe_code: bool = False  # run the model's code even where it can't be isolated


def check(cfg: Config) -> list[str]:
    """The tasks asked for; what is wrong with the flags is refused all at once."""
    names = [name.strip() for name in cfg.task_name.split("|") if name.strip()]
    least = {"max_new_tokens": 1, "num_samples": 1, "batch_size": 1, "top_k": 0, "max_problems": 1, "temperature": 0}
    problems = cli.too_small(cfg, ("max_problems",), **least)
    if cfg.source not in ("base", "sft", "rl"):
        problems.append(f"-i {cfg.source} is no stage: choose sft or rl.")
    refuse(problems)
    suite.check(names)
    return names


def line(name: str, one: dict) -> str:
    """A task's result for people."""
    more = "".join(f" | pass@{k} {value:.4f}" for k, value in one["pass_at_k"].items() if k != "1")
    return (
        f"{name:<18} accuracy {one['accuracy']:.4f} +- {one['stderr']:.4f}{more} | centred {one['centered']:+.4f} | "
        f"{one['n']} problems, {one['seconds']:.1f} s"
    )


def main(cfg: Config) -> dict:
    """Evaluate; returns {"tasks": {name: result}, "chatcore": float or None, ...}, as written to disk."""
    names = check(cfg)
    # 1. runtime ------------------------------------------------------------------------------------------------------
    rt = runtime.start(cfg.device_type, cfg.seed)
    backend = attention.choose(rt.device, rt.dtype)
    # 2. model and tokenizer ------------------------------------------------------------------------------------------
    path = checkpoint.find(cfg.source, cfg.model_tag or None, cfg.step if cfg.step >= 0 else None)
    model, tokenizer, meta = checkpoint.build_model(path, device=rt.device, dtype=rt.dtype, attend=backend.attend)
    step, root = checkpoint.load(path).step, path.parent
    # 3. tasks --------------------------------------------------------------------------------------------------------
    corpus = meta.get("dataset", {}).get("dataset", "")
    whole = suite.names(corpus)
    data = (cfg.tasks_dir or None, cfg.allow_unsafe_code)
    tasks, left_out = ({n: suite.make(n, *data) for n in names}, []) if names else suite.whole(corpus, rt, *data)
    # 4. loop ---------------------------------------------------------------------------------------------------------
    log = record.Record(root / "record.jsonl", stage=f"{cfg.source}_eval", config=cfg, main=rt.main)
    log.say(f"judging {path} by {', '.join(tasks)}")
    for note in left_out:
        log.say(f"note: {note}")
    engine = Engine(model, tokenizer, slots=cfg.batch_size, frozen=True)
    label = f"chat_eval_{step:06d}" + (f"_{'+'.join(names)}" if names else "")
    results = {}
    for name, task in tasks.items():
        results[name] = one = chat_eval.evaluate(
            task, engine, tokenizer, runtime=rt, max_problems=None if cfg.max_problems == -1 else cfg.max_problems,
            num_samples=cfg.num_samples, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
            top_k=cfg.top_k or None, seed=cfg.seed, batch_size=cfg.batch_size, path=root / label / f"{name}.jsonl",
            name=name,
        )  # fmt: skip
        log.eval(step, line(name, one), **{name: one["accuracy"], f"{name}_stderr": one["stderr"]})
    # 5. summary ------------------------------------------------------------------------------------------------------
    counted = {name: results[name] for name in whole if name in results}
    chatcore = chat_eval.chat_core(counted) if len(counted) == len(whole) else None
    if chatcore is not None:
        log.eval(step, f"ChatCORE {chatcore:.4f}", chatcore=chatcore)
    summary = {
        "source": cfg.source, "tag": root.name, "step": step, "chatcore": chatcore, "tasks": results,
        "config": dataclasses.asdict(cfg),
    }  # fmt: skip
    if rt.main:
        paths.write_json(root / f"{label}.json", summary)
    log.close(chatcore=chatcore, results=str(root / f"{label}.json"))
    runtime.stop(rt)
    return summary


if __name__ == "__main__":
    cli.run(main, Config)
