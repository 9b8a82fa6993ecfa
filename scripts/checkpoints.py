"""Look after checkpoints: list them, verify their bytes, repair a folder, set one aside, convert the older layout.

    python -m scripts.checkpoints list
    python -m scripts.checkpoints verify -i base --model-tag=d12        # exit status 1 if one is damaged
    python -m scripts.checkpoints repair                                # half ones removed, damaged ones set aside
    python -m scripts.checkpoints quarantine -i base --model-tag=d12 --step=300
    python -m scripts.checkpoints convert --path=old/d20 -i base --model-tag=d20

Nothing complete is ever deleted: what `repair` and `quarantine` take away lies in <tag>/quarantine/. `convert` reads
model_<step>.pt and meta_<step>.json as the published code writes them (torch.load with weights_only=True, no other
pickle) and writes weights without optimizer: they can be used and fine-tuned, not resumed. The tokenizer in the
artefact folder must be the one they were trained with.
"""

import dataclasses
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from nanochat import checkpoint, cli, paths, saving
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer

PUBLISHED_RATES = {"embedding_lr": 0.3, "unembedding_lr": 0.004, "matrix_lr": 0.02}  # where a meta file has none
YOUNG = 600.0  # seconds since its last change in which a half checkpoint may be one that is being written


@dataclasses.dataclass(frozen=True)
class Config:
    action: Annotated[str, tyro.conf.Positional] = "list"  # list, verify, repair, quarantine or convert
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = ""  # base, sft or rl; empty: all
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""  # which run; empty: all
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1  # which step; -1: all, for convert the newest
    path: str = ""  # convert: the folder with model_<step>.pt
    force: bool = False  # repair: also half checkpoints so young that a run may still be writing them


def main(cfg: Config) -> dict:
    """Do what is asked; returns {"rows": ...}. UserError: something is damaged, or the request makes no sense."""
    actions = {"list": show, "verify": verify, "repair": repair, "quarantine": quarantine, "convert": convert}
    if cfg.action not in actions:
        raise UserError(f"{cfg.action!r} is unknown: use {', '.join(actions)}.")
    return {"rows": actions[cfg.action](cfg)}


def roots(cfg: Config) -> Iterator[tuple[str, Path]]:
    """(stage, folder) of every run that is meant."""
    found = False
    for source in [cfg.source] if cfg.source else checkpoint.FOLDERS:
        top = checkpoint.folder(source)
        for root in sorted(p for p in top.iterdir() if p.is_dir()) if top.is_dir() else []:
            if cfg.model_tag in ("", root.name):
                found = True
                yield source, root
    if not found:
        raise UserError(f"There is no such run in {paths.base_dir()}: `python -m scripts.checkpoints list` shows all.")


def steps(cfg: Config, root: Path) -> list[Path]:
    """The complete checkpoints of a run that are meant."""
    there = checkpoint.complete_steps(root)
    return [root / f"step_{step:06d}" for step in there if cfg.step in (-1, step)]


def damage(path: Path) -> str:
    """The sentence about what is wrong with a complete checkpoint; empty: every byte is as it was written."""
    try:
        checkpoint.load(path).verify()
    except UserError as error:
        return str(error)
    return ""


# --- the five actions -------------------------------------------------------------------------------------------------


def show(cfg: Config) -> list[dict]:
    """List what there is; bytes are counted, not read."""
    rows = []
    for source, root in roots(cfg):
        for path in steps(cfg, root):
            rows.append({"source": source, "tag": root.name, "step": int(path.name[5:]), **glance(path)})
        rows += [{"source": source, "tag": root.name, "note": note} for note in checkpoint.leftovers(root)]
        rows += [{"source": source, "tag": root.name, "note": f"{p} is set aside."} for p in aside(root)]
        if checkpoint.is_old(root):
            rows.append({"source": source, "tag": root.name, "note": f"{root} has the older layout: convert it."})
    for row in rows:
        if "note" in row:
            print(f"note: {row['note']}")
        else:
            print(f"{row['source']:<5}{row['tag']:<16} step {row['step']:>7,}  {row['bytes'] / 1e6:>10,.1f} MB  "
                  f"{row['world']} rank(s)  {row['written']}  {row['for']}")  # fmt: skip
    return rows


