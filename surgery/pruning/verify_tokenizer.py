"""Verification of a tokenizer whose vocabulary was cut."""

from __future__ import annotations

from typing import Any

import torch

from surgery.checkpoint.transformers_model import load_tokenizer
from surgery.engine.open_model import Model
from surgery.errors import CheckpointError

# spaces, contractions, digits, code, other scripts, marks that combine, emoji of several code points
STRANGE = (
    "  The naïve café isn't 3.14159 %\n\n\tdef f(x): return x**2  # ≠ 2x\r\n",
    "Zażółć gęślą jaźń; Привет, мир! 你好，世界。 こんにちは 안녕하세요 مرحبا שלום",
    "e\u0301 e ﬁ ﬀ ½ ™ \u200b\u00a0\u3000 👩‍👩‍👧‍👦 🏳️‍🌈 🇺🇳 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010fffd \x00\x7f",
)


def check_tokenizer(source: Any, written: Model, tokens: torch.Tensor) -> None:
    """Raise CheckpointError unless the written tokenizer has the source's tokens under their new ids.

    `tokens` are the old ids that stay. Every token and the special tokens must be where they belong, and text
    that is encoded and decoded must come out as it did before.
    """
    new = {old: place for place, old in enumerate(tokens.tolist())}
    loaded = load_tokenizer(written.checkpoint)
    expected = {token: new[old] for token, old in source.get_vocab().items() if old in new}
    found = loaded.get_vocab()
    differing = sorted(
        token for token in expected.keys() | found.keys() if expected.get(token) != found.get(token)
    )
    if differing:
        token = differing[0]
        raise _wrong("a token has another id", repr(token), str(expected.get(token)), str(found.get(token)))
    for name in ("bos", "eos", "pad", "unk"):
        before, after = (getattr(one, f"{name}_token_id", None) for one in (source, loaded))
        if after != (None if before is None else new.get(before)):
            raise _wrong(f"{name}_token_id is another token", written.name, str(before), str(after))
    for text in STRANGE:
        before, after = (one.decode(one(text)["input_ids"]) for one in (source, loaded))
        if before != after:
            raise _wrong("text is not what it was after encoding and decoding", written.name, before, after)


def _wrong(what: str, where: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer of the smaller vocabulary is wrong: {what}",
        where=where,
        expected=expected,
        found=found,
        next_step="leave the vocabulary whole (prune without vocab in --cuts), and report this model",
    )
