"""The files of a checkpoint that name token ids, rewritten for a smaller vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any
from weakref import WeakKeyDictionary

from surgery.checkpoint.reader import Checkpoint
from surgery.errors import UnsupportedModelError
from surgery.vocabulary.merges import merge_pairs
from surgery.vocabulary.token_ids import NewIds, new_ids, with_new_added_tokens, with_new_ids
from surgery.vocabulary.tokenizer_json import FILE, TokenizerJson

# The vocabulary in other forms; without them AutoTokenizer, vLLM and llama.cpp read tokenizer.json.
OTHER_FORMS = ("*.model", "*.tiktoken", "tekken.json", "vocab.txt", "*.vocab", "*.spm", "*.bpe")
VOCAB, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
Files = tuple[dict[str, str], list[str]]
LATEST: WeakKeyDictionary[Checkpoint, tuple[tuple[int, ...], Files]] = WeakKeyDictionary()
ID_CONFIGS = ("generation_config.json", "processor_config.json", "preprocessor_config.json")
TOKENIZER_CONFIG = "tokenizer_config.json"


def vocabulary_files(checkpoint: Checkpoint, kept: Sequence[int]) -> Files:
    """(File name -> new text, names of files to leave out) for the tokens with the old ids `kept`, sorted.

    A search asks for the same ones many times, so the latest are remembered. Raises UnsupportedModelError for
    a tokenizer that has no tokenizer.json, or one that can't be cut.
    """
    found = LATEST.get(checkpoint)
    if found is None or found[0] != tuple(kept):
        found = LATEST[checkpoint] = tuple(kept), _rewritten(checkpoint, kept)
    return found[1]


def _rewritten(checkpoint: Checkpoint, kept: Sequence[int]) -> Files:
    new, names = new_ids(kept), checkpoint.other_files
    source = read_tokenizer(checkpoint)
    fields = source.reduced(new)
    texts = {FILE: _json(fields)}
    left_out = [name for name in names if _is_other_form(name)]
    for name in ID_CONFIGS:
        if name in names:
            texts[name] = _json(with_new_ids(checkpoint.read_json(name), new, name))
    if TOKENIZER_CONFIG in names:
        said = checkpoint.read_json(TOKENIZER_CONFIG)
        texts[TOKENIZER_CONFIG] = _json(with_new_added_tokens(said, new, TOKENIZER_CONFIG))
    for name, text in (
        (ADDED, _subset(checkpoint, ADDED, new)),
        (VOCAB, _subset(checkpoint, VOCAB, new)),
        (MERGES, _merges(fields)),
    ):
        if name not in names:
            continue
        if text is None:
            left_out.append(name)
        else:
            texts[name] = text
    return texts, sorted(left_out)


def read_tokenizer(checkpoint: Checkpoint) -> TokenizerJson:
    """The checkpoint's tokenizer.json. Raises UnsupportedModelError where it has none or it can't be cut."""
    if FILE not in checkpoint.other_files:
        forms = [name for name in checkpoint.other_files if _is_other_form(name) or name == VOCAB]
        raise UnsupportedModelError(
            "only a tokenizer.json can be rewritten for a smaller vocabulary, and there is none",
            where=checkpoint.name,
            expected=FILE,
            found=", ".join(forms),
            next_step="load the tokenizer with AutoTokenizer, save it with save_pretrained, and put its "
            "tokenizer.json beside config.json",
        )
    return TokenizerJson(checkpoint.read_json(FILE))


def _is_other_form(name: str) -> bool:
    return any(fnmatch(PurePosixPath(name).name, form) for form in OTHER_FORMS)


def _subset(checkpoint: Checkpoint, name: str, new: NewIds) -> str | None:
    """A file of tokens and their ids with the new ids; None where it is none."""
    if name not in checkpoint.other_files:
        return None
    fields = checkpoint.read_json(name)
    if not isinstance(fields, dict) or not all(isinstance(number, int) for number in fields.values()):
        return None
    return _json({token: new[number] for token, number in fields.items() if number in new})


def _merges(fields: dict[str, Any]) -> str | None:
    """merges.txt, which old tokenizer classes read beside vocab.json; None without merges."""
    if "merges" not in fields["model"]:
        return None
    lines = [f"{left} {right}" for left, right in merge_pairs(fields["model"])]
    return "\n".join(["#version: 0.2", *lines]) + "\n"


def _json(fields: Any) -> str:
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