def glance(path: Path) -> dict[str, Any]:
    """What can be said of a checkpoint without reading its tensors."""
    try:
        found = checkpoint.load(path)
    except UserError as error:
        return {"bytes": 0, "world": 0, "written": "", "for": f"damaged: {error}"}
    resumable = "optim.safetensors" in found.files
    return {"bytes": sum(entry["bytes"] for entry in found.files.values()), "world": found.world,
            "written": time.strftime("%Y-%m-%d %H:%M", time.localtime((path / "manifest.json").stat().st_mtime)),
            "for": "resuming" if resumable else "use only (no optimizer)"}  # fmt: skip


def aside(root: Path) -> list[Path]:
    """Folders of checkpoints that no longer count: earlier runs, later steps, damaged ones."""
    return sorted(p for p in root.iterdir() if p.is_dir() and re.fullmatch(r"before_\d+|quarantine", p.name))


def verify(cfg: Config) -> list[dict]:
    """Compare every byte with the manifests."""
    rows = [{"path": str(path), "damage": damage(path)} for _, root in roots(cfg) for path in steps(cfg, root)]
    for row in rows:
        print(row["damage"] or f"{row['path']} is good")
    bad = [row for row in rows if row["damage"]]
    if bad:
        raise UserError(f"{len(bad)} of {len(rows)} checkpoints are damaged: `repair` sets them aside.")
    return rows


def repair(cfg: Config) -> list[dict]:
    """Leave only checkpoints that are whole: put back what a save had moved, remove halves, set damaged ones aside."""
    rows = []
    for _, root in roots(cfg):
        for old in sorted(root.glob(".old-step_*")):
            final = root / old.name.removeprefix(".old-")
            if not (final / "manifest.json").is_file() and not damage(old):
                shutil.rmtree(final, ignore_errors=True)
                os.replace(old, final)
                rows.append({"path": str(final), "done": "put back: a save had moved it and did not finish"})
        rows += [remove(path, cfg.force) for path in halves(root)]
        for path in steps(cfg, root):
            if sentence := damage(path):
                rows.append({"path": str(set_aside(path)), "done": f"set aside: {sentence}"})
    for row in rows:
        print(f"{row['path']}: {row['done']}")
    print(f"{len(rows)} things were done" if rows else "nothing to repair")
    return rows


def halves(root: Path) -> list[Path]:
    """What an interrupted save or removal has left."""
    left = [p for p in sorted(root.iterdir()) if p.name.startswith((".tmp-step_", ".old-step_"))]
    return left + [
        p for p in sorted(root.iterdir()) if checkpoint.STEP.fullmatch(p.name) and not (p / "manifest.json").is_file()
    ]


def remove(path: Path, force: bool) -> dict:
    """Remove a half checkpoint, unless a run may still be writing it."""
    newest = max(p.stat().st_mtime for p in (path, *path.iterdir()))
    if not force and time.time() - newest < YOUNG:
        return {"path": str(path), "done": f"left: it changed {time.time() - newest:.0f} s ago (--force removes it)"}
    shutil.rmtree(path)
    return {"path": str(path), "done": "removed: half a checkpoint"}


def quarantine(cfg: Config) -> list[dict]:
    """Set one step aside by hand."""
    if not (cfg.source and cfg.model_tag and cfg.step >= 0):
        raise UserError("quarantine needs --source, --model-tag and --step: which checkpoint is meant?")
    path = checkpoint.find(cfg.source, cfg.model_tag, cfg.step)
    target = set_aside(path)
    print(f"{path} is now {target}")
    return [{"path": str(target), "done": "set aside"}]


