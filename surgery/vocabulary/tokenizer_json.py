"""tokenizer.json: what of it must stay, and the same file for a smaller vocabulary."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

from surgery.errors import UnsupportedModelError
from surgery.vocabulary.merges import Pair, last_merges, merge_pairs
from surgery.vocabulary.token_ids import NewIds

FILE = "tokenizer.json"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
BYTES = 256


@dataclass(frozen=True)
class TokenizerJson:
    """The content of a tokenizer.json, for a model of byte-pair encoding (BPE) or Unigram.

    Raises UnsupportedModelError for other kinds, and for subword markers inside tokens, which merges don't
    show.
    """

    fields: dict[str, Any]
    where: str = FILE

    def __post_init__(self) -> None:
        kind, model = self.kind, self.model
        marked = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
        if kind not in ("BPE", "Unigram") or not isinstance(model.get("vocab"), dict | list) or marked:
            raise UnsupportedModelError(
                "the vocabulary of this kind of tokenizer can't be cut",
                where=self.where,
                expected="BPE or Unigram",
                found=", ".join([kind, *marked]),
                next_step="leave the vocabulary whole: prune without vocab in --cuts",
            )

    @property
    def model(self) -> dict[str, Any]:
        """The entry `model`."""
        found = self.fields.get("model")
        return found if isinstance(found, dict) else {}

    @property
    def kind(self) -> str:
        """`BPE`, `Unigram`, or what else it is; old files of BPE do not say it."""
        return str(self.model.get("type") or ("BPE" if "merges" in self.model else "unknown"))

    def vocabulary(self) -> dict[str, int]:
        """Token -> id, of the model; added tokens may be beside it."""
        vocab = self.model["vocab"]
        if isinstance(vocab, dict):
            return dict(vocab)
        return {token: number for number, (token, _) in enumerate(vocab)}

    def added(self) -> dict[str, int]:
        """Token -> id, of the added tokens."""
        return {token["content"]: token["id"] for token in self.fields.get("added_tokens") or []}

    def fixed(self) -> set[int]:
        """Ids that the file names beside its vocabulary: of added tokens, padding and post-processor."""
        padding = self.fields.get("padding") or {}
        found = {*self.added().values(), *_post_processor_ids(self.fields.get("post_processor") or {})}
        return found | ({padding["pad_id"]} if "pad_id" in padding else set())

    def check_rows(self, rows: int) -> None:
        """Raise UnsupportedModelError for a token that has no row among the `rows` of the embedding."""
        without = {token: n for token, n in (self.vocabulary() | self.added()).items() if n >= rows}
        if without:
            token, number = next(iter(without.items()))
            raise UnsupportedModelError(
                "the tokenizer has tokens without a row of the embedding, so the vocabulary can't be cut",
                where=self.where,
                expected=f"ids below {rows:,}",
                found=f"{token!r}: {number:,}",
                next_step="remove these tokens from the tokenizer, or leave the vocabulary whole",
            )

    def parts(self) -> dict[str, Pair]:
        """Token -> the two tokens it is merged from; nothing for Unigram, which needs no parts."""
        if self.kind != "BPE":
            return {}
        return last_merges(self.vocabulary(), merge_pairs(self.model))

    @property
    def made_whole(self) -> bool:
        """Whether a token is made without merges: of Unigram, and of BPE with `ignore_merges`."""
        return self.kind != "BPE" or bool(self.model.get("ignore_merges"))

    def spelling(self) -> set[int]:
        """Ids of the tokens that any text can be spelled with, as far as the tokenizer can spell it now.

        These are the 256 byte tokens where characters fall back to them; else every single character, which
        byte-level tokenizers have 256 of.
        """
        vocabulary = self.vocabulary()
        by_bytes = {number for token, number in vocabulary.items() if BYTE_TOKEN.fullmatch(token)}
        if self.model.get("byte_fallback") and len(by_bytes) == BYTES:
            return by_bytes | self._unknown(vocabulary)
        single = {number for token, number in vocabulary.items() if len(token) == 1}
        return single | by_bytes | self._unknown(vocabulary)

    def _unknown(self, vocabulary: dict[str, int]) -> set[int]:
        if self.kind == "Unigram":
            number = self.model.get("unk_id")
            return set() if number is None else {number}
        token = self.model.get("unk_token")
        return {vocabulary[token]} if token in vocabulary else set()

    def reduced(self, new: NewIds) -> dict[str, Any]:
        """The file's content with only the tokens in `new`, under their new ids.

        A merge stays where both its parts and its result do. Raises UnsupportedModelError for a
        post-processor that is not known.
        """
        fields = {key: copy.deepcopy(value) for key, value in self.fields.items() if key != "model"}
        fields["model"] = self._reduced_model(new)
        for token in fields.get("added_tokens") or []:
            token["id"] = new[token["id"]]
        padding = fields.get("padding")
        if isinstance(padding, dict) and "pad_id" in padding:
            padding["pad_id"] = new.get(padding["pad_id"], padding["pad_id"])
        if fields.get("post_processor"):
            _renumber_post_processor(fields["post_processor"], new, self.where)
        return {key: fields[key] for key in self.fields}

    def _reduced_model(self, new: NewIds) -> dict[str, Any]:
        model = dict(self.model)
        if self.kind == "Unigram":
            model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new]
            if model.get("unk_id") is not None:
                model["unk_id"] = new[model["unk_id"]]
            return model
        vocab = {token: new[number] for token, number in model["vocab"].items() if number in new}
        model["vocab"] = vocab
        model["merges"] = [
            merge
            for merge, (left, right) in zip(self.model["merges"], merge_pairs(self.model), strict=True)
            if left in vocab and right in vocab and left + right in vocab
        ]
        return model


def _post_processor_ids(processor: dict[str, Any]) -> set[int]:
    if processor.get("type") == "Sequence":
        return set().union(*(_post_processor_ids(one) for one in processor["processors"]))
    if processor.get("type") == "TemplateProcessing":
        return {number for token in processor["special_tokens"].values() for number in token["ids"]}
    return {processor[key][1] for key in ("sep", "cls") if key in processor}


def _renumber_post_processor(processor: dict[str, Any], new: NewIds, where: str) -> None:
    """Replace ids in a post-processor, in place."""
    kind = processor.get("type")
    if kind == "Sequence":
        for one in processor["processors"]:
            _renumber_post_processor(one, new, where)
    elif kind == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [new[number] for number in token["ids"]]
    elif kind in ("BertProcessing", "RobertaProcessing"):
        for key in ("sep", "cls"):
            token, number = processor[key]
            processor[key] = [token, new[number]]
    elif kind != "ByteLevel":
        raise UnsupportedModelError(
            "a cut of the vocabulary does not know this post-processor",
            where=where,
            expected="TemplateProcessing, RobertaProcessing, BertProcessing, ByteLevel or a Sequence of them",
            found=str(kind),
        )
