"""What a cut is: groups of members, which members stay, and a kind that turns that into edits of tensors and
config.

Everything after the plan (writer, repair of what stays, verification, comparison) sees a `Cut` and nothing of
its kind. To add a kind of cut, write a class with the three methods of `CutKind`; `ffn_channels.py` is the
first one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from surgery.cut.tensors import TensorEdit, joined_edits
from surgery.model.meta_model import LayerEdit, MetaModel
from surgery.model.slices import Slice

GroupKey = tuple[int, str]  # (layer, name of the group in its layer)
Kept = dict[GroupKey, torch.Tensor]  # sorted members that stay, [K] int64


@dataclass(frozen=True)
class Group:
    """`size` members of one decoder layer that can go one by one: the channels of an FFN, the heads of an
    attention.

    `name` is unique in the layer. `slices` are all parts of the layer's parameters that belong to the
    members. `consumers` are those slices, input columns of a linear, through which the members reach the
    residual stream: with these columns set to zero the model computes what it will without the members.
    """

    layer: int
    name: str
    size: int
    slices: tuple[Slice, ...]
    consumers: tuple[Slice, ...]

    @property
    def key(self) -> GroupKey:
        """(layer, name)."""
        return self.layer, self.name


class CutKind(Protocol):
    """What can be cut out of a model, and how that is written."""

    def groups(self, meta_model: MetaModel) -> list[Group]:
        """All groups of this kind in a model."""

    def edits(self, meta_model: MetaModel, kept: Kept) -> dict[str, TensorEdit]:
        """Stored tensor name -> its edit; tensors without one are written as they are."""

    def config(self, config: dict[str, Any], kept: Kept) -> dict[str, Any]:
        """The content of config.json after the cut."""


@dataclass(frozen=True)
class Cut:
    """One cut of one model: what stays, edits by stored tensor name, and the config.json and files that go
    with it.

    `skipped` are the layers that the result does not have: hidden states pass them by. `tokens` [V'] are the
    old ids of the tokens that stay, in the order of the new ids; None where the vocabulary stays whole.
    `left_out` are files of the source that the result does not have. `reroute` masks experts that go in a
    resident layer, before what stays is refitted.
    """

    groups: tuple[Group, ...]
    kept: Kept
    edits: dict[str, TensorEdit]
    config: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    skipped: frozenset[int] = frozenset()
    tokens: torch.Tensor | None = None
    left_out: tuple[str, ...] = ()
    reroute: LayerEdit | None = None


def make_cut(kind: CutKind, meta_model: MetaModel, kept: Kept, files: dict[str, str] | None = None) -> Cut:
    """A cut of `kind`. Raises PlanError when `kept` names members that a group does not have."""
    groups = tuple(kind.groups(meta_model))
    return Cut(
        groups,
        kept,
        kind.edits(meta_model, kept),
        kind.config(meta_model.checkpoint.config, kept),
        files or {},
    )


def add_kind(
    cut: Cut,
    kind: CutKind,
    meta_model: MetaModel,
    kept: Kept,
    *,
    files: dict[str, str] | None = None,
    skipped: frozenset[int] = frozenset(),
) -> Cut:
    """A cut made so far with another kind added: what either removes is removed.

    `files` and `skipped` are those of the added kind. Raises PlanError when `kept` names members that a group
    does not have.
    """
    return replace(
        cut,
        groups=(*cut.groups, *kind.groups(meta_model)),
        kept=cut.kept | kept,
        edits=joined_edits(cut.edits, kind.edits(meta_model, kept)),
        config=kind.config(cut.config, kept),
        files=cut.files | (files or {}),
        skipped=cut.skipped | skipped,
    )
