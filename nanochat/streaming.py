"""Tokens to text as they come: whole characters only, parts of a reply told apart, stop strings found.

Each class is fed one token or piece of text at a time and gives back what is safe to show now; `end()` gives the rest.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

OPENS = {"<|python_start|>": "python", "<|output_start|>": "python_output"}
CLOSES = ("<|python_end|>", "<|output_end|>")


class TextStream:
    """Bytes of tokens to text: a character appears when its last byte has come, in O(1) a token."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The characters that this token completes."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def end(self) -> str:
        """What an unfinished character leaves: one U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)


class ReplyStream:
    """A reply's tokens to (kind, text) pieces, kind being text, python or python_output; special tokens never show."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer)
        self._opens = {tokenizer.special(name): kind for name, kind in OPENS.items()}
        self._closes = {tokenizer.special(name) for name in CLOSES}
        self.kind = "text"

    def feed(self, token: int) -> list[tuple[str, str]]:
        """What may be shown now that this token has come: no piece is empty."""
        if not self._tokenizer.is_special(token):
            piece = self._text.feed(token)
            return [(self.kind, piece)] if piece else []
        pieces = self.end()
        if token in self._opens:
            self.kind = self._opens[token]
        elif token in self._closes:
            self.kind = "text"
        return pieces

    def end(self) -> list[tuple[str, str]]:
        """The remains of an unfinished character."""
        rest = self._text.end()
        self._text = TextStream(self._tokenizer)
        return [(self.kind, rest)] if rest else []


class StopFinder:
    """Text up to the first stop string: holds back an ending that may be the beginning of one."""

    def __init__(self, stops: Iterable[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def feed(self, piece: str) -> str:
        """The text that is safe to show; nothing more once `hit`."""
        if self.hit:
            return ""
        text = self._held + piece
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back in vain."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest proper beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
