"""Pretrain a base model: next-token prediction on a stream of documents. `--depth` sets everything else.

    python -m scripts.base_train --depth=12                                    # one device
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=24
    python -m scripts.base_train --dataset=tinyworld --depth=4 --head-dim=64 --window-pattern=L --max-seq-len=256 \\
        --core-metric-every=-1

Needs the tokenizer (scripts.tok_train). Writes base_checkpoints/<tag>/: a folder a save, and record.jsonl. A run that
was stopped goes on with `--resume` as if it had never stopped, on a CPU bit for bit. The published code reaches GPT-2's
CORE (0.2565) at depth 24 in 99 minutes on 8xH100 (--fp8, ratio 8); what ours does on two CPU cores is in dev/bench/.
"""

import contextlib
import dataclasses
import time
from typing import Literal

from nanochat import (
    attention,
    checkpoint,
    cli,
    core_eval,
    cost,
    dataloader,
    dataset,
    hardware,
    live,
    loss_eval,
    nodes,
    optim,
    profiling,
    record,
    resume,
    runtime,
    samples,
    saving,
    scaling,
    schedule,
    shard,
    train,
    watch,
)
from nanochat.cli import off
from nanochat.errors import UserError, refuse
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of pretraining, with its default, unit and reason. -1 means off or automatic."""

    run: str = "dummy"  # wandb run name; "dummy" keeps the record local
    device_type: str = ""  # cuda, mps or cpu; empty: the best there is
    seed: int = 42  # of the initial weights
    # data
    dataset: str = ""  # climbmix, fineweb-edu, tinyworld or a folder of parquet; empty: the tokenizer's own
    val_shard: str = ""  # a folder's validation shard; empty: as inherited, its manifest's, or the last by name
    shards: int = -1  # training shards of a hub corpus, also those still being downloaded; -1: those that are there
    packing: str = "crop"  # crop: cut documents to fill rows (published); lossless: lose no token
    # model
    depth: int = 20  # layers; sets width, heads, batch, horizon and learning rates
    aspect_ratio: int = 64  # width = depth * aspect_ratio, rounded up to whole heads
    head_dim: int = 128  # channels a head
    n_kv_head: int = -1  # key/value heads; -1: as many as query heads
    max_seq_len: int = 2048  # context, tokens
    window_pattern: str = "SSSL"  # S: a quarter of the context, L: all of it; tiled over the layers, the last is L
    attention: str = "auto"  # backend: auto, sdpa, varlen, flex, flash3
    fp8: bool = False  # fp8 matmuls (Hopper, Ada and later)
    fp8_recipe: str = "tensorwise"  # the only recipe that is faster than bf16 here
    compile: str = "auto"  # auto or on: torch.compile on CUDA, blocks by hand on CPU; off: neither
    shard: str = "optimizer"  # over ranks: optimizer, or full: parameters and gradients too, if one device is too small
    recompute: bool = False  # run blocks again in the backward pass instead of keeping what is inside them
    # horizon: the first one that is set wins
    num_iterations: int = -1  # updates
    target_flops: float = -1.0  # FLOPs of the whole run
    target_param_data_ratio: float = 10.5  # tokens per scaling parameter (Chinchilla: 20)
    # optimisation
    device_batch_size: int | Literal["auto"] = 32  # rows of a micro-batch; auto: the most that fit the memory
    total_batch_size: int = -1  # tokens an update; -1: from the batch law
    embedding_lr: float = 0.3  # AdamW, before the batch and width laws
    unembedding_lr: float = 0.008  # AdamW
    matrix_lr: float = 0.02  # Muon
    scalar_lr: float = 0.5  # AdamW
    weight_decay: float = 0.28  # Muon, cautious, before its law
    warmup_steps: int = -1  # updates; -1: from the batch law (40 at 2^18 tokens and more)
    warmdown_ratio: float = 0.65  # share of the run in which the rate falls
    final_lr_frac: float = 0.05  # of the peak rate, at the end
    # evaluation; -1: never, but bpb is always measured at the end unless --eval-tokens=0
    eval_every: int = 250  # updates
    eval_tokens: int = 80 * 524288  # validation tokens a bpb
    core_metric_every: int = 2000  # updates, and at the end; more than the run has: at the end only
    core_metric_max_per_task: int = 500  # examples; -1: all
    sample_every: int = 2000  # updates
    # saving
    save_every: int = -1  # updates; the end is always saved, before it is evaluated
    keep: int = 2  # newest checkpoints kept; -1: all
    keep_every: int = -1  # also keep each checkpoint whose step is a multiple of this
    keep_best: bool = False  # also keep the checkpoint with the best validation bpb
    resume: bool = False  # go on from the newest complete checkpoint, or start if there is none
    resume_from_step: int = -1  # go on from exactly this step
    force: bool = False  # resume although flags differ from those the run was started with
    watchdog: float = 10.0  # write every rank's stacks when a step takes so many times the median; -1: never
    profile: bool = False  # trace a few early steps with torch.profiler, into the run's folder profile/
    spike: float = -1.0  # deviations above the recent loss or gradient norm that make a step a spike; -1: no rule
    spike_action: str = "skip"  # skip the update, or rollback: to the last checkpoint, without the data since
    model_tag: str = ""  # name of the run's folder; empty: d<depth>


def with_rows(cfg: Config, vocab_size: int, rt: runtime.Runtime) -> Config:
    """The flags with a number in place of --device-batch-size=auto."""
    if cfg.device_batch_size != "auto":
        return cfg
    config = make_plan(dataclasses.replace(cfg, total_batch_size=-1), vocab_size, rt.world).config
    rows = scaling.auto_rows(config, rt, shard=cfg.shard, recompute=cfg.recompute)
    return dataclasses.replace(cfg, device_batch_size=rows)


def make_plan(cfg: Config, vocab_size: int, world: int) -> scaling.Plan:
    """The plan of this command line; of one row where --device-batch-size=auto has not been settled."""
    if cfg.device_batch_size == "auto":
        cfg = dataclasses.replace(cfg, device_batch_size=1)
    same = ("depth", "aspect_ratio", "head_dim", "window_pattern", "target_param_data_ratio", "device_batch_size")
    rates = (
        "embedding_lr",
        "unembedding_lr",
        "matrix_lr",
        "scalar_lr",
        "weight_decay",
        "warmdown_ratio",
        "final_lr_frac",
    )
    maybe = ("n_kv_head", "num_iterations", "target_flops", "total_batch_size", "warmup_steps")
    return scaling.plan(
        vocab_size=vocab_size,
        sequence_len=cfg.max_seq_len,
        world=world,
        **{name: getattr(cfg, name) for name in (*same, *rates)},
        **{name: off(getattr(cfg, name)) for name in maybe},
    )


def describe_recompute(plan: scaling.Plan, rt: runtime.Runtime, on: bool) -> str:
    """What activation checkpointing costs and saves."""
    if not on:
        return ""
    price = cost.recomputation(plan.config, plan.device_batch_size, rt.dtype.itemsize)
    more = price["flops"] / plan.flops_per_token
    return f"; blocks run again: {more:+.0%} FLOPs, about {price['saved'] / 1e9:.2f} GB of activations not kept"


def describe(plan: scaling.Plan, rt: runtime.Runtime, name: str, backend: attention.Backend, how: str,
             recompute: bool = False) -> str:  # fmt: skip
    """What the run decided, for people."""
    c, p = plan.config, plan.parameters
    passed = "".join(f"; {other} not: {why}" for other, why in backend.passed_over)
    rows = [
        ("device", f"{rt.world} x {name}, {rt.dtype} ({rt.dtype_reason})"),
        ("model", f"{c.n_layer} layers x {c.n_embd}, {c.n_head} heads ({c.n_kv_head} kv), context {c.sequence_len}, "
                  f"windows {c.window_pattern}, vocabulary {c.vocab_size:,}"),
        ("parameters", f"{p['total']:,}, of which {p['scaling']:,} scale; {plan.flops_per_token:.3g} FLOPs a token"),
        ("horizon", f"{plan.iterations:,} updates of {plan.batch:,} tokens = {plan.tokens:,} ({plan.ratio:.2f} a "
                    f"scaling parameter, by {plan.horizon}), {plan.flops:.3g} FLOPs"),
        ("batch", f"{plan.accum} x {plan.device_batch_size} rows on each of {rt.world} rank(s)"),
        ("rates", f"x {plan.lr_mult:.3f} by the batch law, x {plan.short_mult:.3f} as a short run, "
                  f"{plan.warmup_steps} warm-up updates, decay {plan.weight_decay:.4g}"),
        ("attention", backend.name + passed),
        ("forward", how + describe_recompute(plan, rt, recompute)),
    ]  # fmt: skip
    return "\n".join(f"{label:<11}{text}" for label, text in rows)


def line(step: int, plan: scaling.Plan, meter: train.Meter, lr_mult: float, seconds: float, used: float | None) -> str:
    """A step's console line."""
    share = "" if used is None else f" | mfu {100 * used:.1f} %"
    left = meter.seconds_left(plan.iterations - step - 1)
    return (
        f"step {step:5d}/{plan.iterations} | loss {meter.loss:.4f} | lr x {lr_mult:.2f} | {1000 * seconds:6.0f} ms | "
        f"{plan.batch / seconds:,.0f} tok/s{share} | {meter.seconds / 60:.1f} min, {left / 60:.1f} left"
    )


