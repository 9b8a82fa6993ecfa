"""Guessing the next tokens from the text itself, so that one forward can confirm several (prompt lookup decoding).

Text repeats itself: where the newest tokens have stood before, what followed them then is a good guess now (Saxena
2023, github.com/apoorvumang/prompt-lookup-decoding; the scheme of checking guesses: Leviathan 2022, arXiv 2211.17192).
The engine feeds the guesses along with the newest token, draws at each place as if they were not there, and keeps
guesses for as long as they are what was drawn: since a draw depends only on its logits, the seed and the place, the
text is the one that would have come without guessing.
"""

from __future__ import annotations

LENGTH = 3  # tokens that must have stood together before [guess; 2 to 4 are usual]
PATIENCE = 6  # after so many failures in a row, at most 2**6 steps pass before the next guess


class Drafter:
    """The guesses for one sequence. Its index grows with the text, at O(1) a token."""

    def __init__(self):
        self._after: dict[tuple[int, ...], int] = {}  # where the tokens behind the newest such LENGTH tokens begin
        self._indexed = LENGTH  # ends of LENGTH tokens up to here, exclusive of the text's own end, are in the index
        self._failures = self._pause = 0

    def propose(self, ids: list[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow ids."""
        if most <= 0 or len(ids) <= LENGTH:
            return []
        if self._pause:
            self._pause -= 1
            return []
        for end in range(self._indexed, len(ids)):
            self._after[tuple(ids[end - LENGTH : end])] = end
        self._indexed = len(ids)
        at = self._after.get(tuple(ids[-LENGTH:]))
        return [] if at is None else ids[at : at + most]

    def learn(self, accepted: int) -> None:
        """How many of the guesses were right: after failures it guesses less often."""
        if accepted:
            self._failures = 0
        else:
            self._failures = min(self._failures + 1, PATIENCE)
            self._pause = 2**self._failures - 1
