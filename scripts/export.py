"""Carry a trained model to other programs (Hugging Face, ONNX, torch.export, GGUF), or an exported one back.

    python -m scripts.export -i sft                       # a folder that transformers loads
    python -m scripts.export -i sft --format=onnx         # also: torch, gguf
    python -m scripts.export -i sft --push=USER/NAME      # to the hub, private; needs HF_TOKEN
    python -m scripts.export --import-from=FOLDER --model-tag=NAME

The folder holds the weights, the tokenizer with the same ids, the chat template, the modelling file and a model card
written from the run's record. --check compares every logit with our own forward before it is called done.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import tyro

from nanochat import checkpoint, cli, paths, report
from nanochat.errors import UserError, refuse
from nanochat.export import formats, gguf_file, hub, parity


@dataclasses.dataclass(frozen=True)
class Config:
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "sft"  # which stage's model: base, sft or rl
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""  # its name; empty: the deepest
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1  # -1: the newest
    format: str = "hf"  # hf (a folder), onnx, torch or gguf (a file)
    output: str = ""  # folder or file; empty: the artefact folder's exports/<tag>_<stage>[.onnx|.pt2|.gguf]
    check: bool = True  # compare its logits with ours (hf needs transformers, onnx needs onnxruntime)
    push: str = ""  # USER/NAME on the hub; needs HF_TOKEN
    public: bool = False  # of --push: everyone may read it
    import_from: str = ""  # folder written by --format=hf: make it a checkpoint of this artefact folder


def check(cfg: Config) -> None:
    """Refuse what makes no sense together."""
    problems = []
    if cfg.format not in formats.ENDINGS:
        problems.append(f"--format={cfg.format} is unknown: use one of {', '.join(formats.ENDINGS)}.")
    if cfg.push and cfg.format != "hf":
        problems.append("--push sends a Hugging Face folder: leave --format at hf.")
    refuse(problems)


def records(tag: str) -> dict[str, list[dict]]:
    """The run's records, as far as there are any."""
    try:
        return report.collect(paths.base_dir(), tag)
    except UserError:
        return {}


def main(cfg: Config) -> dict:
    """Export (or import); returns {"path": ..., "difference": largest difference of logits, or None}."""
    check(cfg)
    if cfg.import_from:
        path = hub.read(cfg.import_from, tag=cfg.model_tag or None)
        print(f"imported {cfg.import_from} as {path}")
        return {"path": str(path), "difference": None}
    source = checkpoint.load(checkpoint.find(cfg.source, cfg.model_tag or None, cfg.step if cfg.step >= 0 else None))
    name = f"{source.path.parent.name}_{cfg.source}"
    file = name + formats.ENDINGS[cfg.format]
    target = Path(cfg.output) if cfg.output else paths.base_dir() / "exports" / file
    path = formats.write(cfg.format, target, source, name, records(source.path.parent.name))
    print(f"wrote {path}")
    if cfg.format == "gguf":
        print(f"note: {gguf_file.sentence()}")
    difference = None
    if cfg.check:
        model, _, _ = checkpoint.build_model(source.path)
        difference = parity.difference(cfg.format, path, model, torch.Generator().manual_seed(0))
        print(f"largest difference of a logit from our forward: {difference:.2e}")
    if cfg.push:
        print(f"pushed to {hub.push(path, cfg.push, private=not cfg.public)}")
    return {"path": str(path), "difference": difference}


if __name__ == "__main__":
    cli.run(main, Config)
