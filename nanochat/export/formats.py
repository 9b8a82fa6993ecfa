"""Every export by its name: how it is written, and the ending of its file."""

from pathlib import Path

from nanochat import checkpoint
from nanochat.errors import UserError
from nanochat.export import card, gguf_file, graph, hub
from nanochat.gpt import GPTConfig

ENDINGS = {"hf": "", "onnx": ".onnx", "torch": ".pt2", "gguf": ".gguf"}


def write(kind: str, target: Path, source: checkpoint.Checkpoint, name: str, found: dict[str, list[dict]]) -> Path:
    """Write a checkpoint to `target` as hf (a folder), onnx, torch or gguf (a file); returns where.

    name: for people. found: the run's records (report.collect), for the model card; may be empty.
    """
    if kind not in ENDINGS:
        raise UserError(f"The format {kind} is unknown: use one of {', '.join(ENDINGS)}.")
    model, tokenizer, meta = checkpoint.build_model(source.path)
    if kind == "hf":
        return hub.write(target, source, tokenizer, card.card(name, meta, found))
    if kind == "gguf":
        return gguf_file.write(target, source.weights(), GPTConfig(**meta["config"]), tokenizer, name)
    return (graph.write_onnx if kind == "onnx" else graph.write_torch)(target, model)
