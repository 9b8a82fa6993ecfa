"""Reinforce a chat model on problems with checkable answers: REINFORCE with a group baseline, strictly on-policy.

    python -m scripts.chat_rl
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl

A step samples `--num-samples` replies to each of `--examples-per-step` problems, pays each reply 0 or 1, and raises
the probability of replies that did better than their group's mean (advantage = reward - mean, not divided by the
deviation). There is no KL term, no ratio and no clip, because each sample is used once by the policy that drew it: GRPO
(arXiv 2402.03300) made plain, normalised over the step's tokens as in DAPO (arXiv 2503.14476). Tool outputs are read,
not learned; the token that ends a reply is learned. Groups whose replies all earned the same teach nothing: they are
left out and cost no forward. Problems: GSM8K, or tinyworld's sums for a tinyworld model.
Writes chatrl_checkpoints/<tag>/. `--resume` goes on, on a CPU bit for bit.
"""

import dataclasses
import hashlib
import time

import torch

from nanochat import (
    attention,
    chat,
    chat_eval,
    checkpoint,
    cli,
    live,
    nodes,
    optim,
    profiling,
    record,
    resume,
    runtime,
    saving,
    scaling,
    schedule,
    shard,
    train,
    watch,
)
from nanochat.cli import off
from nanochat.engine import Engine
from nanochat.errors import UserError, refuse
from nanochat.sampling import Sampling
from tasks import mixtures

SLOTS = 128  # replies written at the same time, where the cache has room: the fewer steps, the less between them


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of reinforcement. -1 means off or automatic."""

    run: str = "dummy"  # wandb run name; "dummy" keeps the record local
    device_type: str = ""  # cuda, mps or cpu; empty: the best there is
    seed: int = 42  # of the order of problems and of the samples
    # model and problems
    model_tag: str = ""  # fine-tuned run to start from, and the name of this one; empty: the deepest
    model_step: int = -1  # its step; -1: the newest
    attention: str = "auto"  # backend
    shard: str = "optimizer"  # over ranks: optimizer, or full: what learns too; replies are drawn by the whole model
    task: str = ""  # gsm8k or tinyworld; empty: by the model's corpus
    # horizon
    num_epochs: int = 1  # passes over the problems
    num_iterations: int = -1  # updates; -1: whole epochs
    # sampling
    device_batch_size: int = 8  # rows of one learning forward
    examples_per_step: int = 16  # problems an update, over all ranks
    num_samples: int = 16  # replies a problem
    max_new_tokens: int = 256  # longest reply, tokens
    temperature: float = 1.0  # of the samples
    top_k: int = 50  # of the samples; 0: off
    # optimisation; rates before the width law
    embedding_lr: float = 0.2  # AdamW
    unembedding_lr: float = 0.004  # AdamW
    matrix_lr: float = 0.02  # Muon
    weight_decay: float = 0.0  # Muon, cautious
    init_lr_frac: float = 0.05  # start at this share of the rates
    # evaluation and saving
    eval_every: int = 60  # updates between pass@k; -1: never
    eval_examples: int = 400  # held-out problems a pass@k
    eval_samples: int = 8  # replies a held-out problem: k goes up to it
    save_every: int = 60  # updates; the end is always saved, before it is evaluated
    keep: int = 2  # newest checkpoints kept; -1: all
    keep_every: int = -1  # also keep each checkpoint whose step is a multiple of this
    keep_best: bool = False  # also keep the checkpoint with the best validation pass@1
    resume: bool = False  # go on from the newest complete checkpoint, or start if there is none
    resume_from_step: int = -1  # go on from exactly this step
    force: bool = False  # resume although flags differ
    watchdog: float = 10.0  # write every rank's stacks when a step takes so many times the median; -1: never
    profile: bool = False  # trace a few early steps with torch.profiler, into the run's folder profile/


@dataclasses.dataclass
class Rollout:
    """One sampled reply: ids of prompt and reply, which were sampled, and its reward above its group's mean."""

    prompt: list[int]
    reply: list[int]
    mask: list[int]
    advantage: float


