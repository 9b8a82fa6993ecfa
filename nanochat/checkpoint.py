"""Checkpoints: one directory a step that is either complete or absent; find, verify, load.

    base_dir()/{base,chatsft,chatrl}_checkpoints/<tag>/step_000300/
        model.safetensors   weights, fp32, state-dict names; its metadata names stage, step and tokenizer
        optim.safetensors   whole optimizer moments by parameter name: they fit any world size
        meta.json           stage, step, configs, plan, tokenizer and dataset identity, meter, scaler, metrics
        rank_0.json ...     what each rank alone knows: loader position, random state
        manifest.json       size and sha256 of every other file; written last

nanochat/saving.py writes and fsyncs all of it under `.tmp-step_000300`, which is then renamed; a directory without a
manifest does not count. No pickle: tensors are safetensors, all else is strict JSON.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from nanochat import paths, shard
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig

if TYPE_CHECKING:
    from nanochat.tokenizer import Tokenizer

FORMAT = 1
FOLDERS = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}
MADE_BY = {"base": "scripts.base_train", "sft": "scripts.chat_sft", "rl": "scripts.chat_rl"}
STEP = re.compile(r"step_(\d{6,})")
OLD = re.compile(r"(model|optim|meta)_\d+.*\.(pt|json)")


def folder(source: str) -> Path:
    """Where the checkpoints of a stage live: source is base, sft or rl."""
    if source not in FOLDERS:
        raise UserError(f"Source {source!r} is unknown: use one of {', '.join(FOLDERS)}.")
    return paths.base_dir() / FOLDERS[source]


def run_folder(source: str, tag: str) -> Path:
    """Where the checkpoints of one run live. UserError: the tag is not a plain name, so it could mean any place."""
    if not tag or Path(tag).name != tag or tag == "..":
        raise UserError(f"--model-tag={tag} is not a plain name: leave out slashes (NANOCHAT_BASE_DIR says where).")
    return folder(source) / tag


# --- finding ------------------------------------------------------------------------------------------------------


def complete_steps(root: Path) -> list[int]:
    """The steps under `root` that have a manifest, ascending; compared as numbers, not as names."""
    if not root.is_dir():
        return []
    found = [(STEP.fullmatch(p.name), p) for p in root.iterdir()]
    return sorted(int(m[1]) for m, p in found if m and (p / "manifest.json").is_file())


def leftovers(root: Path) -> list[str]:
    """A sentence for each half checkpoint under `root`: it is ignored, and replaced or removed by hand."""
    if not root.is_dir():
        return []
    half = [p for p in sorted(root.iterdir()) if p.name.startswith((".tmp-step_", ".old-step_"))]
    half += [p for p in sorted(root.iterdir()) if STEP.fullmatch(p.name) and not (p / "manifest.json").is_file()]
    return [f"{p} is half a checkpoint (the save was interrupted): ignored, it can be removed." for p in half]


def tags(source: str) -> list[str]:
    """Tags of a stage that hold at least one complete step or an old layout."""
    root = folder(source)
    if not root.is_dir():
        return []
    return sorted(p.name for p in root.iterdir() if p.is_dir() and (complete_steps(p) or is_old(p)))


def guess_tag(source: str) -> str:
    """The tag meant when none is given: the largest d<number>, else the most recently modified."""
    names = tags(source)
    if not names:
        raise UserError(
            f"No {source} checkpoint in {folder(source)}: make one first with `python -m {MADE_BY[source]}`."
        )
    depths = [(int(m[1]), name) for name in names if (m := re.match(r"d(\d+)", name))]
    return max(depths)[1] if depths else max(names, key=lambda n: (folder(source) / n).stat().st_mtime)


def find(source: str, tag: str | None = None, step: int | None = None) -> Path:
    """The directory of a complete step: of this tag or the guessed one, this step or the newest."""
    tag = tag or guess_tag(source)
    root = run_folder(source, tag)
    steps = complete_steps(root)
    if not steps and is_old(root):
        raise UserError(
            f"{root} holds checkpoints of the older nanochat layout (model_<step>.pt, pickled), which this version "
            f"does not read: convert them with `python -m scripts.checkpoints convert --path={root} -i {source} "
            f"--model-tag=NEW`, or train again with `python -m {MADE_BY[source]}`."
        )
    if not root.is_dir():
        raise UserError(f"No {source} checkpoint has the tag {tag!r}: there is {_list(tags(source))}.")
    if not steps:
        raise UserError(f"{root} holds no complete checkpoint: train again with `python -m {MADE_BY[source]}`.")
    if step is not None and step not in steps:
        raise UserError(f"{root} has no complete step {step}: there is {_list(steps)}.")
    return root / f"step_{steps[-1] if step is None else step:06d}"


def newest_good(root: Path) -> tuple[Path | None, list[str]]:
    """Where `--resume` goes on: the newest step that passes `verify`, and a sentence for each thing passed over."""
    notes = leftovers(root)
    for step in reversed(complete_steps(root)):
        path = root / f"step_{step:06d}"
        try:
            load(path).verify()
            return path, notes
        except UserError as error:
            notes.append(f"{error} Passed over; an older checkpoint is tried.")
    return None, notes


def is_old(root: Path) -> bool:
    """Does a folder hold files of the published layout?"""
    return root.is_dir() and any(OLD.fullmatch(p.name) for p in root.iterdir())


def _list(things: list) -> str:
    return ", ".join(map(str, things)) if things else "none"


# --- reading ------------------------------------------------------------------------------------------------------


def digest(files: dict[str, dict]) -> str:
    """The checksum of a manifest's list of files, by which a change of the manifest itself is found."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def load(path: Path | str) -> "Checkpoint":
    """Open a checkpoint directory; its manifest and meta.json are checked now, each other file when it is read."""
    path = Path(path)
    if not (path / "manifest.json").is_file():
        raise UserError(f"{path} is not a complete checkpoint (it has no manifest.json): choose another step.")
    manifest = paths.read_json(path / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise UserError(f"{path / 'manifest.json'} has format {found}, this version reads {FORMAT}: update nanochat.")
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.get("sha256") != digest(files):
        raise UserError(f"{path / 'manifest.json'} is damaged: remove {path} and use an older step.")
    checkpoint = Checkpoint(path, files)
    checkpoint.meta = paths.read_json(checkpoint.checked("meta.json"))
    return checkpoint


@dataclasses.dataclass
class Checkpoint:
    """A complete checkpoint on disk. Every file is compared with the manifest before it is used."""

    path: Path
    files: dict[str, dict]
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    good: set[str] = dataclasses.field(default_factory=set, repr=False)

    @property
    def step(self) -> int:
        return self.meta["step"]

    @property
    def world(self) -> int:
        """How many ranks wrote it."""
        return self.meta["world"]

    def checked(self, name: str) -> Path:
        """The path of a file whose size and sha256 are those of the manifest; a UserError names a damaged one."""
        path = self.path / name
        if name not in self.good:
            problem = self._problem(name, path)
            if problem:
                raise UserError(f"{path} {problem}: remove {self.path} and use an older step, or restore the file.")
            self.good.add(name)
        return path

    def _problem(self, name: str, path: Path) -> str | None:
        wanted = self.files.get(name)
        if wanted is None:
            return "is not listed in the checkpoint's manifest"
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != wanted["bytes"]:
            return f"is damaged ({path.stat().st_size} bytes instead of {wanted['bytes']})"
        return None if paths.sha256(path) == wanted["sha256"] else "is damaged (its checksum differs)"

    def verify(self) -> None:
        """Check every file; a UserError names the first that is damaged."""
        for name in self.files:
            self.checked(name)

    def weights(self, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """The state dict."""
        with safe_open(self.checked("model.safetensors"), framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}

    def optimizer(self) -> "Tensors | None":
        """The optimizer's whole state, each tensor read when asked for; None if it was not saved."""
        return Tensors(self.checked("optim.safetensors")) if "optim.safetensors" in self.files else None

    def rank_state(self, rank: int) -> dict[str, Any]:
        """What one rank alone knew."""
        if f"rank_{rank}.json" not in self.files:
            raise UserError(f"{self.path} was written by {self.world} ranks, it has no state of rank {rank}.")
        return paths.read_json(self.checked(f"rank_{rank}.json"))

    def rank_states(self) -> list[dict[str, Any]]:
        """What each rank knew, in rank order: what a run of another world size is rebuilt from."""
        return [self.rank_state(rank) for rank in range(self.world)]


class Tensors(Mapping):
    """The tensors of a safetensors file as a mapping that reads one when it is asked for one."""

    def __init__(self, path: Path):
        self.file = safe_open(path, framework="pt", device="cpu")
        self.names = list(self.file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.file.get_tensor(name)

    def __iter__(self):
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


# --- building -----------------------------------------------------------------------------------------------------


def restore(model: GPT, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Copy weights into a model of the same config; a difference in names or shapes is a UserError."""
    own = model.state_dict()
    wrong = [n for n in own if n not in weights] + [n for n in weights if n not in own]
    wrong += [n for n in own if n in weights and own[n].shape != weights[n].shape]
    if wrong:
        raise UserError(
            f"{path} does not fit this model ({len(wrong)} tensors differ, {wrong[0]} first): other version?"
        )
    if shard.sharded(model):
        shard.put(model, weights)
    else:
        model.load_state_dict(dict(weights))


def build_model(
    source: str | Path, tag: str | None = None, step: int | None = None, *, device="cpu",
    dtype: torch.dtype = torch.float32, attend=None,
) -> tuple[GPT, "Tokenizer", dict[str, Any]]:  # fmt: skip
    """Load a trained model and the tokenizer it belongs to: (model in eval mode, tokenizer, meta).

    `source` is base, sft or rl, or the path of a checkpoint directory.
    """
    from nanochat.tokenizer import Tokenizer

    checkpoint = load(source if isinstance(source, Path) else find(source, tag, step))
    tokenizer = Tokenizer.load()
    check_tokenizer(checkpoint, tokenizer)
    with torch.device(device):  # not "meta" and to_empty(): that imports seconds' worth of torch
        model = GPT(GPTConfig(**checkpoint.meta["config"]), attend=attend)
    restore(model, checkpoint.weights(device), checkpoint.path)
    model.compute_dtype = dtype
    return model.eval(), tokenizer, checkpoint.meta


def check_tokenizer(checkpoint: Checkpoint, tokenizer) -> None:
    """Refuse a tokenizer that the checkpoint was not trained with."""
    own = checkpoint.meta.get("tokenizer")
    if own != tokenizer.fingerprint:
        from nanochat.tokenizer import kept_path, tokenizer_path

        kept = kept_path(str(own))
        restore = f"copy {kept} to {tokenizer_path().name} there" if kept.exists() else "restore that tokenizer"
        raise UserError(
            f"{checkpoint.path} was trained with another tokenizer than the one in {paths.base_dir() / 'tokenizer'}: "
            f"{restore}, or train the model again with this one."
        )
