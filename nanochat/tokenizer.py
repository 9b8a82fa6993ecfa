"""Byte-level BPE: rustbpe learns the merges, tiktoken applies them, a readable JSON file keeps them.

A token is a run of bytes; its id is its rank, the order in which the merges were learnt (ranks 0..255 are the bytes
themselves). Nine special tokens follow the ranks. Text is always encoded as ordinary text: a string that spells a
special token becomes the ids of its characters, never the special id, so nobody can smuggle a turn boundary in.
Every string survives encode and decode, but for lone surrogates, which become U+FFFD.

V: vocabulary size, ranks and specials together.
"""

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import tiktoken

from nanochat.errors import UserError
from nanochat.paths import as_written, base_dir, read_json, staged, write_json

if TYPE_CHECKING:
    import torch

SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document and every conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the calculator
    "<|python_end|>",
    "<|output_start|>",  # what the calculator answered
    "<|output_end|>",
)
# How text is cut before merging: GPT-4's pattern (cl100k), but with at most 2 digits together instead of 3, which
# spends fewer of a small vocabulary's tokens on numbers (published: val bpb 0.969 / 0.965 / 0.972 with 1 / 2 / 3 at
# depth 12 and V = 32,768).
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
BUILTINS = ("gpt2", "cl100k_base")  # vocabularies that tiktoken can fetch, for comparison
SMALLEST = 256 + len(SPECIAL_TOKENS)  # all bytes and the specials

FORMAT, VERSION = "nanochat tokenizer", 1
REMEDY = "train one with `python -m scripts.tok_train`"

# The pattern's look-ahead remembers a step for each blank of a run, and the regex engine aborts the process near a
# million steps (measured: 600,000 blanks pass, 1,000,000 don't). A longer run is cut, which loses no byte.
LONGEST_BLANK_RUN = 100_000
BLANK_RUN = re.compile(rf"([^\S\r\n]{{{LONGEST_BLANK_RUN}}})")
FETCH_SECONDS = 60  # tiktoken sets no limit of its own


