"""A fast tokenizer of transformers as GGUF keys.

llama.cpp has two algorithms for it. `gpt2` is byte-level BPE, which splits text by a pattern first; llama.cpp
knows patterns by name (`tokenizer.ggml.pre`), so the pattern must be one of PATTERNS. `llama` is
SentencePiece's BPE, which merges the pair whose piece has the highest score; a piece's score is the place of
its merges in the list.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.transformers_model import load_tokenizer
from surgery.errors import UnsupportedModelError
from surgery.vocabulary.merges import merge_pairs
from surgery.vocabulary.tokenizer_json import BYTE_TOKEN

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_WHITESPACE = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ANY_LETTER = r"[^\r\n\p{L}\p{N}]?"
# (pattern, "digits" and the usual GPT-2 pattern, or GPT-2's alone) -> llama.cpp's name and whether it takes a
# whole word from the vocabulary before it merges (`ignore_merges`)
PATTERNS: dict[str, tuple[str, bool]] = {
    "gpt-2": ("gpt-2", False),
    "digits, gpt-2": ("smollm", False),
    _CONTRACTIONS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _WHITESPACE: ("llama-bpe", True),
    _CONTRACTIONS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _WHITESPACE: ("qwen2", False),
    f"{_ANY_LETTER}{_UPPER}*{_LOWER}+|{_ANY_LETTER}{_UPPER}+{_LOWER}*"
    + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    + _WHITESPACE: ("tekken", True),
}
UNREACHED = -1e6  # the score of a piece that no merge makes
NO_MERGE = "no merge"  # llama.cpp wants a list; a pair of words never meets among single characters


@dataclass(frozen=True)
class Vocabulary:
    """Keys under `tokenizer.` and sentences on what llama.cpp does otherwise."""

    keys: dict[str, Any]
    notes: tuple[str, ...] = field(default=())


def vocabulary(checkpoint: Checkpoint, rows: int) -> Vocabulary:
    """The keys of the checkpoint's tokenizer, its tokens filled up to the `rows` of the embedding.

    Raises UnsupportedModelError for a tokenizer that llama.cpp would not split text by.
    """
    tokenizer = load_tokenizer(checkpoint)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(checkpoint, "a tokenizer without tokenizer.json", type(tokenizer).__name__)
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model.get("type") != "BPE":
        raise _refused(checkpoint, "a tokenizer that is not BPE", str(model.get("type")))
    tokens = _tokens(checkpoint, parts, rows)
    merges = [" ".join(pair) for pair in merge_pairs(model)]
    keys: dict[str, Any] = {"ggml.tokens": [text for text, _ in tokens]}
    notes: list[str] = []
    if model.get("byte_fallback"):
        keys |= _sentencepiece(checkpoint, parts, keys["ggml.tokens"])
    else:
        name = _pattern_name(checkpoint, parts)
        keys |= {"ggml.model": "gpt2", "ggml.pre": name, "ggml.merges": merges or [NO_MERGE]}
        if parts.get("normalizer") is not None:
            notes.append(f"llama.cpp does not normalise text ({parts['normalizer']['type']})")
    keys["ggml.token_type"] = _types(tokens, keys["ggml.model"] == "llama", tokenizer.unk_token_id)
    keys |= _special(checkpoint, tokenizer)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        keys["chat_template"] = template
    return Vocabulary(keys, tuple(notes))


def _tokens(checkpoint: Checkpoint, parts: dict[str, Any], rows: int) -> list[tuple[str, int]]:
    """(text, type) of each row of the embedding; those beyond the tokenizer's tokens are unused."""
    tokens: dict[int, tuple[str, int]] = {i: (text, NORMAL) for text, i in parts["model"]["vocab"].items()}
    for added in parts.get("added_tokens") or []:
        tokens[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if tokens and max(tokens) >= rows:
        raise _refused(
            checkpoint, "a tokenizer with more tokens than the embedding has rows", f"token {max(tokens)}"
        )
    return [tokens.get(i, (f"[PAD{i}]", UNUSED)) for i in range(rows)]


def _types(tokens: list[tuple[str, int]], sentencepiece: bool, unknown: int | None) -> list[int]:
    types = [kind for _, kind in tokens]
    if sentencepiece:
        for i, (text, kind) in enumerate(tokens):
            if kind == NORMAL and BYTE_TOKEN.fullmatch(text):
                types[i] = BYTE
        if unknown is not None:
            types[unknown] = UNKNOWN
    return types


def _pattern_name(checkpoint: Checkpoint, parts: dict[str, Any]) -> str:
    """llama.cpp's name of the pattern that the tokenizer splits text by."""
    pattern = _pattern(parts.get("pre_tokenizer"))
    normaliser = (parts.get("normalizer") or {}).get("type", "NFC")
    found = PATTERNS.get(pattern or "")
    ignores = bool(parts["model"].get("ignore_merges"))
    if found is None or found[1] != ignores or normaliser != "NFC":
        what = "a tokenizer that splits text in a way surgeon has no llama.cpp name for"
        raise _refused(checkpoint, what, json.dumps(parts.get("pre_tokenizer"))[:200])
    return found[0]


def _pattern(pre: dict[str, Any] | None) -> str | None:
    """The pattern of a byte-level pre_tokenizer as PATTERNS has it, else None."""
    steps = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    *before, last = steps
    if last["use_regex"]:
        if not before:
            return "gpt-2"
        digits = [{"type": "Digits", "individual_digits": True}]
        return "digits, gpt-2" if before == digits else None
    if len(before) != 1 or before[0]["type"] != "Split" or before[0]["behavior"] != "Isolated":
        return None
    pattern: str | None = before[0]["pattern"].get("Regex")
    return None if before[0]["invert"] else pattern


def _sentencepiece(checkpoint: Checkpoint, parts: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Keys of a SentencePiece BPE. Raises UnsupportedModelError where its merges follow from no scores.

    llama.cpp merges two neighbours wherever their text is a piece. That is the tokenizer's own result if
    every such pair is in the list of merges, and all pairs of a piece follow each other there.
    """
    vocab = parts["model"]["vocab"]
    pairs = merge_pairs(parts["model"])
    scores: dict[str, float] = {}
    last = None
    for place, (left, right) in enumerate(pairs):
        piece = left + right
        if piece != last and piece in scores:
            raise _refused(checkpoint, "merges that are not in the order of scores", repr(piece))
        scores.setdefault(piece, -float(place))
        last = piece
    listed = {*pairs}
    for piece in scores:
        for i in range(1, len(piece)):
            pair = (piece[:i], piece[i:])
            if pair[0] in vocab and pair[1] in vocab and pair not in listed:
                raise _refused(checkpoint, "a pair of pieces without a merge", repr(pair))
    prefix = _adds_space(checkpoint, parts)
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.scores": [scores.get(token, UNREACHED) for token in tokens],
        "ggml.add_space_prefix": prefix,
    }


def _adds_space(checkpoint: Checkpoint, parts: dict[str, Any]) -> bool:
    """Whether a space is put before the text; refuses a normaliser that does more than mark spaces."""
    normaliser, pre = parts.get("normalizer"), parts.get("pre_tokenizer")
    steps = [] if normaliser is None else normaliser.get("normalizers", [normaliser])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if pre is None and steps in ([{"type": "Prepend", "prepend": "▁"}, replace], [replace]):
        return len(steps) == 2
    whole = pre is not None and pre["type"] == "Metaspace" and not pre.get("split", True)
    if pre is not None and whole and not steps and pre["replacement"] == "▁":
        return str(pre.get("prepend_scheme", "always")) != "never"
    raise _refused(
        checkpoint, "a normaliser that llama.cpp does not have", json.dumps(normaliser or pre)[:200]
    )


def _special(checkpoint: Checkpoint, tokenizer: Any) -> dict[str, Any]:
    """Ids of special tokens, and which of them are put around a text, as the tokenizer does it."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}
    keys = {}
    for name, key in names.items():
        token = getattr(tokenizer, f"{name}_token_id", None)
        if token is not None:
            keys[f"ggml.{key}_token_id"] = int(token)
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    before, after = (whole[: starts[0]], whole[starts[0] + len(bare) :]) if starts else (whole, [])
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise _refused(checkpoint, "a tokenizer that puts other tokens around a text", str(whole))
    return {**keys, "ggml.add_bos_token": bool(before), "ggml.add_eos_token": bool(after)}


def _refused(checkpoint: Checkpoint, what: str, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"llama.cpp can't be given this tokenizer: {what}",
        where=checkpoint.name,
        found=found,
        next_step="llama.cpp's convert_hf_to_gguf.py knows more tokenizers, for uniform folders",
    )
