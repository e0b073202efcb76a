"""Smaller tokenizers against the whole ones: same tokens where all of them stay, same text always."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from helpers.tokenizers_made import BYTES, MADE, SPECIAL, fast_tokenizer, text
from tokenizers import Tokenizer

from surgery.errors import PlanError, UnsupportedModelError
from surgery.pruning.verify_tokenizer import STRANGE
from surgery.vocabulary.choice import choose_tokens
from surgery.vocabulary.kept_ids import ids_of, ids_text
from surgery.vocabulary.merges import last_merges, merge_pairs
from surgery.vocabulary.token_ids import needed_ids, new_ids, with_new_added_tokens, with_new_ids
from surgery.vocabulary.tokenizer_json import TokenizerJson

WHOLE, SMALL = 700, 480


def smaller(kind: str, count: int = SMALL) -> tuple[Tokenizer, Tokenizer, list[int]]:
    """(Whole tokenizer, smaller one, old ids that stay), by the uses in a part of the text."""
    fields = json.loads(fast_tokenizer(kind, WHOLE).backend_tokenizer.to_str())
    source, whole = TokenizerJson(fields), Tokenizer.from_str(json.dumps(fields))
    vocabulary = source.vocabulary() | source.added()
    used = whole.encode(text()[:6000]).ids
    uses = np.bincount(used, minlength=len(vocabulary)).astype(np.float64)
    kept = choose_tokens(
        vocabulary,
        uses,
        source.fixed() | source.spelling(),
        count,
        source.parts(),
        made_whole=source.made_whole,
    )
    return whole, Tokenizer.from_str(json.dumps(source.reduced(new_ids(kept)))), kept


@pytest.mark.parametrize("kind", MADE)
def test_text_is_spelled_as_before_where_all_its_tokens_stay(kind: str) -> None:
    whole, small, kept = smaller(kind)
    new = new_ids(kept)
    assert len(kept) == SMALL and small.get_vocab_size() == SMALL
    assert small.get_vocab() == {token: new[old] for token, old in whole.get_vocab().items() if old in new}
    words = sorted(set(text().split(" ")))
    before = [whole.encode(word).ids for word in words]
    same = [ids for ids in before if all(one in new for one in ids)]
    after = [small.encode(word).ids for word, ids in zip(words, before, strict=True) if ids in same]
    assert 100 < len(same) < len(words)
    assert after == [[new[one] for one in ids] for ids in same]


@pytest.mark.parametrize("kind", MADE)
def test_any_text_survives(kind: str) -> None:
    whole, small, _ = smaller(kind)
    for strange in (*STRANGE, text()):
        ids = small.encode(strange).ids
        assert small.decode(ids) == whole.decode(whole.encode(strange).ids) == strange
        assert small.token_to_id("<unk>") not in ids


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_every_token_that_stays_can_be_made(kind: str) -> None:
    whole, small, kept = smaller(kind)
    tokens = {token for token in small.get_vocab() if token not in (*SPECIAL, *BYTES)}
    made = json.loads(small.to_str())["model"]
    parts = last_merges(made["vocab"], merge_pairs(made))
    assert {token for token in tokens if len(token) > 1} == set(parts)
    assert all(left in tokens and right in tokens for left, right in parts.values())
    assert whole.get_vocab_size() > len(kept)


def test_uses_of_a_token_that_goes_are_those_of_its_parts() -> None:
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "ca": 5, "cb": 6}
    parts = {"ab": ("a", "b"), "abc": ("ab", "c"), "ca": ("c", "a"), "cb": ("c", "b")}
    uses = np.array([0, 0, 0, 1, 3, 4, 2], dtype=np.float64)
    single = {0, 1, 2}
    # "cb" has the fewest uses of those that nothing is made of; "ab" is needed for "abc"
    assert choose_tokens(vocabulary, uses, single, 6, parts) == [0, 1, 2, 3, 4, 5]
    # then "abc" goes; its three uses make "ab" as used as "ca", and the later id goes first
    assert choose_tokens(vocabulary, uses, single, 5, parts) == [0, 1, 2, 3, 5]
    assert choose_tokens(vocabulary, uses, single, 4, parts) == [0, 1, 2, 3]
    with pytest.raises(PlanError, match="more tokens must stay"):
        choose_tokens(vocabulary, uses, single, 2, parts)
    # a protected token keeps what it is made of
    assert choose_tokens(vocabulary, uses, {0, 1, 2, 4}, 5, parts) == [0, 1, 2, 3, 4]
    with pytest.raises(PlanError, match="expected 5 or more"):
        choose_tokens(vocabulary, uses, {0, 1, 2, 4}, 4, parts)


def test_other_kinds_are_refused_by_name() -> None:
    for model in (
        {"type": "WordPiece", "vocab": {"a": 0}, "continuing_subword_prefix": "##"},
        {"type": "BPE", "vocab": {"a</w>": 0}, "merges": [], "end_of_word_suffix": "</w>"},
    ):
        with pytest.raises(UnsupportedModelError, match="kind of tokenizer") as refused:
            TokenizerJson({"model": model})
        assert model["type"] in str(refused.value)


def test_ids_in_configs_are_replaced() -> None:
    fields: dict[str, Any] = {
        "eos_token_id": [2, 9],
        "pad_token_id": None,
        "image_token_index": 5,
        "decoder_start_token_id": -1,
        "suppress_tokens": [5, 6, 7],
        "bad_words_ids": [[2, 5], [6]],
        "forced_decoder_ids": [[1, 5]],
        "sequence_bias": [[[5], 1.5], [[7], -2.0]],
        "text_config": {"bos_token_id": 2, "vocab_size": 10},
        "vision_config": {"num_channels": 2},
    }
    assert needed_ids(fields, 10) == {2, 9, 5}
    new = new_ids([2, 5, 9])
    assert with_new_ids(fields, new, "config.json") == {
        **fields,
        "eos_token_id": [0, 2],
        "image_token_index": 1,
        "suppress_tokens": [1],
        "bad_words_ids": [[0, 1]],
        "forced_decoder_ids": [[1, 1]],
        "sequence_bias": [[[1], 1.5]],
        "text_config": {"bos_token_id": 0, "vocab_size": 10},
    }
    added = {"added_tokens_decoder": {"9": {"content": "x"}, "5": {"content": "y"}}, "pad_token_id": 9}
    assert with_new_added_tokens(added, new, "tokenizer_config.json") == {
        "added_tokens_decoder": {"2": {"content": "x"}, "1": {"content": "y"}},
        "pad_token_id": 2,
    }
    with pytest.raises(UnsupportedModelError, match="vocabulary_map"):
        with_new_ids({"vocabulary_map": {"a": 1}}, new, "config.json")


@pytest.mark.parametrize("ids", [[], [3], [0, 1, 2, 5, 7, 8]])
def test_ids_as_text(ids: list[int]) -> None:
    assert ids_of(ids_text(ids)) == ids
    assert ids_text([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