def check(cfg: Config) -> None:
    """Refuse what makes no sense, all at once."""
    sizes = ("num_iterations", "num_epochs", "device_batch_size", "examples_per_step", "num_samples",
             "max_new_tokens", "eval_examples", "eval_samples")  # fmt: skip
    rates = ("embedding_lr", "unembedding_lr", "matrix_lr", "weight_decay", "init_lr_frac")
    problems = cli.too_small(cfg, ("num_iterations",), **dict.fromkeys(sizes, 1), **dict.fromkeys(rates, 0))
    if cfg.num_samples == 1:
        problems.append("--num-samples=1 has no group to compare with: use 2 or more.")
    if cfg.task not in ("", "gsm8k", "tinyworld"):
        problems.append(f"--task={cfg.task} is unknown: use gsm8k or tinyworld, or leave it empty.")
    refuse(problems + resume.problems(cfg))
    sampling(cfg, seed=0)  # refuses what no reply can be drawn with


def seed_of(seed: int, step: int, problem: int) -> int:
    """A seed of its own for each problem of each step, the same in every run and world size."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {problem}".encode()).digest()[:7], "big")


def sampling(cfg: Config, seed: int) -> Sampling:
    """How replies are drawn."""
    return Sampling(temperature=cfg.temperature, top_k=cfg.top_k or None, max_tokens=cfg.max_new_tokens, seed=seed)


def draw(
    engine: Engine, task, indices: list[int], cfg: Config, step: int, tokenizer
) -> tuple[list[Rollout], list[list[float]]]:
    """Sample all replies to the problems `indices` in one batch -> rollouts that teach, rewards by problem."""
    problems = [task[i] for i in indices]
    room = max(engine.max_len // 2, engine.max_len - cfg.max_new_tokens)  # a long prompt gives way, by half at most
    prompts = [chat.render_for_completion(p, tokenizer, room, cut=True) for p in problems]
    params = [sampling(cfg, seed_of(cfg.seed, step, i)) for i in indices]
    groups = engine.complete(prompts, params, n=cfg.num_samples)
    rollouts, rewards = [], []
    for problem, prompt, group in zip(problems, prompts, groups, strict=True):
        earned = [task.reward(problem, chat.parse_reply(reply.ids, tokenizer)) for reply in group]
        rewards.append(earned)
        mean = sum(earned) / len(earned)
        for reply, reward in zip(group, earned, strict=True):
            end = [] if reply.stop_token is None else [reply.stop_token]
            if reward != mean:
                rollouts.append(Rollout(prompt, reply.ids + end, reply.mask + [1] * len(end), reward - mean))
    return rollouts, rewards


def rows_of(rollouts: list[Rollout], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded inputs, targets (-1 where nothing is learned) and advantages, each (B, T)."""
    length = max(len(r.prompt) + len(r.reply) for r in rollouts) - 1
    inputs = torch.zeros(len(rollouts), length, dtype=torch.long)
    targets = torch.full_like(inputs, -1)
    weights = torch.zeros(len(rollouts), length)
    for i, r in enumerate(rollouts):
        ids = torch.tensor(r.prompt + r.reply)
        inputs[i, : len(ids) - 1] = ids[:-1]
        learned = torch.tensor(r.mask, dtype=torch.bool)
        first = len(r.prompt) - 1  # the position that predicts the reply's first token
        targets[i, first : len(ids) - 1] = torch.where(learned, ids[len(r.prompt) :], -1)
        weights[i] = r.advantage
    return inputs.to(device), targets.to(device), weights.to(device)


