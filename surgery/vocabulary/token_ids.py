"""Token ids in config.json, generation_config.json and tokenizer_config.json, and their new values."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from surgery.checkpoint.transformers_model import text_config
from surgery.errors import UnsupportedModelError

NewIds = Mapping[int, int]  # old id -> new id, of the tokens that stay

# a token that the model or the tokenizer needs, or several: `bos_token_id`, `image_token_index`
NEEDED = re.compile(r"_token_(id|ids|index)$|^stop_token_ids$")
# tokens that generation favours or avoids, alone or in sequences; one that is gone is left out
OPTIONAL = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias")
FORCED = "forced_decoder_ids"  # pairs of a position and a token
NOT_MAPPED = ("vocabulary_map",)


def new_ids(kept: Sequence[int]) -> dict[int, int]:
    """Old id -> new id for the sorted old ids that stay: the place of each."""
    return {old: place for place, old in enumerate(kept)}


def needed_ids(fields: dict[str, Any], rows: int) -> set[int]:
    """The ids below `rows` that a config needs, at its top level and in its language model's part."""
    found: set[int] = set()
    for part in (fields, text_config(fields)):
        for key, value in part.items():
            if NEEDED.search(key):
                found |= {one for one in _numbers(value) if 0 <= one < rows}
    return found


def with_new_ids(fields: dict[str, Any], new: NewIds, where: str) -> dict[str, Any]:
    """A config with every token id replaced; all else unchanged.

    Negative ids and ids behind the vocabulary stand for no token and stay. Raises UnsupportedModelError for a
    key that holds ids in a form that is not known.
    """
    fields = copy.deepcopy(fields)
    text = text_config(fields)
    for part in [fields] if text is fields else [fields, text]:
        for key, value in part.items():
            if key in NOT_MAPPED and value:
                raise UnsupportedModelError(
                    "this config maps token ids in a way that a cut of the vocabulary can't follow",
                    where=where,
                    found=key,
                    next_step="leave the vocabulary whole: prune without vocab in --cuts",
                )
            if NEEDED.search(key):
                part[key] = _replaced(value, new)
            elif key in OPTIONAL and value is not None:
                part[key] = _without_gone(key, value, new)
            elif key == FORCED and value is not None:
                part[key] = [[place, _replaced(one, new)] for place, one in value]
    return fields


def with_new_added_tokens(fields: dict[str, Any], new: NewIds, where: str) -> dict[str, Any]:
    """tokenizer_config.json with the ids of its added tokens replaced."""
    fields = with_new_ids(fields, new, where)
    added = fields.get("added_tokens_decoder")
    if isinstance(added, dict):
        fields["added_tokens_decoder"] = {
            str(new[int(old)]): token for old, token in added.items() if int(old) in new
        }
    return fields


def _numbers(value: Any) -> list[int]:
    found = value if isinstance(value, list) else [value]
    return [one for one in found if isinstance(one, int) and not isinstance(one, bool)]


def _replaced(value: Any, new: NewIds) -> Any:
    if isinstance(value, list):
        return [_replaced(one, new) for one in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return new.get(value, value)


def _gone(value: Any, new: NewIds) -> bool:
    if isinstance(value, list):
        return any(_gone(one, new) for one in value)
    return isinstance(value, int) and value >= 0 and value not in new


def _without_gone(key: str, value: Any, new: NewIds) -> Any:
    if key == "sequence_bias" and isinstance(value, list):
        return [[_replaced(tokens, new), bias] for tokens, bias in value if not _gone(tokens, new)]
    if not isinstance(value, list):
        raise UnsupportedModelError(
            "token ids in a form that a cut of the vocabulary can't follow",
            where="generation_config.json",
            found=key,
            next_step=f"write {key} as a list, or remove it",
        )
    return [_replaced(one, new) for one in value if not _gone(one, new)]
