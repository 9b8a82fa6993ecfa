"""Every export by its name: how it is written, and the ending of its file."""

from pathlib import Path

from nanochat import checkpoint, paths
from nanochat.errors import UserError
from nanochat.export import card, gguf_file, graph, hub
from nanochat.gpt import GPTConfig

MARGIN = 8 * 2**20  # bytes of tokenizer, graph and texts beside the weights

ENDINGS = {"hf": "", "onnx": ".onnx", "torch": ".pt2", "gguf": ".gguf"}


def write(kind: str, target: Path, source: checkpoint.Checkpoint, name: str, found: dict[str, list[dict]]) -> Path:
    """Write a checkpoint to `target` as hf (a folder), onnx, torch or gguf (a file); returns where.

    name: for people. found: the run's records (report.collect), for the model card; may be empty.
    """
    if kind not in ENDINGS:
        raise UserError(f"The format {kind} is unknown: use one of {', '.join(ENDINGS)}.")
    _check_room(target, source)
    model, tokenizer, meta = checkpoint.build_model(source.path)
    if kind == "hf":
        return hub.write(target, source, tokenizer, card.card(name, meta, found))
    if kind == "gguf":
        return gguf_file.write(target, source.weights(), GPTConfig(**meta["config"]), tokenizer, name)
    return (graph.write_onnx if kind == "onnx" else graph.write_torch)(target, model)


def _check_room(target: Path, source: checkpoint.Checkpoint) -> None:
    """UserError before anything is written, where the weights would not fit the disk."""
    there = next(folder for folder in target.absolute().parents if folder.is_dir())
    need, free = source.files["model.safetensors"]["bytes"] + MARGIN, paths.free_bytes(there)
    if free < need:
        raise UserError(
            f"The export to {target} takes about {need / 1e6:,.0f} MB and its disk has {free / 1e6:,.0f} MB free: "
            "free some space, or name a place on another disk with --output."
        )
