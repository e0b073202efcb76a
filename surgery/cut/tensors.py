"""Edits of stored tensors: the one place where kept indices meet weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.shard_writer import TensorSpec


@dataclass(frozen=True)
class Take:
    """The indices of one axis that stay, in order; -1 stands for zeros, where a result is padded.

    `indices` is [n], or [E, n] for a tensor that stacks E experts along its first axis, each of which takes
    its own.
    """

    axis: int
    indices: torch.Tensor


@dataclass(frozen=True)
class TensorEdit:
    """How a stored tensor is written: under which `name` (None: not at all), and which indices of which axes
    stay.
    """

    name: str | None
    takes: tuple[Take, ...] = ()

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape after the edit."""
        edited = list(shape)
        for take in self.takes:
            edited[take.axis] = take.indices.shape[-1]
        return tuple(edited)

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The edited tensor, contiguous, dtype unchanged."""
        for take in self.takes:
            if take.indices.dim() == 1:
                tensor = _take(tensor, take.axis, take.indices)
            else:
                experts = zip(tensor, take.indices, strict=True)
                tensor = torch.stack([_take(one, take.axis - 1, indices) for one, indices in experts])
        return tensor


def _take(tensor: torch.Tensor, axis: int, indices: torch.Tensor) -> torch.Tensor:
    missing = indices < 0
    taken = tensor.index_select(axis, indices.clamp_min(0)).contiguous()
    return taken.index_fill_(axis, missing.nonzero()[:, 0], 0) if missing.any() else taken


def joined_edits(first: dict[str, TensorEdit], second: dict[str, TensorEdit]) -> dict[str, TensorEdit]:
    """Both edits of every tensor: a tensor that either leaves out is not written.

    A name that the second changes wins. The two take indices of different axes.
    """
    joined = dict(first)
    for name, edit in second.items():
        other = first.get(name, TensorEdit(name))
        renamed = other.name if edit.name == name else edit.name
        gone = other.name is None or edit.name is None
        assert gone or not {one.axis for one in other.takes} & {one.axis for one in edit.takes}, name
        joined[name] = TensorEdit(None) if gone else TensorEdit(renamed, other.takes + edit.takes)
    return joined


def edited_specs(checkpoint: Checkpoint, edits: dict[str, TensorEdit]) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor that will be written, by the name it is written under."""
    specs = {}
    for entry in checkpoint.tensors.values():
        edit = edits.get(entry.name, TensorEdit(entry.name))
        if edit.name is not None:
            specs[edit.name] = TensorSpec(entry.dtype, edit.shape(entry.shape))
    return specs