def learn(model, optimizer, rollouts: list[Rollout], cfg: Config, scale: float, rt: runtime.Runtime) -> float:
    """Backward of sum(advantage x negative log probability) x scale; returns the unscaled sum."""
    total, rows = 0.0, cfg.device_batch_size
    ordered = sorted(rollouts, key=lambda r: len(r.prompt) + len(r.reply))  # like lengths together: little padding
    batches = [ordered[start : start + rows] for start in range(0, len(ordered), rows)]
    if shard.sharded(model):  # all ranks gather its parts together, so whoever has fewer batches runs empty ones
        batches += [[Rollout([0], [0], [0], 0.0)]] * (rt.max(len(batches)) - len(batches))
    for number, batch in enumerate(batches):
        inputs, targets, weights = rows_of(batch, rt.device)
        loss = (model(inputs, targets, reduction="none") * weights).sum()
        optimizer.backward(loss * scale, last=number + 1 == len(batches))
        total += float(loss.detach())
    return total


def evaluate(model, task, tokenizer, cfg: Config, rt: runtime.Runtime) -> dict[str, float]:
    """Unbiased pass@k on the held-out problems, and the standard error of pass@1; the same draws at every step."""
    with train.resting(model):
        result = chat_eval.evaluate(
            task, Engine(model, tokenizer, slots=SLOTS), tokenizer, runtime=rt, max_problems=cfg.eval_examples,
            num_samples=cfg.eval_samples, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
            top_k=cfg.top_k or None, seed=cfg.seed, name="pass@k",
        )  # fmt: skip
    return {f"pass@{k}": value for k, value in result["pass_at_k"].items()} | {"pass@1_se": result["stderr"]}


