"""Which tokens of a text a training loss counts: from rows with their answers to tokens, piece by piece."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.text.answers import Span

Counted = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class MarkedText:
    """A piece of text and the spans of its characters that are answers; None where all of it counts."""

    text: str
    answers: tuple[Span, ...] | None = None

    def after(self, before: str) -> MarkedText:
        """The same with `before`, which is no answer, in front of it."""
        if self.answers is None:
            return MarkedText(before + self.text)
        return MarkedText(
            before + self.text, tuple((start + len(before), end + len(before)) for start, end in self.answers)
        )


class TokenMarks:
    """Says of each token of a text whether it counts: whether one of its characters does.

    The strings of `strings` are tokenised in pieces, cut anywhere; `of_piece` is called with each of them, in
    order. No more is held than what was read and not yet tokenised.
    """

    def __init__(self) -> None:
        self._spans: deque[Span] = deque()
        self._read = 0  # characters
        self._marked = 0

    def strings(self, rows: Iterable[MarkedText]) -> Iterator[str]:
        """The rows' text."""
        for row in rows:
            answers = ((0, len(row.text)),) if row.answers is None else row.answers
            self._spans.extend((self._read + start, self._read + end) for start, end in answers)
            self._read += len(row.text)
            yield row.text

    def of_piece(self, piece: str, tokens: int, offsets: list[Span] | None) -> Counted:
        """Whether each token [n] of the next piece counts, from its characters; all, without `offsets`.

        An offset without characters stands for that at its place.
        """
        first, self._marked = self._marked, self._marked + len(piece)
        if offsets is None:
            return np.ones(tokens, dtype=np.bool_)
        counted = np.zeros(len(piece) + 1, dtype=np.int32)  # characters before each place that count
        while self._spans and self._spans[0][0] < self._marked:
            start, end = self._spans[0]
            counted[max(start, first) - first + 1 : end - first + 1] = 1
            if end > self._marked:
                break
            self._spans.popleft()
        counted = counted.cumsum()
        starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        ends = np.maximum(ends, starts + 1).clip(max=len(piece))
        return np.asarray(counted[ends] > counted[np.minimum(starts, ends)], dtype=np.bool_)