class Tokenizer:
    """Text to ids and back. Make one with `train`, `load` or `builtin`.

    `ranks` are the mergeable tokens in rank order; `specials` maps each special token to its id; `meta` is what the
    trainer wants to remember (JSON): the data set's identity, characters seen, and so on.
    """

    def __init__(self, encoding: tiktoken.Encoding, specials: dict[str, int], ranks: list[bytes], meta: dict):
        self.encoding = encoding
        self.specials = specials
        self.ranks = ranks
        self.meta = meta
        self._special_ids = frozenset(specials.values())

    # -- making one --------------------------------------------------------------------------------------------------

    @classmethod
    def from_ranks(cls, ranks: list[bytes], meta: dict | None = None) -> "Tokenizer":
        """A tokenizer with our pattern and our specials behind these ranks."""
        specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        mergeable = {token: rank for rank, token in enumerate(ranks)}
        encoding = tiktoken.Encoding("nanochat", pat_str=PATTERN, mergeable_ranks=mergeable, special_tokens=specials)
        return cls(encoding, specials, ranks, dict(meta or {}))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, meta: dict | None = None) -> "Tokenizer":
        """Learn exactly `vocab_size - 9` tokens from `texts`. The same texts in the same order give the same tokens.

        Refused with a UserError: a vocabulary below 256 + 9, or a text too small to fill it.
        """
        import rustbpe

        check_vocab_size(vocab_size)
        wanted = vocab_size - len(SPECIAL_TOKENS)
        trainer = rustbpe.Tokenizer()  # pyrefly: ignore[missing-attribute]  a compiled module without stubs
        pieces = (piece for text in texts for piece in _pieces(text))
        trainer.train_from_iterator(pieces, wanted, pattern=PATTERN)
        learnt = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        ranks = [bytes(token) for token, _ in learnt]
        if len(ranks) < wanted:
            most = len(ranks) + len(SPECIAL_TOKENS)
            raise UserError(
                f"The training text has pieces for a vocabulary of {most} at most: "
                f"give --vocab-size={most} or less, or more text."
            )
        return cls.from_ranks(ranks, meta)

    @classmethod
    def load(cls, folder: Path | str | None = None) -> "Tokenizer":
        """Read `folder`/tokenizer.json (default: the artefact folder's). Missing or changed: a UserError."""
        path = tokenizer_path(folder)
        if not path.exists():
            raise UserError(f"There is no tokenizer at {path}: {REMEDY}.")
        try:
            content = read_json(path)
        except UserError as error:
            raise UserError(f"The tokenizer file {path} is damaged or cut short: restore it, or {REMEDY}.") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
            raise UserError(f"{path} is not a {FORMAT} file of version {VERSION}: {REMEDY}.")
        whole = as_written(path, content)
        if content.pop("sha256", None) != _digest(content) or not whole:
            raise UserError(
                f"The tokenizer file {path} was changed since it was written (checksum): restore it, or {REMEDY}."
            )
        if content["pattern"] != PATTERN or tuple(content["specials"]) != SPECIAL_TOKENS:
            raise UserError(f"The tokenizer {path} has another split pattern or other special tokens: {REMEDY}.")
        return cls.from_ranks([_unspell(text) for text in content["ranks"]], content["meta"])

    def save(self, folder: Path | str | None = None) -> Path:
        """Write `folder`/tokenizer.json, whole or not at all, and return its path.

        One token a line, as text: bytes that are not UTF-8 as \\xNN, a backslash doubled. `sha256` covers the rest.
        """
        if not self.ranks:
            raise UserError(f"The built-in vocabulary {self.encoding.name} is tiktoken's own and is not saved.")
        content = {
            "format": FORMAT,
            "version": VERSION,
            "meta": self.meta,
            "pattern": PATTERN,
            "specials": self.specials,
            "ranks": [_spell(token) for token in self.ranks],
        }
        path = tokenizer_path(folder)
        write_json(path, {"sha256": _digest(content), **content})
        return path

    @classmethod
    def builtin(cls, name: str) -> "Tokenizer":
        """tiktoken's own "gpt2" or "cl100k_base", fetched by tiktoken at first use; its <|endoftext|> is the bos."""
        if name not in BUILTINS:
            raise UserError(f"There is no built-in vocabulary {name!r}: choose one of {', '.join(BUILTINS)}.")
        encoding = _fetch(name)
        specials = {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
        return cls(encoding, specials, [], {"builtin": name})

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """V, specials included."""
        return self.encoding.n_vocab

    @property
    def bos(self) -> int:
        """The id that begins every document."""
        return self.special("<|bos|>" if "<|bos|>" in self.specials else "<|endoftext|>")

    def special(self, name: str) -> int:
        """The id of a special token, e.g. "<|user_start|>"."""
        if name not in self.specials:
            raise UserError(f"The tokenizer {self.encoding.name} has no special token {name}: {REMEDY}.")
        return self.specials[name]

    def is_special(self, token: int) -> bool:
        """Whether the id is a special token's."""
        return token in self._special_ids

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of what decides the ids: ranks, specials, pattern (not `meta`). Equal means interchangeable."""
        if not self.ranks:
            return _digest({"builtin": self.encoding.name})
        return _digest([PATTERN, self.specials, [token.hex() for token in self.ranks]])

    def token_bytes(self) -> "torch.Tensor":
        """Bytes per id, int32 (V,): what bits per byte divides by. 0 for specials and for ids that mean nothing."""
        import torch

        sizes = [0 if self.is_special(token) else self._size(token) for token in range(self.vocab_size)]
        return torch.tensor(sizes, dtype=torch.int32)

    def _size(self, token: int) -> int:
        if self.ranks:
            return len(self.ranks[token])
        try:
            return len(self.encoding.decode_single_token_bytes(token))
        except KeyError:  # cl100k_base leaves gaps between its ids
            return 0

    # -- text to ids and back ----------------------------------------------------------------------------------------

    @overload
    def encode(
        self, text: str, prepend: int | str | None = None, append: int | str | None = None, threads: int = 8
    ) -> list[int]: ...

    @overload
    def encode(
        self, text: list[str], prepend: int | str | None = None, append: int | str | None = None, threads: int = 8
    ) -> list[list[int]]: ...

    def encode(
        self,
        text: str | list[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        threads: int = 8,
    ) -> list[int] | list[list[int]]:
        """Ids of a text, or of each text of a list (in `threads` threads; the Rust part runs without the GIL).

        `prepend` and `append` are an id or the name of a special token, put around each text's ids.
        """
        first, last = self._around(prepend), self._around(append)

        def one(text: str) -> list[int]:
            return first + self._encode(text) + last

        if isinstance(text, str):
            return one(text)
        if threads <= 1 or len(text) <= 1:
            return [one(each) for each in text]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(one, text))

    def _around(self, token: int | str | None) -> list[int]:
        if token is None:
            return []
        return [self.special(token) if isinstance(token, str) else token]

    def _encode(self, text: str) -> list[int]:
        if len(text) < LONGEST_BLANK_RUN:
            return self.encoding.encode_ordinary(text)
        return [token for piece in _pieces(text) for token in self.encoding.encode_ordinary(piece)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that don't make a character become U+FFFD. An id outside the vocabulary: KeyError."""
        return self.encoding.decode(list(ids), errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, for a stream that must wait until a character is whole."""
        return self.encoding.decode_bytes(list(ids))


def check_vocab_size(vocab_size: int) -> None:
    """A vocabulary must at least hold every byte and the specials."""
    if vocab_size < SMALLEST:
        raise UserError(
            f"--vocab-size={vocab_size} is too small: it must hold the 256 bytes and the "
            f"{len(SPECIAL_TOKENS)} special tokens, so give {SMALLEST} or more."
        )


def tokenizer_path(folder: Path | str | None = None) -> Path:
    """The tokenizer's file in `folder`, or in the artefact folder."""
    return (Path(folder) if folder is not None else base_dir() / "tokenizer") / "tokenizer.json"


def kept_path(fingerprint: str) -> Path:
    """Where `keep_other` leaves the tokenizer of this fingerprint, in the artefact folder."""
    return tokenizer_path().with_name(f"before_{fingerprint[:16]}.json")


def keep_other(fingerprint: str) -> Path | None:
    """Copy the tokenizer that is there beside it, if it is not the one of this fingerprint -> its place.

    Models that were trained with it can't be used without it.
    """
    try:
        other = Tokenizer.load().fingerprint
    except UserError:  # none, or a damaged one
        return None
    if other == fingerprint:
        return None
    with staged(kept_path(other)) as place:
        shutil.copyfile(tokenizer_path(), place)
    return kept_path(other)


def _pieces(text: str) -> Iterator[str]:
    """`text` cut so that no piece holds more blanks in a row than the regex engine bears; mostly one piece."""
    if len(text) < LONGEST_BLANK_RUN:
        yield text
    else:
        yield from filter(None, BLANK_RUN.split(text))


def _spell(token: bytes) -> str:
    """Bytes as readable text; `_unspell` inverts it."""
    return token.replace(b"\\", b"\\\\").decode("utf-8", errors="backslashreplace")


def _unspell(text: str) -> bytes:
    def one(match: re.Match[bytes]) -> bytes:
        return b"\\" if match[1] == b"\\" else bytes.fromhex(match[1][1:].decode())

    return re.sub(rb"\\(\\|x[0-9a-f]{2})", one, text.encode("utf-8"))


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _fetch(name: str) -> tiktoken.Encoding:
    """tiktoken's vocabulary, from its cache or the net, given up after FETCH_SECONDS; failing that a UserError."""
    box: list[Any] = []

    def work() -> None:
        try:
            box.append(tiktoken.get_encoding(name))
        except (OSError, ValueError) as error:  # no network (requests' errors are OSErrors), or a wrong checksum
            box.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(FETCH_SECONDS)
    if not box or isinstance(box[0], Exception):
        raise UserError(
            f"The vocabulary {name} can't be fetched by tiktoken "
            f"({type(box[0]).__name__ if box else f'no answer in {FETCH_SECONDS} s'}): "
            "connect to the net, or set TIKTOKEN_CACHE_DIR to a folder that holds it."
        )
    return box[0]