def main(cfg: Config) -> dict:
    """Reinforce; returns the summary that also ends the record."""
    check(cfg)
    # 1. runtime ------------------------------------------------------------------------------------------------------
    rt = runtime.start(cfg.device_type, cfg.seed, training=True)
    backend = attention.choose(rt.device, rt.dtype, cfg.attention)
    # 2. model and tokenizer ------------------------------------------------------------------------------------------
    base = checkpoint.load(nodes.find("sft", cfg.model_tag or None, off(cfg.model_step), rt))
    device = shard.cradle(cfg.shard, rt)
    model, tokenizer, _ = checkpoint.build_model(base.path, device=device, dtype=rt.dtype, attend=backend.attend)
    if cfg.shard == "full":
        shard.apply(model, rt)
    root = checkpoint.folder("rl") / base.path.parent.name
    # 3. problems -----------------------------------------------------------------------------------------------------
    problems, held_out = mixtures.rl(cfg.task or base.meta["dataset"]["dataset"])
    per_epoch = len(problems) // cfg.examples_per_step
    steps = cfg.num_iterations if cfg.num_iterations != -1 else per_epoch * cfg.num_epochs
    if steps == 0:
        raise UserError(f"--examples-per-step={cfg.examples_per_step} is more than the {len(problems)} problems.")
    # 4. optimizer ----------------------------------------------------------------------------------------------------
    rates = {name: getattr(cfg, name) for name in ("embedding_lr", "unembedding_lr", "matrix_lr")}
    lrs = scaling.learning_rates(model.config, cfg.init_lr_frac, **rates)
    optimizer = optim.MuonAdamW(model.roles(), lrs, rt)
    at, start = resume.Progress.fresh(rt.dtype), 0
    found, notes = resume.point(root, cfg.resume, off(cfg.resume_from_step), rt)
    if found:
        resume.check(cfg, found, tokenizer, cfg.force)
        at, start = resume.restore(found, model, optimizer, rt), found.step
    # 5. loop ---------------------------------------------------------------------------------------------------------
    metrics: dict = {}
    meta = {
        "stage": "rl", "config": base.meta["config"], "plan": base.meta["plan"], "user_config": dataclasses.asdict(cfg),
        "tokenizer": tokenizer.fingerprint, "dataset": base.meta["dataset"],
    }  # fmt: skip
    saver = saving.Saver(root, rt, saving.Keep(off(cfg.keep), off(cfg.keep_every), cfg.keep_best), at.scores)
    log = record.Record(root / "record.jsonl", run=cfg.run, stage="rl", config=cfg, main=rt.main,
                        resume_step=start if found else None, wandb_id=at.wandb)  # fmt: skip
    log.event("plan", plan={"steps": steps, "problems": len(problems), "lrs": lrs, "from": base.path.name})
    log.say(f"reinforcing {base.path}: {steps} updates of {cfg.examples_per_step} x {cfg.num_samples} replies")
    for note in (*notes, *resume.make_way(root, found, cfg.resume, rt)):
        log.say(f"note: {note}")
    watched, traced = watch.Watch(log, rt, off(cfg.watchdog)), profiling.Profile(log, rt, cfg.profile)
    with log, live.View(log), saver, watched, traced, train.StopSignal(rt) as stop:
        for step in range(start, max(start, steps) + 1):
            last, signum = step >= steps, stop.agreed(rt)
            if (signum or last or train.due(step, off(cfg.save_every))) and not (found and step == start):
                saver.save(step, model=model, optimizer=optimizer, rank_state={"rng": train.rng_state()},
                           meta=meta | at.meta(log), wait=bool(last or signum))  # fmt: skip
            log.saves(saver.news())
            if signum:
                log.stop(step, signum)
            if train.due(step, off(cfg.eval_every), last, first=True):
                metrics = evaluate(model, held_out, tokenizer, cfg, rt)
                saver.score(step, -metrics["pass@1"])
                shown = f"pass@1 {metrics['pass@1']:.4f} ± {metrics['pass@1_se']:.4f}"
                log.eval(step, f"step {step:4d} | {shown}", **metrics)
            if last:
                break
            began = time.perf_counter()
            watched.begin(step)
            mine = [i % len(problems) for i in range(step * cfg.examples_per_step, (step + 1) * cfg.examples_per_step)]
            with train.resting(model):
                rollouts, rewards = draw(
                    Engine(model, tokenizer, slots=SLOTS), problems, mine[rt.rank :: rt.world], cfg, step, tokenizer
                )
            counts = [sum(map(sum, rewards)), sum(map(len, rewards)), len(rollouts), sum(sum(r.mask) for r in rollouts)]
            paid, drawn, taught, tokens = rt.sum(torch.tensor(counts, dtype=torch.float32, device=rt.device)).tolist()
            loss = learn(model, optimizer, rollouts, cfg, at.scaler.scale * rt.world / max(tokens, 1), rt)
            lr_mult, norm = schedule.rl_lr(step, steps), 0.0
            if tokens:  # some group had something to teach
                norm = train.optimizer_step(
                    optimizer, at.scaler, 0.0, step=step, position=f"problems {mine}", lr_mult=lr_mult, momentum=0.95,
                    weight_decay=cfg.weight_decay,
                )  # fmt: skip  # 0.0: a loss that is not finite shows in the norm, which is of all ranks
            else:
                optimizer.zero_grad()
            seconds = time.perf_counter() - began
            watched.end()
            traced.step(step)
            at.meter.tick(loss, int(tokens), seconds)
            console = (f"step {step:4d}/{steps} | reward {paid / drawn:.3f} | {taught:.0f} replies taught | "
                       f"lr x {lr_mult:.2f} | {seconds:.1f} s")  # fmt: skip
            log.step(step, console, reward=paid / drawn, lr=lr_mult, grad_norm=norm, seconds=seconds,
                     taught=int(taught), targets=tokens, memory=rt.bytes_now(), done=(step + 1) / steps)  # fmt: skip
    # 6. summary ------------------------------------------------------------------------------------------------------
    summary = at.summary(step, saver, rt) | metrics
    log.close(**summary)
    runtime.stop(rt)
    return summary


if __name__ == "__main__":
    cli.run(main, Config)
