"""The embedded corpus: a small world in plain English, made as it is read, the same for the same seed; no download."""

from nanochat.tinyworld.documents import document

__all__ = ["document"]
