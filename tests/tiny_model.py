"""A byte tokenizer and a small random GPT with every feature alive (smear, value embeddings, windows, few kv heads)."""

import torch

from nanochat.gpt import GPT, GPTConfig
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
