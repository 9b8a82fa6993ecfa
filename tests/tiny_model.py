"""A byte tokenizer and a small random GPT with every feature alive (smear, value embeddings, windows, few kv heads)."""

import dataclasses
import time

import torch

from nanochat import checkpoint, saving
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


def save_checkpoint(source="sft", tag="d3", step=5, more=None, **changes):
    """Write TOKENIZER and a tiny_gpt as a complete checkpoint into the artefact folder; returns the model.

    `more` goes into its meta.
    """
    model = tiny_gpt(**changes)
    TOKENIZER.save()
    meta = {"stage": source, "config": dataclasses.asdict(model.config), "tokenizer": TOKENIZER.fingerprint}
    meta |= more or {}
    saving.save(checkpoint.folder(source) / tag, step, model=model, meta=meta, runtime=Runtime.single())
    return model


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes how many entries each tensor has that is made inside."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        self.sizes += [z.numel() for z in (y if isinstance(y, tuple | list) else [y]) if torch.is_tensor(z)]
        return y


class Scripted(torch.nn.Module):
    """A stand-in for a model that always continues with the script, whatever it reads: script[i] follows i tokens."""

    def __init__(self, script):
        super().__init__()
        self.config, self.attend = tiny_gpt().config, None
        self.lm_head = torch.nn.Linear(1, 1)
        self.script, self.rows = script, []

    def forward(self, batch, attention, wanted=None):
        self.rows.append(len(batch.ids))
        wanted = range(len(batch.ids)) if wanted is None else wanted
        logits = torch.full((len(wanted), self.config.vocab_size), -20.0)
        for row, i in enumerate(wanted):
            logits[row, self.script[min(batch.positions[i] + 1, len(self.script) - 1)]] = 20.0
        return logits


def ids_of(text):
    """Text with tool tokens written «» (python), ‹› (output) and . (assistant_end) to ids."""
    names = {"«": "python_start", "»": "python_end", "‹": "output_start", "›": "output_end", ".": "assistant_end"}
    return [TOKENIZER.special(f"<|{names[c]}|>") if c in names else ord(c) for c in text]


class Chain(torch.nn.Module):
    """A stand-in for a model whose next token follows from the last one alone, so that many rows can be told apart.

    After assistant_start it says `text` (or ids), whose tokens must all differ; after its last one the first again,
    unless that is "." (assistant_end). `seconds` of pause a forward; `steps` counts them.
    """

    def __init__(self, text, seconds=0.0, **sizes):
        super().__init__()
        ids = ids_of(text) if isinstance(text, str) else text
        assert len(set(ids)) == len(ids)
        self.config, self.attend = tiny_gpt(**{"sequence_len": 400, **sizes}).config, None
        self.lm_head = torch.nn.Linear(1, 1)
        self.next = dict(zip([TOKENIZER.special("<|assistant_start|>"), *ids], [*ids, ids[0]]))
        self.seconds, self.steps, self.fail = seconds, 0, False

    def forward(self, batch, attention, wanted=None):
        time.sleep(self.seconds)
        self.steps += 1
        if self.fail:
            raise RuntimeError("out of memory")
        wanted = range(len(batch.ids)) if wanted is None else wanted
        logits = torch.full((len(wanted), self.config.vocab_size), -20.0)
        for row, i in enumerate(wanted):
            logits[row, self.next.get(batch.ids[i], 0)] = 20.0
        return logits
