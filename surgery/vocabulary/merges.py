"""How byte-pair encoding makes each of its tokens: the last merge of every token of a tokenizer.json."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

Pair = tuple[str, str]


def merge_pairs(model: dict[str, Any]) -> list[Pair]:
    """The merges of a tokenizer.json's BPE `model` in order; files hold them as pairs or as "a b"."""
    found = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        found.append((left, right))
    return found


def last_merges(vocabulary: dict[str, int], merges: list[Pair]) -> dict[str, Pair]:
    """Token -> the two tokens that its last merge joins, for every token that merging makes.

    Byte-pair encoding merges inside a token as if the token stood alone: a merge across its borders would
    have made another token. A vocabulary that has the parts of each of its tokens, as given here, therefore
    still makes them. Single symbols have no merge. A longer token without an entry is never made: encoding
    its own characters ends in several tokens.
    """
    ranks: dict[Pair, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair, rank)
    return {
        token: last
        for token in vocabulary
        if len(token) > 1 and (last := _last_merge(token, ranks)) is not None
    }


def _last_merge(token: str, ranks: dict[Pair, int]) -> Pair | None:
    """The pair that becomes `token` when its characters are merged; None where they end in several tokens."""
    parts, none = list(token), len(ranks)
    while True:
        found = [ranks.get(pair, none) for pair in pairwise(parts)]
        best = min(found)
        if best == none:
            return None
        if len(parts) == 2:
            return parts[0], parts[1]
        place = found.index(best)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