def check(cfg: Config) -> None:
    """Refuse, all at once, what can be known to be wrong before any work is done."""
    problems = []
    if cfg.packing not in ("crop", "lossless"):
        problems.append(f"--packing={cfg.packing} is unknown: use crop or lossless.")
    if cfg.compile not in ("auto", "on", "off"):
        problems.append(f"--compile={cfg.compile} is unknown: use auto, on or off.")
    if cfg.fp8 and cfg.fp8_recipe != "tensorwise":
        problems.append(f"--fp8-recipe={cfg.fp8_recipe} is not offered: tensorwise is (rowwise is slower than bf16).")
    if cfg.fp8 and cfg.shard == "full":
        problems.append("--fp8 and --shard=full don't go together: choose one.")
    if cfg.spike_action not in ("skip", "rollback"):
        problems.append(f"--spike-action={cfg.spike_action} is unknown: use skip or rollback.")
    never = ("core_metric_every", "core_metric_max_per_task", "sample_every", "spike")
    problems += cli.too_small(cfg, (*never, "shards"), eval_tokens=0, shards=1, **dict.fromkeys(never, 0))
    refuse(problems + resume.problems(cfg))


def build(plan: scaling.Plan, cfg: Config, rt: runtime.Runtime, attend) -> GPT:
    """A model with fresh weights, alike on all ranks, its matmuls in fp8 if asked."""
    with shard.cradle(cfg.shard, rt):
        model = GPT(plan.config, attend=attend)
    model.init_weights(cfg.seed)
    model.compute_dtype, model.recompute = rt.dtype, cfg.recompute
    if cfg.shard == "full":
        shard.apply(model, rt)
    if cfg.fp8:
        from nanochat.kernels import fp8

        fp8.convert(model)
    return model


