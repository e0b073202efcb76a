"""Which tokens of a vocabulary stay: those that must, and the most used ones that can still be made."""

from __future__ import annotations

import heapq
from collections.abc import Collection

import numpy as np

from surgery.errors import PlanError
from surgery.vocabulary.merges import Pair

Uses = np.ndarray  # [V] float64


def choose_tokens(
    vocabulary: dict[str, int],
    uses: Uses,
    protected: Collection[int],
    count: int,
    parts: dict[str, Pair],
    *,
    made_whole: bool = False,
) -> list[int]:
    """The sorted ids of the `count` tokens that stay.

    Tokens go one at a time: always the one with the fewest `uses` [V] among those that are not `protected`
    and that no other token is merged from, a later id before an earlier one. The uses of a token that goes
    are added to the two tokens of `parts` that it is then spelled with. Every token that stays can therefore
    be made by merges of tokens that stay. Tokens that merging does not make go first, unless `made_whole`
    (`ignore_merges`: a word that is a token is taken as it is). Raises PlanError where the protected tokens,
    and those they are merged from, are more than `count`, or the vocabulary is smaller.
    """
    if count > len(vocabulary):
        raise PlanError(
            "the vocabulary has fewer tokens than would be kept",
            where="--keep-vocabulary",
            expected=f"at most {len(vocabulary):,}",
            found=f"{count:,}",
        )
    pieces = {vocabulary[token]: [vocabulary[part] for part in pair] for token, pair in parts.items()}
    needed: dict[int, int] = {}
    for made_of in pieces.values():
        for part in made_of:
            needed[part] = needed.get(part, 0) + 1
    fixed, total = set(protected), uses.copy()
    text = {number: token for token, number in vocabulary.items()}

    def entry(number: int) -> tuple[float, bool, int]:
        made = made_whole or number in pieces or len(text[number]) == 1
        return (float(total[number]), made, -number)

    kept = set(text)
    leaves = [entry(number) for number in kept if number not in fixed and not needed.get(number)]
    heapq.heapify(leaves)
    while len(kept) > count:
        if not leaves:
            raise _too_few(len(kept), count)
        number = -heapq.heappop(leaves)[2]
        kept.remove(number)
        for part in pieces.get(number, ()):
            total[part] += total[number]
            needed[part] -= 1
            if not needed[part] and part not in fixed:
                heapq.heappush(leaves, entry(part))
    return sorted(kept)


def _too_few(least: int, count: int) -> PlanError:
    return PlanError(
        "more tokens must stay than would be kept: added tokens, single bytes and characters, the chat "
        "template's tokens, and what these are merged from",
        where="--keep-vocabulary",
        expected=f"{least:,} or more",
        found=f"{count:,}",
        next_step="keep more tokens",
    )
