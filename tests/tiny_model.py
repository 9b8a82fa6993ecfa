"""A byte tokenizer and a small random GPT with every feature alive (smear, value embeddings, windows, few kv heads)."""

import dataclasses

import torch

from nanochat import checkpoint
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_ranks([bytes([i]) for i in range(256)])


def tiny_gpt(seed=0, **changes):
    """A model whose next token depends on all it has seen: no parameter is left at a zero that would hide a fault."""
    shape = {"sequence_len": 64, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "window_pattern": "7,20,L"}
    model = GPT(GPTConfig(**{"vocab_size": TOKENIZER.vocab_size, **shape, **changes}))
    model.init_weights(seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "wte" not in name:
                p.normal_(0, 0.2, generator=random)
        model.smear_lambda.fill_(0.7)
    return model.eval()


def save_checkpoint(source="sft", tag="d3", step=5, **changes):
    """Write TOKENIZER and a tiny_gpt as a complete checkpoint into the artefact folder; returns the model."""
    model = tiny_gpt(**changes)
    TOKENIZER.save()
    meta = {"stage": source, "config": dataclasses.asdict(model.config), "tokenizer": TOKENIZER.fingerprint}
    checkpoint.save(checkpoint.folder(source) / tag, step, model=model, meta=meta, runtime=Runtime.single())
    return model
