"""Fine-tune a base model on conversations, so that it answers. The loss counts only what the assistant says.

    python -m scripts.chat_sft
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft

Starts from the newest base checkpoint (`--model-tag`, `--model-step`) and its optimizer's moments; unset rates and
sizes are inherited from it. The data follow from the base model's corpus: tinyworld's own conversations for a tinyworld
model, else SmolTalk, MMLU, GSM8K, spelling and, if given, `--identity` conversations. One epoch, unless
--num-iterations. Writes chatsft_checkpoints/<tag>/. `--resume` goes on, on a CPU bit for bit.
"""

import contextlib
import dataclasses
import time
from typing import Literal

from nanochat import (
    attention,
    chat,
    chat_eval,
    checkpoint,
    cli,
    dataloader,
    live,
    loss_eval,
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
from nanochat.gpt import GPTConfig
from tasks import mixtures, suite


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of fine-tuning. -1 means off, or: as the base checkpoint was trained."""

    run: str = "dummy"  # wandb run name; "dummy" keeps the record local
    device_type: str = ""  # cuda, mps or cpu; empty: the best there is
    seed: int = 42  # of the order of the conversations
    # model
    model_tag: str = ""  # base run to start from, and the name of this one; empty: the deepest
    model_step: int = -1  # its step; -1: the newest
    load_optimizer: int = 1  # 1: start with the moments of pretraining
    attention: str = "auto"  # backend
    compile: str = "auto"  # auto or on: torch.compile on CUDA, blocks by hand on CPU; off: neither
    shard: str = "optimizer"  # over ranks: optimizer, or full: parameters and gradients too, if one device is too small
    # data
    identity: str = ""  # JSON-lines file of conversations about the model itself (tasks/customjson.py)
    mmlu_epochs: int = 3  # times MMLU's auxiliary questions are in the mixture
    gsm8k_epochs: int = 4  # times GSM8K is in the mixture
    # horizon
    num_iterations: int = -1  # updates; -1: one epoch
    max_seq_len: int = -1  # row length, tokens
    device_batch_size: int | Literal["auto"] = -1  # rows of a micro-batch; auto: the most that fit the memory
    total_batch_size: int = -1  # tokens an update, padding included
    # optimisation; rates before the batch and width laws
    embedding_lr: float = -1.0  # AdamW
    unembedding_lr: float = -1.0  # AdamW
    matrix_lr: float = -1.0  # Muon
    init_lr_frac: float = 0.8  # start at this share of the base model's peak rates
    warmup_ratio: float = 0.0  # share of the run in which the rate rises
    warmdown_ratio: float = 0.5  # share of the run in which the rate falls
    final_lr_frac: float = 0.0  # of the first rate, at the end
    # evaluation and saving
    eval_every: int = 200  # updates between validation bpb; -1: at the end only
    eval_tokens: int = 40 * 524288  # validation tokens, padding included; 0: none
    chatcore_every: int = 200  # updates between ChatCORE; -1: never
    chatcore_max_cat: int = -1  # multiple-choice problems a task; -1: all
    chatcore_max_sample: int = 24  # open problems a task; -1: all
    save_every: int = -1  # updates; the end is always saved, before it is evaluated
    keep: int = 2  # newest checkpoints kept; -1: all
    keep_every: int = -1  # also keep each checkpoint whose step is a multiple of this
    keep_best: bool = False  # also keep the checkpoint with the best validation bpb
    resume: bool = False  # go on from the newest complete checkpoint, or start if there is none
    resume_from_step: int = -1  # go on from exactly this step
    force: bool = False  # resume although flags differ
    watchdog: float = 10.0  # write every rank's stacks when a step takes so many times the median; -1: never
    profile: bool = False  # trace a few early steps with torch.profiler, into the run's folder profile/
    spike: float = -1.0  # deviations above the recent loss or gradient norm that make a step a spike; -1: no rule
    spike_action: str = "skip"  # skip the update, or rollback: to the last checkpoint, without the data since


def check(cfg: Config) -> None:
    """Refuse, all at once, what can be known to be wrong before any work is done."""
    rates = ("embedding_lr", "unembedding_lr", "matrix_lr")
    sizes = ("num_iterations", "device_batch_size", "total_batch_size")
    never = ("spike", "chatcore_every", "chatcore_max_cat", "chatcore_max_sample")
    shares = ("warmup_ratio", "warmdown_ratio", "final_lr_frac")
    problems = cli.too_small(
        cfg, (*rates, *sizes, *never, "max_seq_len"), max_seq_len=chat.SMALLEST_ROW - 1, eval_tokens=0,
        init_lr_frac=0, mmlu_epochs=0, gsm8k_epochs=0, **dict.fromkeys(sizes, 1),
        **dict.fromkeys((*rates, *never, *shares), 0),
    )  # fmt: skip
    for name in shares:
        if getattr(cfg, name) > 1:
            problems.append(f"--{name.replace('_', '-')}={getattr(cfg, name)} must lie in 0..1.")
    if cfg.spike_action not in ("skip", "rollback"):
        problems.append(f"--spike-action={cfg.spike_action} is unknown: use skip or rollback.")
    refuse(problems + resume.problems(cfg))


def settle(cfg: Config, base: checkpoint.Checkpoint, rt: runtime.Runtime) -> dict:
    """Sizes and rates of this run: the flags, and what is unset from the base model's run."""
    was, plan = base.meta["user_config"], base.meta["plan"]
    pick = lambda name, old: getattr(cfg, name) if getattr(cfg, name) != -1 else old
    sizes = {
        "seq_len": pick("max_seq_len", plan["config"]["sequence_len"]),
        "rows": pick("device_batch_size", plan["device_batch_size"]),
        "batch": pick("total_batch_size", plan["batch"]),
    }
    if sizes["rows"] == "auto":
        shape = GPTConfig(**plan["config"] | {"sequence_len": min(sizes["seq_len"], plan["config"]["sequence_len"])})
        sizes["rows"] = scaling.auto_rows(shape, rt, shard=cfg.shard)
    rates = {n: pick(n, was[n]) for n in ("embedding_lr", "unembedding_lr", "matrix_lr")}
    if sizes["seq_len"] > plan["config"]["sequence_len"]:
        raise UserError(
            f"--max-seq-len={sizes['seq_len']} is longer than the model's context, {plan['config']['sequence_len']}."
        )
    batch, rows, accum, notes = scaling.settle_batch(
        sizes["batch"], cfg.total_batch_size != -1, sizes["rows"], sizes["seq_len"], rt.world
    )
    return {"seq_len": sizes["seq_len"], "rows": rows, "batch": batch, "accum": accum, "rates": rates, "notes": notes}


def validation_bpb(model, task, tokenizer, cfg: Config, size: dict, rt: runtime.Runtime) -> float:
    """Bits per byte of what the assistant says in the validation conversations, one finite pass of --eval-tokens."""
    rows = dataloader.conversation_eval_batches(
        task, tokenizer, rows=size["rows"], seq_len=size["seq_len"], tokens=cfg.eval_tokens, rank=rt.rank,
        world=rt.world, device=rt.device,
    )  # fmt: skip
    with rows, train.resting(model):
        return loss_eval.bits_per_byte(model, rows, tokenizer.token_bytes(), rt)


def chat_core(model, tokenizer, judges: dict, cfg: Config, rt: runtime.Runtime) -> dict[str, float]:
    """Accuracy by task, and ChatCORE if all tasks of a suite are among the `judges`."""
    results = {}
    with train.resting(model):
        engine = Engine(model, tokenizer, frozen=True)
        for name, task in judges.items():
            most = cfg.chatcore_max_cat if task.eval_type == "categorical" else cfg.chatcore_max_sample
            results[name] = chat_eval.evaluate(task, engine, tokenizer, runtime=rt, max_problems=off(most), name=name)
    scores = {name: one["accuracy"] for name, one in results.items()}
    return scores | ({"chatcore": chat_eval.chat_core(results)} if suite.is_whole(results) else {})


def main(cfg: Config) -> dict:
    """Fine-tune; returns the summary that also ends the record."""
    check(cfg)
    # 1. runtime ------------------------------------------------------------------------------------------------------
    rt = runtime.start(cfg.device_type, cfg.seed, training=True)
    backend = attention.choose(rt.device, rt.dtype, cfg.attention)
    # 2. model and tokenizer ------------------------------------------------------------------------------------------
    base = checkpoint.load(nodes.find("base", cfg.model_tag or None, off(cfg.model_step), rt))
    device = shard.cradle(cfg.shard, rt)
    model, tokenizer, _ = checkpoint.build_model(base.path, device=device, dtype=rt.dtype, attend=backend.attend)
    if cfg.shard == "full":
        shard.apply(model, rt)
    size = settle(cfg, base, rt)
    root = checkpoint.folder("sft") / base.path.parent.name
    # 3. data ---------------------------------------------------------------------------------------------------------
    corpus = base.meta["dataset"]["dataset"]
    data, held_out = mixtures.sft(
        corpus, mmlu_epochs=cfg.mmlu_epochs, gsm8k_epochs=cfg.gsm8k_epochs, identity=cfg.identity
    )
    judges, left_out = suite.whole(corpus, rt) if off(cfg.chatcore_every) else ({}, [])
    # 4. optimizer ----------------------------------------------------------------------------------------------------
    lrs = scaling.learning_rates(model.config, scaling.lr_multiplier(size["batch"]), **size["rates"])
    optimizer = optim.MuonAdamW(model.roles(), {role: lr * cfg.init_lr_frac for role, lr in lrs.items()}, rt)
    at, start = resume.Progress.fresh(rt.dtype, off(cfg.spike)), 0
    found, notes = resume.point(root, cfg.resume, off(cfg.resume_from_step), rt)
    if found:
        resume.check(cfg, found, tokenizer, cfg.force, size["batch"])
        at, start = resume.restore(found, model, optimizer, rt, off(cfg.spike)), found.step
    elif cfg.load_optimizer and (moments := base.optimizer()) is not None:
        optimizer.load_state(moments)
    model.train()
    forward, how = train.fastest(model, rt, cfg.compile != "off")
    # 5. loop ---------------------------------------------------------------------------------------------------------
    metrics: dict = {}
    meta = {
        "stage": "sft", "config": base.meta["config"], "plan": base.meta["plan"] | {"sft": record.plain(size)},
        "user_config": dataclasses.asdict(cfg), "tokenizer": tokenizer.fingerprint, "dataset": base.meta["dataset"],
    }  # fmt: skip
    loader = dataloader.conversation_loader(
        data, tokenizer, rows=size["rows"], seq_len=size["seq_len"], rank=rt.rank, world=rt.world, device=rt.device,
        seed=cfg.seed, state=at.loader,
    )  # fmt: skip
    saver = saving.Saver(root, rt, saving.Keep(off(cfg.keep), off(cfg.keep_every), cfg.keep_best), at.scores)
    log = record.Record(root / "record.jsonl", run=cfg.run, stage="sft", config=cfg, main=rt.main,
                        resume_step=start if found else None, wandb_id=at.wandb)  # fmt: skip
    log.event("plan", plan={**size, "lrs": lrs, "conversations": len(data), "from": base.path.name, "compile": how})
    log.say(f"fine-tuning {base.path}: {len(data):,} conversations, {size['batch']:,} tokens an update, {how}")
    for note in (*size["notes"], *left_out, *notes, *resume.make_way(root, found, cfg.resume, rt)):
        log.say(f"note: {note}")
    watched = watch.Watch(log, rt, off(cfg.watchdog))
    traced = profiling.Profile(log, rt, cfg.profile)
    with (log, live.View(log), contextlib.closing(loader), saver, watched, traced, train.StopSignal(rt) as stop,
          train.calm_gc() as calm):  # fmt: skip
        step, here, position = start, start if found else -1, at.loader  # `here`: the step already saved
        while True:
            done = progress(cfg, step, position, len(data))
            last, signum = done >= 1, stop.agreed(rt)
            if (signum or last or train.due(step, off(cfg.save_every))) and step != here:
                state = {"loader": position, "rng": train.rng_state()}
                saver.save(step, model=model, optimizer=optimizer, rank_state=state, meta=meta | at.meta(log),
                           wait=bool(last or signum))  # fmt: skip
            log.saves(saver.news())
            if signum:
                log.stop(step, signum)
            if cfg.eval_tokens and (last or train.due(step, off(cfg.eval_every), first=True)):
                metrics["val_bpb"] = validation_bpb(model, held_out, tokenizer, cfg, size, rt)
                saver.score(step, metrics["val_bpb"])
                log.eval(step, f"step {step:5d} | validation bpb {metrics['val_bpb']:.4f}", val_bpb=metrics["val_bpb"])
            if train.due(step, off(cfg.chatcore_every), last):
                metrics |= (scores := chat_core(model, tokenizer, judges, cfg, rt))
                shown = {"ChatCORE": scores["chatcore"]} if "chatcore" in scores else scores
                said = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
                log.eval(step, f"step {step:5d} | {said}", **scores)
            if last:
                break
            began = time.perf_counter()
            watched.begin(step)
            batches = [next(loader) for _ in range(size["accum"])]
            weight = train.per_token([b.targets for b in batches], rt)
            for batch in batches:
                total = forward(batch.inputs, batch.targets, reduction="sum")
                optimizer.backward(total * (weight * at.scaler.scale), last=batch is batches[-1])
                count = int((batch.targets >= 0).sum())
                at.meter.add(total / max(count, 1), count)
            position = batches[-1].state
            loss = at.meter.mean(rt)
            lr_mult = schedule.sft_lr(done, cfg.warmup_ratio, cfg.warmdown_ratio, cfg.final_lr_frac)
            norm = train.optimizer_step(
                optimizer, at.scaler, loss, step=step, spikes=at.spikes, suspect=(model, batches[-1].inputs),
                position=f"conversation {position['consumed']:,} of epoch {position['epoch']}", lr_mult=lr_mult,
                momentum=schedule.sft_momentum(step, off(cfg.num_iterations)),
            )  # fmt: skip
            rt.synchronize()
            seconds = time.perf_counter() - began
            watched.end()
            traced.step(step)
            at.meter.tick(loss, size["batch"], seconds)
            console = (
                f"step {step:5d} ({100 * done:3.0f} %) | loss {at.meter.loss:.4f} | lr x {lr_mult:.2f} | "
                f"{1000 * seconds:6.0f} ms | {at.meter.seconds / 60:.1f} min"
            )
            log.step(step, console, loss=loss, smooth_loss=at.meter.loss, lr=lr_mult, grad_norm=norm, seconds=seconds,
                     memory=rt.bytes_now(), done=progress(cfg, step + 1, position, len(data)),
                     tokens_per_second=size["batch"] / seconds, targets=round(rt.world / weight),
                     epoch=batches[-1].note.epoch)  # fmt: skip
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
    summary = at.summary(step, saver, rt) | metrics | {"loss": at.meter.loss}
    log.close(**summary)
    runtime.stop(rt)
    return summary


def progress(cfg: Config, step: int, position: dict | None, size: int) -> float:
    """The share of the run that is done: of --num-iterations updates, or of one epoch of `size` conversations."""
    if cfg.num_iterations != -1:
        return step / max(cfg.num_iterations, 1)
    return position["consumed"] / size if position else 0.0


if __name__ == "__main__":
    cli.run(main, Config)
