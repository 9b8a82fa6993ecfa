"""Does an export compute what we compute? The largest difference of a logit, in fp32, over random rows."""

from pathlib import Path
from typing import Any

import torch

from nanochat.errors import UserError
from nanochat.gpt import GPT

TOLERANCE = 1e-4  # of a logit; logits are at most 15


def difference(kind: str, path: Path | str, model: GPT, random: torch.Generator) -> float:
    """Run the export at `path` (kind: hf, onnx, torch or gguf) beside `model`; more than TOLERANCE is a UserError."""
    c = model.config
    length = min(c.sequence_len, 128)
    ids = torch.randint(c.vocab_size, (2, length), generator=random)
    with torch.no_grad():
        ours = model(ids)
        theirs = {"hf": _hf, "onnx": _onnx, "torch": _torch, "gguf": _gguf}[kind](Path(path), ids, model)
    found = float((ours - theirs).abs().max())
    if not found <= TOLERANCE:
        raise UserError(f"{path} computes other logits than ours (off by {found:.3g}): do not use it; this is a fault.")
    return found


def _hf(path: Path, ids: torch.Tensor, model: GPT) -> torch.Tensor:
    return load_hf(path)(input_ids=ids).logits


def load_hf(path: Path) -> Any:
    """The folder's model as transformers loads it."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UserError("The check needs transformers: install nanochat[export], or give --no-check.") from error
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()


def _onnx(path: Path, ids: torch.Tensor, model: GPT) -> torch.Tensor:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("The check needs onnxruntime: install nanochat[export], or give --no-check.") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0])


def _torch(path: Path, ids: torch.Tensor, model: GPT) -> torch.Tensor:
    return torch.export.load(path).module()(ids)


def _gguf(path: Path, ids: torch.Tensor, model: GPT) -> torch.Tensor:
    """No program runs the file, so its tensors are read back into our model."""
    import gguf

    twin = GPT(model.config)
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(path).tensors}
    twin.load_state_dict({name: tensors[name].view(p.shape) for name, p in twin.state_dict().items()})
    return twin.eval()(ids)
