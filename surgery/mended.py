"""What became of a mended layer, and its tensors as they will be written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.repair import Repair
from surgery.skeleton import Skeleton


@dataclass(frozen=True)
class Change:
    """What was added to some `columns` [K] of a matrix W [D, F], [D, K], or to a bias [D] where there are none.

    `transposed`: memory holds W the other way round; `expert` its place in a stack, None for a matrix by itself.
    """

    added: torch.Tensor
    columns: torch.Tensor | None = None
    transposed: bool = False
    expert: int | None = None


@dataclass
class MendedLayer:
    """What became of one layer: repairs by FFN, that of the attention's output, and changed parameters by name.

    `parameters` are paths inside the layer whose values in memory are no longer the checkpoint's; `changes` what was added
    to them, in more digits than memory may have, kept where what is stored is `finer`, or another dtype at all. A module
    solved for in parts has one repair for each.
    """

    ffns: dict[str, list[Repair]] = field(default_factory=dict)
    attention: list[Repair] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    changes: dict[str, list[Change]] = field(default_factory=dict)
    finer: bool = True

    def note(self, path: str, change: Change) -> None:
        """Account for a change of a parameter."""
        if self.finer:
            self.changes.setdefault(path, []).append(change)
        if path not in self.parameters:
            self.parameters.append(path)

    def as_json(self) -> dict[str, Any]:
        """The entry of `repair` in surgeon.json."""
        return {
            "ffns": {unit: _summary(found) for unit, found in self.ffns.items()},
            "attention": _summary(self.attention) if self.attention else None,
        }


def _summary(repairs: list[Repair]) -> dict[str, float | int | None]:
    """Ridge of the first part that was changed, held-out errors before the first part and after the last."""
    ridges = [found.ridge for found in repairs if found.ridge is not None]
    fields: dict[str, float | int | None] = {
        "ridge": ridges[0] if ridges else None,
        "held_out_before": repairs[0].before,
        "held_out_after": repairs[-1].after,
    }
    return fields if len(repairs) == 1 else {**fields, "parts": len(repairs)}


def stored_apart(skeleton: Skeleton) -> bool:
    """Whether any tensor of a layer is stored in another dtype than it is computed in."""
    tensors = skeleton.checkpoint.tensors
    return any(
        tensors[name].dtype != skeleton.compute_dtype(assembly.targets[0])
        for assemblies in skeleton.inside
        for assembly in assemblies
        for name in assembly.stored
    )


def layer_tensors(skeleton: Skeleton) -> set[str]:
    """Names of the stored matrices and biases that a repair may change, which can't be written as they are read."""
    biases = {
        f"{skeleton.layers_path}.{number}.{ffn.bias_name}"
        for number, ffns in enumerate(skeleton.ffns)
        for ffn in ffns
    }
    return {
        stored
        for assemblies in skeleton.inside
        for assembly in assemblies
        for stored in assembly.stored
        if len(skeleton.checkpoint.tensors[stored].shape) > 1 or assembly.targets[0] in biases
    }


def mended_tensors(
    skeleton: Skeleton,
    number: int,
    done: MendedLayer,
    late: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Take a layer's stored tensors out of `late`, with mended values where the layer has them, not cut yet."""
    prefix = f"{skeleton.layers_path}.{number}."
    mended = {prefix + name for name in done.parameters}
    found = {}
    for assembly in skeleton.inside[number]:
        for place, stored in enumerate(assembly.stored):
            tensor = late.pop(stored, None)
            if tensor is None:
                continue
            target = assembly.targets[0]
            if target in mended:
                resident = skeleton.model.get_parameter(target).data
                merged, flipped = "MergeModulelist" in assembly.steps, "Transpose" in assembly.steps
                part = resident[place] if merged else resident
                part = part.transpose(-1, -2) if flipped else part
                if resident.dtype != tensor.dtype:
                    changes = done.changes[target.removeprefix(prefix)]
                    mine = [change for change in changes if not merged or change.expert == place]
                    tensor = changed(tensor, mine, merged, flipped)
                    # memory now holds what the file will give back, with removed columns still zero
                    part.copy_(torch.where(part == 0, part, tensor.to(part)))
                else:
                    tensor = part.to(tensor.device).contiguous()
            found[stored] = tensor
    return found


def changed(tensor: torch.Tensor, changes: list[Change], merged: bool, flipped: bool) -> torch.Tensor:
    """A stored tensor with changes added in double precision: what memory held in fewer digits keeps those it has here.

    `merged`: each expert is stored apart; `flipped`: matrices are stored the other way round than they are in memory.
    """
    wide = tensor.double()
    for change in changes:
        one = wide if change.expert is None or merged else wide[change.expert]
        if change.columns is None:
            one += change.added.to(wide)
        else:
            upright = one.T if change.transposed != flipped else one
            upright[:, change.columns.to(wide.device)] += change.added.to(wide)
    return wide.to(tensor.dtype)
