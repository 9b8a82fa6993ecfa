"""Measure the exports of a trained model: the same tokens in transformers, the same logits everywhere, the same ids.

    NANOCHAT_BASE_DIR=FOLDER python -m scripts.bench_export -i sft --model-tag=pocket

Greedy continuations of 20 prompts over 200 tokens beside our slow twin (`GPT.generate_naive`: no calculator); every
format's logits; ids of real documents (--text) and of every Unicode character in three surroundings.
"""

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import torch
import tyro

from nanochat import chat, checkpoint, cli, hardware, paths
from nanochat.export import formats, parity
from nanochat.export.tokenizer_json import tokenizer_json
from nanochat.tokenizer import Tokenizer

TEXTS = ("The capital of France is", "Once upon a time", "A dog is a kind of", "Monday, Tuesday,", "The sun rises",
         "Anna went to the garden.", "12 + 30 =", "In the kitchen you can find", "The sun", "Q: What is")  # fmt: skip
QUESTIONS = ("Who are you?", "What is the capital of Italy?", "What is 12 * 7?", "Tell me a story.", "Hello!",
             "Which animal says meow?", "How do you spell tree?", "Name three fruits.", "What comes after Tuesday?",
             "Is a whale a fish?")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "sft"  # base, sft or rl
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""  # empty: the deepest
    tokens: int = 200  # greedy tokens a prompt
    text: str = "../shared/data/pretrain"  # folder of parquet with a column `text`; empty: leave the ids of text out
    documents: int = 10_000  # of it
    characters: bool = True  # also each of Unicode's characters
    output: str = ""  # JSON file; empty: only print


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Ten beginnings of texts and ten questions, as ids."""
    asked = [{"messages": [{"role": "user", "content": text}]} for text in QUESTIONS]
    said = [tokenizer.encode(text, prepend="<|bos|>") for text in TEXTS]
    return said + [chat.render_for_completion(one, tokenizer) for one in asked]


def greedy(model, theirs, rows: list[list[int]], count: int) -> dict:
    """How many of the rows continue alike, and how far the first that does not."""
    same, shortest, total = 0, count, 0
    for row in rows:
        most = min(count, model.config.sequence_len - len(row))
        ours = list(model.generate_naive(row, most, temperature=0))
        ids = torch.tensor([row])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, eos_token_id=None
        )
        got = out[0, len(row) :].tolist()
        agree = next((i for i, (a, b) in enumerate(zip(ours, got)) if a != b), min(len(ours), len(got)))
        same, shortest, total = same + (ours == got), min(shortest, agree), total + most
    return {"prompts": len(rows), "equal": same, "tokens": total, "shortest_agreement": shortest}


def documents(folder: Path, count: int):
    """The first `count` texts of a folder of parquet."""
    for path in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=256, columns=["text"]):
            for text in batch.column("text").to_pylist():
                if count <= 0:
                    return
                count -= 1
                yield text


def same_ids(ours: Tokenizer, theirs, texts) -> dict:
    """How many texts have other ids in transformers' library, with the first few of them."""
    seen, tokens, wrong = 0, 0, []
    for text in texts:
        ids = ours.encode(text)
        seen, tokens = seen + 1, tokens + len(ids)
        if theirs.encode(text, add_special_tokens=False).ids != ids:
            wrong.append(text)
    return {"texts": seen, "tokens": tokens, "different": len(wrong), "first": [repr(t[:80]) for t in wrong[:20]]}


def characters():
    """Every character that a string of UTF-8 can hold, between letters, behind a blank, and before a digit."""
    for code in range(0x110000):
        if not 0xD800 <= code <= 0xDFFF:
            yield from (f"a{chr(code)}b", f" {chr(code)}", f"{chr(code)}1")


def main(cfg: Config) -> dict:
    """Measure, print, write; returns the figures."""
    from tokenizers import Tokenizer as Theirs

    source = checkpoint.load(checkpoint.find(cfg.source, cfg.model_tag or None))
    model, tokenizer, _ = checkpoint.build_model(source.path)
    found: dict = hardware.about() | {"command": cli.command(main), "checkpoint": "/".join(source.path.parts[-3:])}
    with tempfile.TemporaryDirectory() as folder:
        written = {}
        for kind, ending in formats.ENDINGS.items():
            began = time.perf_counter()
            written[kind] = formats.write(kind, Path(folder) / f"model{ending}", source, "bench", {})
            difference = parity.difference(kind, written[kind], model, torch.Generator().manual_seed(0))
            found[kind] = {"largest_logit_difference": difference, "seconds": round(time.perf_counter() - began, 1)}
            print(kind, found[kind], flush=True)
        found["greedy"] = greedy(model, parity.load_hf(written["hf"]), prompts(tokenizer), cfg.tokens)
        print("greedy", found["greedy"], flush=True)
    theirs = Theirs.from_str(json.dumps(tokenizer_json(tokenizer)))
    if cfg.text:
        found["documents"] = same_ids(tokenizer, theirs, documents(Path(cfg.text), cfg.documents))
        print("documents", found["documents"], flush=True)
    if cfg.characters:
        found["characters"] = same_ids(tokenizer, theirs, characters())
        print("characters", found["characters"], flush=True)
    if cfg.output:
        paths.write_json(Path(cfg.output), found)
    return found


if __name__ == "__main__":
    cli.run(main, Config)
