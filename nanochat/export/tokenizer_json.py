"""Our tokenizer as the tokenizer.json of Hugging Face's `tokenizers`, with exactly the same ids; and its chat template.

That library wants the merges as pairs, where ours keeps the tokens in rank order. A token's merges are all its splits
into two tokens, in rank order: the pair that is joined first is then the one whose joint token has the lowest rank,
which is what tiktoken does. Bytes are spelled as printable characters, the table that GPT-2 introduced.
"""

from typing import Any

from nanochat.errors import UserError
from nanochat.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer


def byte_letters() -> list[str]:
    """The printable character that stands for each byte: itself where it is printable, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def spelled(token: bytes, letters: list[str]) -> str:
    return "".join(letters[byte] for byte in token)


def merges(ranks: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, the lowest-ranked token first."""
    rank = {token: i for i, token in enumerate(ranks)}
    pairs = []
    for token in ranks:
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in rank and token[i:] in rank]
        pairs += sorted(splits, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return pairs


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json. Encoding puts bos first unless add_special_tokens is False."""
    if not tokenizer.ranks:
        raise UserError(f"The built-in vocabulary {tokenizer.encoding.name} is tiktoken's own and is not exported.")
    letters = byte_letters()
    bos = {"id": "<|bos|>", "type_id": 0}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
            for name, i in tokenizer.specials.items()
        ],  # fmt: skip
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": bos}, *({"Sequence": {"id": s, "type_id": 0}} for s in "AB")],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [tokenizer.bos], "tokens": ["<|bos|>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": {spelled(token, letters): i for i, token in enumerate(tokenizer.ranks)},
            "merges": [[spelled(a, letters), spelled(b, letters)] for a, b in merges(tokenizer.ranks)],
        },
    }  # fmt: skip


def ranks_of(content: dict[str, Any]) -> list[bytes]:
    """The tokens in rank order of a tokenizer.json that `tokenizer_json` wrote: its inverse."""
    byte = {letter: i for i, letter in enumerate(byte_letters())}
    names = tuple(token["content"] for token in content.get("added_tokens", []))
    split = content.get("pre_tokenizer", {}).get("pretokenizers", [{}])[0].get("pattern", {}).get("Regex")
    if names != SPECIAL_TOKENS or split != PATTERN:
        raise UserError("The folder's tokenizer.json is not nanochat's: its special tokens or its pattern differ.")
    vocab = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    return [bytes(byte[letter] for letter in word) for word, _ in vocab]


# nanochat/chat.py in Jinja: bos, then each turn between its delimiters; a system message stands before the first user
# message; content is a string or a list of parts. Text that spells a special token is not defused by transformers.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set state = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set words = message['content'] -%}
{%- else -%}
{%- set run = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'python' -%}
{%- set run.text = run.text + '<|python_start|>' + part['text'] + '<|python_end|>' -%}
{%- elif part['type'] == 'python_output' -%}
{%- set run.text = run.text + '<|output_start|>' + part['text'] + '<|output_end|>' -%}
{%- else -%}
{%- set run.text = run.text + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- set words = run.text -%}
{%- endif -%}
{%- if message['role'] == 'system' -%}
{%- set state.system = words + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '<|user_start|>' + state.system + words + '<|user_end|>' -}}
{%- set state.system = '' -%}
{%- else -%}
{{- '<|assistant_start|>' + words + '<|assistant_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""


def tokenizer_config(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|assistant_end|>",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
