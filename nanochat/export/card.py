"""The model card: what a model is, how it was made and how good it is, from its checkpoint and its record."""

from typing import Any

from nanochat import cost, report
from nanochat.gpt import GPTConfig

HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
language: en
tags: [nanochat]
---
"""
USE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
messages = [{"role": "user", "content": "Why is the sky blue?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

`FOLDER` is this folder or repository. The modelling file is part of it, hence `trust_remote_code`: read it first. With
nanochat itself: `python -m scripts.export --import-from=FOLDER`, then `python -m scripts.chat_cli`.
"""
LIMITS = """\
## Limits

- A small model, trained for learning how such models are made: it states falsehoods fluently. Not for decisions.
- In replies it may write `<|python_start|>EXPRESSION<|python_end|>`: nanochat's engine answers with a calculator.
  transformers does not; put `<|output_start|>RESULT<|output_end|>` there yourself, or use nanochat.
- Text that spells a special token becomes that token in transformers' tokenizer (in nanochat it stays text): remove
  such strings from what strangers write.
"""


def card(name: str, meta: dict[str, Any], found: dict[str, list[dict]]) -> str:
    """Markdown with the hub's front matter. found: rows of each stage's record (report.collect), may be empty."""
    config = GPTConfig(**meta["config"])
    count = cost.parameters(config)
    shape = [
        ("parameters", f"{count['total']:,} ({count['scaling']:,} in matrices and head)"),
        ("layers x width", f"{config.n_layer} x {config.n_embd}"),
        ("heads", f"{config.n_head} query, {config.n_kv_head} key/value, {config.head_dim} channels each"),
        ("context", f"{config.sequence_len} tokens, windows {config.window_pattern}"),
        ("vocabulary", f"{config.vocab_size:,} tokens, byte-level BPE"),
        ("stage", f"{meta.get('stage', 'unknown')}, step {meta.get('step', 'unknown')}"),
        ("data", str((meta.get("dataset") or {}).get("dataset", "see the record"))),
    ]
    parts = [HEAD, f"# {name}\n", ABOUT, report.grid([["what", "value"], *map(list, shape)])]
    for title, rows in (("Training", report.stage_table(found)), ("Scores", report.score_table(found))):
        if len(rows) > 1:
            parts.append(f"\n## {title}\n\n{report.grid(rows)}")
    return "\n".join([*parts, "", USE, LIMITS])


ABOUT = """\
A decoder-only Transformer trained with [nanochat](https://github.com/karpathy/nanochat)-style code: rotary positions,
QK norm, ReLU^2, value embeddings, a scaled residual stream, smear and backout, soft-capped logits.
"""
