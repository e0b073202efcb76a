"""Rows of the vocabulary: token embeddings and output logits of tokens that go, and every file that names
token ids.

The tokens that stay keep their order; their new ids are their places in it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from surgery.cut.config_width import set_width
from surgery.cut.groups import Cut, Group, Kept
from surgery.cut.tensors import Take, TensorEdit, joined_edits
from surgery.errors import UnsupportedModelError
from surgery.model.meta_model import MetaModel
from surgery.plan.kind_plan import VOCABULARY, KindPlan
from surgery.vocabulary.files import read_tokenizer, vocabulary_files
from surgery.vocabulary.token_ids import new_ids, with_new_ids

KEY = "vocab_size"


@dataclass(frozen=True)
class VocabularyRows:
    """The `rows` of a model's vocabulary; no group of a layer belongs to it."""

    rows: int

    def groups(self, meta_model: MetaModel) -> list[Group]:  # noqa: ARG002 (no layer has a vocabulary)
        """No groups: nothing of a layer goes."""
        return []

    def edits(self, meta_model: MetaModel, kept: Kept) -> dict[str, TensorEdit]:
        """Rows of the embedding, of the output head and its bias, and of such tensors beside the model."""
        rows = kept[VOCABULARY]
        return {name: TensorEdit(name, (Take(0, rows),)) for name in vocabulary_tensors(meta_model)}

    def config(self, config: dict[str, Any], kept: Kept) -> dict[str, Any]:
        """config.json with the new size, and every token id in it replaced."""
        rows = kept[VOCABULARY]
        config = with_new_ids(copy.deepcopy(config), new_ids(rows.tolist()), "config.json")
        set_width(config, KEY, self.rows, len(rows))
        if config.get(KEY) == self.rows:  # multimodal configs may repeat it beside the language model's
            config[KEY] = len(rows)
        return config


def onto(meta_model: MetaModel, cut: Cut, part: KindPlan) -> Cut:
    """`cut` with only the rows of the vocabulary that `part` keeps.

    Raises UnsupportedModelError for a model or a tokenizer whose vocabulary can't be cut.
    """
    rows = part.kept[VOCABULARY]
    kind = VocabularyRows(vocabulary_rows(meta_model))
    files, left_out = vocabulary_files(meta_model.checkpoint, rows.tolist())
    return replace(
        cut,
        kept=cut.kept | part.kept,
        edits=joined_edits(cut.edits, kind.edits(meta_model, part.kept)),
        config=kind.config(cut.config, part.kept),
        files=cut.files | files,
        left_out=(*cut.left_out, *left_out),
        tokens=rows,
    )


def check_vocabulary(meta_model: MetaModel) -> None:
    """Raise UnsupportedModelError, from headers, config and tokenizer, for a vocabulary that can't be cut."""
    count = vocabulary_rows(meta_model)
    vocabulary_tensors(meta_model)
    read_tokenizer(meta_model.checkpoint).check_rows(count)
    vocabulary_files(meta_model.checkpoint, list(range(count)))
    VocabularyRows(count).config(meta_model.checkpoint.config, {VOCABULARY: torch.arange(count)})


def vocabulary_rows(meta_model: MetaModel) -> int:
    """Rows of the embedding: the vocabulary with its padding."""
    return int(meta_model.model.get_input_embeddings().weight.shape[0])


def vocabulary_tensors(meta_model: MetaModel) -> list[str]:
    """Names of the stored tensors with one row for each token.

    They are the embedding, the output head, and matrices of that shape beside the model: the embedding and
    the head of a layer of multi-token prediction. Raises UnsupportedModelError for any other tensor outside
    the layers that runs over the vocabulary (a drafter's table of tokens).
    """
    rows, model = vocabulary_rows(meta_model), meta_model.model
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    own = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if id(module) in ends
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.shape[0] == rows
    }
    found = []
    tensors = meta_model.checkpoint.tensors
    for parameter in meta_model.other_parameters:
        inside = parameter.targets[0] in own and parameter.converter is None
        for name in parameter.stored:
            if inside:
                found.append(name)
            elif rows in tensors[name].shape:
                raise _not_rows(name, tensors[name].shape)
    hidden = {tensors[name].shape[1:] for name in found}
    for name in sorted(meta_model.beside):
        shape = tensors[name].shape
        if shape[:1] == (rows,) and shape[1:] in hidden and name.endswith(".weight"):
            found.append(name)
        elif rows in shape:
            raise _not_rows(name, shape)
    return found


def _not_rows(name: str, shape: tuple[int, ...]) -> UnsupportedModelError:
    return UnsupportedModelError(
        "a tensor runs over the vocabulary that is neither embedding nor output head, so the vocabulary "
        "can't be cut",
        where=name,
        found=str(list(shape)),
        next_step="leave the vocabulary whole: prune without vocab in --cuts",
    )