def set_aside(path: Path) -> Path:
    """Move a checkpoint into its run's quarantine, under a name that is free -> where it is."""
    place = path.parent / "quarantine"
    place.mkdir(exist_ok=True)
    target = place / path.name
    for number in range(1, sys.maxsize):
        if not target.exists():
            break
        target = place / f"{path.name}_{number}"
    os.replace(path, target)
    return target


# --- the older layout -------------------------------------------------------------------------------------------------


def convert(cfg: Config) -> list[dict]:
    """Write the weights of a published checkpoint as a checkpoint of ours."""
    if not (cfg.path and cfg.source and cfg.model_tag):
        raise UserError("convert needs --path (the old folder), --source and --model-tag (where to write it).")
    folder = Path(cfg.path).expanduser()
    found = {int(m[1]): p for p in folder.glob("model_*.pt") if (m := re.fullmatch(r"model_(\d+)\.pt", p.name))}
    if not found or cfg.step not in (-1, *found):
        raise UserError(f"{folder} holds no model_<step>.pt of that step: there is {sorted(found) or 'none'}.")
    step = max(found) if cfg.step == -1 else cfg.step
    meta = paths.read_json(folder / f"meta_{step:06d}.json")
    model, tokenizer = published_model(found[step], meta), Tokenizer.load()
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{found[step]} has {model.config.vocab_size} tokens and the tokenizer in {paths.base_dir()} has "
            f"{tokenizer.vocab_size}: put the tokenizer there that it was trained with."
        )
    root = checkpoint.run_folder(cfg.source, cfg.model_tag)
    if step in checkpoint.complete_steps(root):
        raise UserError(f"{root} already has a step {step}: choose another --model-tag.")
    about = {"stage": cfg.source, "config": dataclasses.asdict(model.config), "tokenizer": tokenizer.fingerprint,
             "converted_from": str(found[step]), "published": meta, **inheritance(meta, model, tokenizer)}  # fmt: skip
    path = saving.save(root, step, model=model, meta=about, runtime=Runtime.single())
    print(f"{found[step]} is now {path}")
    return [{"path": str(path), "done": "converted"}]


def inheritance(meta: dict, model: GPT, tokenizer: Tokenizer) -> dict[str, Any]:
    """What later stages inherit from a checkpoint's meta; what a published one does not say is as its code had it."""
    flags = meta.get("user_config") or {}
    batch = meta.get("total_batch_size") or flags.get("total_batch_size") or -1
    return {
        "user_config": {name: flags.get(name, usual) for name, usual in PUBLISHED_RATES.items()},
        "plan": {"config": dataclasses.asdict(model.config), "batch": batch if batch > 0 else 524_288,
                 "device_batch_size": meta.get("device_batch_size") or 32},
        "dataset": tokenizer.meta.get("dataset") or {"dataset": "climbmix", "val_shard": None},
    }  # fmt: skip


def published_model(path: Path, meta: dict) -> GPT:
    """The model of a published state dict; what older ones lack is filled in as that code did."""
    config = {"window_pattern": "L", **(meta.get("model_config") or {})}
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    if missing := [name for name in known if name not in config] + [name for name in config if name not in known]:
        raise UserError(f"The meta file beside {path} does not describe a model of ours ({', '.join(missing)}).")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(f"{path} can't be read as weights ({str(error).splitlines()[0]}): it is not used.") from error
    state = {name.removeprefix("_orig_mod."): t.float() for name, t in state.items()}
    state.setdefault("resid_lambdas", torch.ones(config["n_layer"]))
    state.setdefault("x0_lambdas", torch.zeros(config["n_layer"]))
    model = GPT(GPTConfig(**config))
    checkpoint.restore(model, state, path)
    return model


if __name__ == "__main__":
    cli.run(main, Config)