def core_bundle(
    every: int | None, plan: scaling.Plan, rt: runtime.Runtime
) -> tuple[core_eval.Bundle | None, list[str]]:
    """CORE's data, or None; and a sentence where CORE, due at the end only, is left out for want of it. Collective."""
    if not every:
        return None, []
    try:
        return core_eval.bundle(rt), []
    except UserError as error:
        if every <= plan.iterations:
            raise
        return None, [f"CORE is not measured at the end: {error}"]


def bpb(model, corpus, tokenizer, cfg: Config, plan: scaling.Plan, rt: runtime.Runtime) -> float:
    """Validation bits per byte of the first --eval-tokens tokens, the same rows whatever batch and world."""
    rows = dataloader.eval_batches(
        corpus, tokenizer, rows=plan.device_batch_size, seq_len=cfg.max_seq_len, tokens=cfg.eval_tokens, rank=rt.rank,
        world=rt.world, device=rt.device,
    )  # fmt: skip
    with rows, train.resting(model):
        return loss_eval.bits_per_byte(model, rows, tokenizer.token_bytes(), rt)


def main(cfg: Config) -> dict:
    """Train; returns the summary that also ends the record."""
    check(cfg)
    # 1. runtime ------------------------------------------------------------------------------------------------------
    rt = runtime.start(cfg.device_type, cfg.seed, training=True)
    name = hardware.device_name(rt.device)
    peak = hardware.peak_flops(name, fp8=False)
    # 2. tokenizer and corpus -----------------------------------------------------------------------------------------
    tokenizer = Tokenizer.load()
    corpus = dataset.open_inherited(tokenizer.meta.get("dataset"), cfg.dataset, cfg.val_shard, off(cfg.shards))
    nodes.same(rt, tokenizer=tokenizer.fingerprint, dataset=corpus.identity)
    # 3. plan ---------------------------------------------------------------------------------------------------------
    plan = make_plan(with_rows(cfg, tokenizer.vocab_size, rt), tokenizer.vocab_size, rt.world)
    backend = attention.choose(rt.device, rt.dtype, cfg.attention)
    root = checkpoint.run_folder("base", cfg.model_tag or f"d{cfg.depth}")
    core_every = off(cfg.core_metric_every)
    bundle, without = core_bundle(core_every, plan, rt)
    # 4. model and optimizer ------------------------------------------------------------------------------------------
    model = build(plan, cfg, rt, backend.attend)
    optimizer = optim.MuonAdamW(model.roles(), plan.lrs, rt)
    at, start = resume.Progress.fresh(rt.dtype, off(cfg.spike)), 0
    found, notes = resume.point(root, cfg.resume, off(cfg.resume_from_step), rt)
    if found:
        resume.check(cfg, found, tokenizer, cfg.force, plan.batch)
        at, start = resume.restore(found, model, optimizer, rt, off(cfg.spike)), found.step
    forward, how = train.fastest(model, rt, cfg.compile != "off")
    # 5. loop ---------------------------------------------------------------------------------------------------------
    metrics: dict = {}
    meta = {
        "stage": "base", "config": dataclasses.asdict(plan.config), "plan": record.plain(plan),
        "user_config": dataclasses.asdict(cfg), "tokenizer": tokenizer.fingerprint, "dataset": corpus.identity,
    }  # fmt: skip
    loader = dataloader.pretrain_loader(
        corpus, tokenizer, "train", rows=plan.device_batch_size, seq_len=cfg.max_seq_len, rank=rt.rank, world=rt.world,
        device=rt.device, mode=cfg.packing, state=at.loader,
    )  # fmt: skip
    saver = saving.Saver(root, rt, saving.Keep(off(cfg.keep), off(cfg.keep_every), cfg.keep_best), at.scores)
    log = record.Record(root / "record.jsonl", run=cfg.run, stage="base", config=cfg, main=rt.main,
                        resume_step=start if found else None, wandb_id=at.wandb)  # fmt: skip
    log.event("plan", plan=plan, device=name, dtype=rt.dtype_reason, attention=backend.name, compile=how)
    log.say(describe(plan, rt, name, backend, how, cfg.recompute))
    for note in (*plan.notes, *without, *notes, *resume.make_way(root, found, cfg.resume, rt)):
        log.say(f"note: {note}")
    watched = watch.Watch(log, rt, off(cfg.watchdog))
    traced = profiling.Profile(log, rt, cfg.profile)
    with (log, live.View(log), contextlib.closing(loader), saver, watched, traced, train.StopSignal(rt) as stop,
          train.calm_gc() as calm):  # fmt: skip
        step, here, batch = start, start if found else -1, None  # `here`: the step whose checkpoint is already there
        while True:
            last, signum = step >= plan.iterations, stop.agreed(rt)
            if (signum or last or train.due(step, off(cfg.save_every))) and step != here:
                state = {"loader": batch.state if batch else at.loader, "rng": train.rng_state()}
                saver.save(step, model=model, optimizer=optimizer, rank_state=state, meta=meta | at.meta(log),
                           wait=bool(last or signum))  # fmt: skip
            log.saves(saver.news())
            if signum:
                log.stop(step, signum)
            if cfg.eval_tokens and (last or train.due(step, off(cfg.eval_every), first=True)):
                metrics["val_bpb"] = bpb(model, corpus, tokenizer, cfg, plan, rt)
                saver.score(step, metrics["val_bpb"])
                metrics["min_val_bpb"] = min(saver.scores.values())  # those before a resume too
                log.eval(step, f"step {step:5d} | validation bpb {metrics['val_bpb']:.4f}", val_bpb=metrics["val_bpb"])
            if bundle and train.due(step, core_every, last):
                with train.resting(model):
                    core = core_eval.evaluate(
                        model, tokenizer, bundle, max_per_task=cfg.core_metric_max_per_task, runtime=rt
                    )
                metrics["core"] = core["core"]
                log.eval(step, f"step {step:5d} | CORE {core['core']:.4f}", core=core["core"], core_tasks=core["tasks"])
            if train.due(step, off(cfg.sample_every), last):
                with train.resting(model):
                    if rt.main:
                        samples.continuations(model, tokenizer, log, step)
            if last:
                break
            began = time.perf_counter()
            watched.begin(step)
            for micro in range(plan.accum):
                batch = next(loader)
                total = forward(batch.inputs, batch.targets, reduction="sum")  # as in fine-tuning: one compiled graph
                scale = at.scaler.scale / (plan.accum * batch.targets.numel())
                optimizer.backward(total * scale, last=micro + 1 == plan.accum)
                at.meter.add(total / batch.targets.numel(), batch.targets.numel())
            loss = at.meter.mean(rt)
            lr_mult = schedule.lr(step, plan.iterations, plan.warmup_steps, plan.warmdown_ratio, plan.final_lr_frac)
            norm = train.optimizer_step(
                optimizer, at.scaler, loss, step=step, spikes=at.spikes, suspect=(model, batch.inputs),
                position=f"epoch {batch.note.epoch}, shard {batch.note.shard}, token {at.meter.tokens:,}",
                lr_mult=lr_mult, momentum=schedule.momentum(step, plan.iterations, plan.warmdown_ratio),
                weight_decay=plan.weight_decay * schedule.weight_decay(step, plan.iterations),
            )  # fmt: skip
            rt.synchronize()
            seconds = time.perf_counter() - began
            watched.end()
            traced.step(step)
            at.meter.tick(loss, plan.batch, seconds)
            used = train.mfu(plan.batch, seconds, plan.flops_per_token, peak, rt.world)
            log.step(
                step, line(step, plan, at.meter, lr_mult, seconds, used), loss=loss, smooth_loss=at.meter.loss,
                lr=lr_mult, grad_norm=norm, seconds=seconds, tokens_per_second=plan.batch / seconds, mfu=used,
                memory=rt.bytes_now(), done=(step + 1) / plan.iterations,
                tokens=at.meter.tokens, epoch=batch.note.epoch, shard=batch.note.shard,
            )  # fmt: skip
            if at.spikes.why:
                log.note("spike", f"step {step}: {at.spikes.why}; {cfg.spike_action}.", step=step)
            if at.spikes.why and cfg.spike_action == "rollback":
                at, step = resume.roll_back(saver, model, optimizer, at, rt)
                here = step
                log.event("rollback", step=step)
                continue
            calm()
            step += 1
    # 6. summary ------------------------------------------------------------------------------------------------------
    summary = at.summary(step, saver, rt) | metrics | {
        "loss": at.meter.loss, "tokens": at.meter.tokens, "tokens_per_second": at.meter.tokens_per_second,
        "flops": plan.flops,
    }  # fmt: skip
    log.close(**summary)
    runtime.stop(rt)
    return summary


if __name__ == "__main__":
    cli.run(main, Config)
