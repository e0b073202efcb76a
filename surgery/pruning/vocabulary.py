"""plan_vocabulary: which tokens of a model's vocabulary stay, by their uses in texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from surgery import defaults
from surgery.checkpoint.transformers_model import load_tokenizer
from surgery.cut.vocabulary import check_vocabulary, vocabulary_rows
from surgery.engine.open_model import Model
from surgery.errors import PlanError, UnsupportedModelError
from surgery.plan.kind_plan import VOCABULARY, KindPlan
from surgery.text import Text, open_text
from surgery.text.blocks import pieces_at_lines
from surgery.vocabulary.choice import choose_tokens
from surgery.vocabulary.files import ID_CONFIGS, read_tokenizer
from surgery.vocabulary.kept_ids import ids_text
from surgery.vocabulary.token_ids import needed_ids, new_ids
from surgery.vocabulary.tokenizer_json import TokenizerJson

COUNTED_BYTES = 8 << 20  # of each text; rarer tokens than these show do not matter much
STRETCHES = 64  # places of a larger file that is counted in parts
RESPELLED_BYTES = 1 << 18  # of each text, to tell how much longer it gets
CHAT = ("system", "user", "assistant")


@dataclass(frozen=True)
class Counts:
    """Uses [V] of every token in one text, and the start of that text."""

    name: str
    revision: str | None
    uses: np.ndarray[Any, np.dtype[np.int64]]
    text_bytes: int
    start: str


def plan_vocabulary(
    model: Model,
    keep: float,
    texts: Sequence[str] = defaults.CALIBRATION_TEXTS,
    *,
    text_column: str | None = None,
    seed: int = defaults.SEED,
) -> KindPlan:
    """Choose the tokens that stay: all that must, and of the others the most used in `texts`.

    `keep` is their number, or below 1 the share of the tokenizer's tokens. Each text counts the same, however
    long it is; up to COUNTED_BYTES of it are read. `choose_tokens` says in which order tokens go. Rows of the
    embedding without a token go too, except those that config.json names. Raises PlanError for a number
    that is too small or too large, UnsupportedModelError for a vocabulary that can't be cut, CalibrationError
    for a text that can't be read.
    """
    meta_model = model.meta_model
    check_vocabulary(meta_model)
    source, rows = read_tokenizer(model.checkpoint), vocabulary_rows(meta_model)
    vocabulary = all_tokens(model, source, rows)
    protected = protected_ids(model, source, rows)
    extra = protected - set(vocabulary.values())
    count = _number(keep, len(vocabulary) + len(extra)) - len(extra)
    counts = [_count(model, open_text(spec, load_tokenizer(model.checkpoint), text_column), rows, seed)
              for spec in texts]  # fmt: skip
    uses = sum(one.uses / max(1, one.uses.sum()) for one in counts)
    chosen = choose_tokens(
        vocabulary,
        np.asarray(uses, dtype=np.float64),
        protected - extra,
        count,
        source.parts(),
        made_whole=source.made_whole,
    )
    kept = sorted({*chosen, *extra})
    facts = {
        "before": rows,
        "after": len(kept),
        "tokens_before": len(vocabulary),
        "protected": len(protected),
        "texts": [_covered(one, kept, source) for one in counts],
        "kept_ids": ids_text(kept),
    }
    return KindPlan("vocab", {VOCABULARY: torch.tensor(kept)}, facts)


def all_tokens(model: Model, source: TokenizerJson, rows: int) -> dict[str, int]:
    """Token -> id, of the tokenizer as it is loaded, below `rows`.

    Raises UnsupportedModelError where that is not what tokenizer.json says.
    """
    tokenizer = load_tokenizer(model.checkpoint)
    said, loaded = source.vocabulary() | source.added(), tokenizer.get_vocab()
    differing = [token for token, number in said.items() if loaded.get(token) != number]
    beside = [token for token in loaded if token not in said and token not in tokenizer.get_added_vocab()]
    if not tokenizer.is_fast or differing or beside:
        raise UnsupportedModelError(
            "the tokenizer that transformers loads is not the one in tokenizer.json, so the vocabulary can't "
            "be cut",
            where=model.name,
            found=type(tokenizer).__name__,
            next_step="load it with AutoTokenizer, save it with save_pretrained, and use its files",
        )
    return {token: number for token, number in loaded.items() if number < rows}


def protected_ids(model: Model, source: TokenizerJson, rows: int) -> set[int]:
    """Ids that stay whatever the texts use.

    Added and special tokens, what config.json and the configs of generation and processors name, the tokens
    that any text can be spelled with, and those of the chat template.
    """
    checkpoint, tokenizer = model.checkpoint, load_tokenizer(model.checkpoint)
    found = source.fixed() | source.spelling() | needed_ids(checkpoint.config, rows)
    for name in ID_CONFIGS:
        if name in checkpoint.other_files:
            found |= needed_ids(checkpoint.read_json(name), rows)
    found |= {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values(), *_template_ids(tokenizer)}
    return {number for number in found if number < rows}


def _template_ids(tokenizer: Any) -> set[int]:
    """Ids that the chat template writes around messages: roles, line breaks, a default system prompt."""
    if not getattr(tokenizer, "chat_template", None):
        return set()
    found: set[int] = set()
    for roles in (CHAT, CHAT[1:], CHAT[1:2]):
        messages = [{"role": role, "content": "a"} for role in roles]
        try:
            prompt = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=roles[-1] == "user"
            )
        except Exception:  # noqa: BLE001 (a template may refuse a role; it then has no tokens for it)
            continue
        found.update(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
    return found


def _number(keep: float, tokens: int) -> int:
    count = round(keep * tokens) if keep < 1 else round(keep)
    if keep <= 0 or count > tokens:
        raise PlanError(
            "the vocabulary can't be cut to this number of tokens",
            where="--keep-vocabulary",
            expected=f"1 to {tokens:,}, or a share below 1",
            found=f"{keep:g}",
        )
    return count


def _count(model: Model, text: Text, rows: int, seed: int) -> Counts:
    """Count the tokens of one text."""
    tokenizer = load_tokenizer(model.checkpoint)
    uses, size, start = np.zeros(rows, dtype=np.int64), 0, ""
    for piece in pieces_at_lines(tokenizer, _pieces(text, seed)):
        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        uses += np.bincount(ids, minlength=rows)
        size += len(piece.encode())
        start += piece if len(start) < RESPELLED_BYTES else ""
        if size >= COUNTED_BYTES:
            break
    return Counts(text.name, text.revision, uses, size, start)


def _pieces(text: Text, seed: int) -> Iterator[str]:
    if text.size is not None and text.size > COUNTED_BYTES and text.sample is not None:
        return text.sample(COUNTED_BYTES, STRETCHES, seed)
    return text.pieces(None if text.size is not None else seed)


def _covered(counts: Counts, kept: list[int], source: TokenizerJson) -> dict[str, Any]:
    """What the manifest says of a text.

    `covered` is the share of its tokens that stay, `lengthening` how many tokens it has afterwards for one
    before, on its first RESPELLED_BYTES.
    """
    from tokenizers import Tokenizer

    total = int(counts.uses.sum())
    old, new = (Tokenizer.from_str(json.dumps(one)) for one in (source.fields, source.reduced(new_ids(kept))))
    before, after = (len(one.encode(counts.start, add_special_tokens=False).ids) for one in (old, new))
    return {
        "name": counts.name,
        "revision": counts.revision,
        "bytes": counts.text_bytes,
        "tokens": total,
        "covered": int(counts.uses[kept].sum()) / max(1, total),
        "lengthening": after / max(1, before),
    }
