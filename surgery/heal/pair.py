"""Which student may be healed by which teacher; refused before any work where that can't be."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from surgery.checkpoint.manifest import MANIFEST
from surgery.checkpoint.transformers_model import load_tokenizer
from surgery.cut.vocabulary import vocabulary_rows
from surgery.engine.open_model import Model
from surgery.errors import UnsupportedModelError, UsageError


def student_manifest(student: Model) -> dict[str, Any] | None:
    """The surgeon.json of a student, None for a folder that surgeon did not write.

    Raises UsageError for what is no local folder, UnsupportedModelError for a quantised or padded one.
    """
    if student.folder is None:
        raise UsageError("only a local folder can be healed", where=student.name)
    if MANIFEST not in student.checkpoint.file_names:
        return None
    manifest: dict[str, Any] = student.checkpoint.read_json(MANIFEST)
    if "quantization" in manifest:
        raise UnsupportedModelError(
            "a quantised folder can't be trained",
            where=student.name,
            next_step="heal the folder that it was made from, then quantise that",
        )
    if manifest.get("plan", {}).get("padded"):
        raise UnsupportedModelError(
            "training would fill the zeros of a padded folder",
            where=student.name,
            next_step="heal a folder pruned without --pad",
        )
    return manifest


def teacher_name(
    student: Model, manifest: dict[str, Any] | None, option: str = "--teacher"
) -> tuple[str, str | None]:
    """(Folder or Hub id, revision) of the source of a folder surgeon wrote.

    A source that was a local folder is looked for beside the student. Raises UsageError if it is not there;
    `option` is what names it then.
    """
    if manifest is None:
        raise UsageError(
            "surgeon did not write this folder, so its teacher is not known",
            where=student.name,
            next_step=f"name the dense model with {option}",
        )
    source = manifest["source"]
    if "/" in source["name"]:
        return source["name"], source["revision"]
    assert student.folder is not None
    beside = student.folder.absolute().parent / source["name"]
    if not beside.exists():
        raise UsageError(
            "the model this folder was made from is not beside it",
            where=student.name,
            expected=source["name"],
            next_step=f"name it with {option}",
        )
    return str(beside), None


def shared_tokens(student: Model, teacher: Model) -> torch.Tensor | None:
    """The teacher's id of every row of the student's vocabulary, [V], -1 for a row without a token.

    None where both have the same tokens and as many rows. A student may have fewer tokens, as with
    `--keep-vocabulary`; ids are matched by the tokens' texts. Raises UsageError for a student with a token
    that the teacher does not have.
    """
    words = [load_tokenizer(model.checkpoint).get_vocab() for model in (student, teacher)]
    rows = [vocabulary_rows(model.meta_model) for model in (student, teacher)]
    if words[0] == words[1] and rows[0] == rows[1]:
        return None
    unknown = [word for word in words[0] if word not in words[1]]
    if unknown:
        raise UsageError(
            "teacher and student have different tokenizers",
            where=student.name,
            expected=f"tokens of {teacher.name}",
            found=f"{len(unknown)} others, as {unknown[0]!r}",
            next_step="name the model this folder was made from with --teacher",
        )
    ids = torch.full((rows[0],), -1)
    for word, number in words[0].items():
        if number < rows[0] and words[1][word] < rows[1]:
            ids[number] = words[1][word]
    return ids


def check_known(rows: torch.Tensor | None, ids: torch.Tensor, student: Model, teacher: Model) -> None:
    """Raise UsageError for text `ids` [N, T] of the student with a token that the teacher has no row for."""
    if rows is None or not (rows[ids] < 0).any():
        return
    first = int(ids[rows[ids] < 0][0])
    raise UsageError(
        "the teacher has no embedding of a token in the text",
        where=teacher.name,
        found=repr(load_tokenizer(student.checkpoint).convert_ids_to_tokens(first)),
        next_step="leave that token out of the text, or use --cross-entropy 1, which needs no teacher",
    )


def tokens_digest(rows: torch.Tensor | None) -> str | None:
    """A digest of what `shared_tokens` returns, None for None."""
    return None if rows is None else hashlib.sha256(rows.numpy().tobytes()).hexdigest()
