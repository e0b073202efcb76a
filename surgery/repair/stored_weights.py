"""What a repair changed in a layer, and the layer's stored tensors with these changes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from surgery.model.meta_model import MetaModel
from surgery.repair.least_squares import Refit
from surgery.repair.methods import RepairMethod


@dataclass(frozen=True)
class WeightDelta:
    """What was added to some `columns` [K] of a matrix W [D, F], [D, K], or to a bias, [D], where there are
    none.

    `transposed`: memory holds W as [F, D]; `expert`: its index in a stack, None for a matrix by itself.
    """

    added: torch.Tensor
    columns: torch.Tensor | None = None
    transposed: bool = False
    expert: int | None = None

    def at_the_place_of(self, other: WeightDelta) -> bool:
        """Whether both change the same numbers."""
        if self.expert != other.expert or self.columns is None or other.columns is None:
            return self.expert == other.expert and self.columns is other.columns
        return torch.equal(self.columns, other.columns)


@dataclass
class LayerRepairResult:
    """What was repaired in one layer: refits by FFN, refits of the attention's output, and changed parameters
    by name.

    Of routed experts refitted together: `lacking`, before each pass, is the mean over held-out tokens of
    w ||dense - pruned stream after the layer||^2, with the token's weight w; `experts_changed` of them were.

    `parameters` are paths inside the layer whose values in memory differ from the checkpoint's. `deltas` are
    what was added to them, in float64, kept where `keeps_deltas`: where tensors are stored in another dtype
    than memory has. A matrix solved for in column blocks has one refit for each.
    """

    ffns: dict[str, list[Refit]] = field(default_factory=dict)
    lacking: list[float] = field(default_factory=list)
    experts_changed: int = 0
    attention: list[Refit] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    deltas: dict[str, list[WeightDelta]] = field(default_factory=dict)
    keeps_deltas: bool = True

    def note(self, path: str, delta: WeightDelta) -> None:
        """Record a change of a parameter."""
        if self.keeps_deltas:
            own = self.deltas.setdefault(path, [])
            place = next((i for i, one in enumerate(own) if one.at_the_place_of(delta)), None)
            if place is None:
                own.append(delta)
            else:  # of an earlier pass
                own[place] = replace(delta, added=own[place].added + delta.added)
        if path not in self.parameters:
            self.parameters.append(path)

    def as_json(self) -> dict[str, Any]:
        """The entry of `repair` in surgeon.json."""
        return {
            "ffns": {name: _summary(found) for name, found in self.ffns.items()},
            "attention": _summary(self.attention) if self.attention else None,
            **(
                {"experts": {"lacking": self.lacking, "changed": self.experts_changed}}
                if self.lacking
                else {}
            ),
        }


def _summary(refits: list[Refit]) -> dict[str, float | int | None]:
    """Ridge of the first changed block, held-out errors before the first block and after the last."""
    ridges = [found.ridge for found in refits if found.ridge is not None]
    fields: dict[str, float | int | None] = {
        "ridge": ridges[0] if ridges else None,
        "held_out_before": refits[0].before,
        "held_out_after": refits[-1].after,
    }
    return fields if len(refits) == 1 else {**fields, "parts": len(refits)}


def repairable_tensors(meta_model: MetaModel, method: RepairMethod) -> set[str]:
    """Names of the stored matrices and biases that a repair may change, which can't be written as they are
    read: those of layers, and the vectors outside of them where the final norm may be scaled.
    """
    tensors = meta_model.checkpoint.tensors
    others = {
        stored
        for stored_parameter in meta_model.other_parameters
        for stored in stored_parameter.stored
        if method.scales_final_norm and len(tensors[stored].shape) == 1
    }
    biases = {
        f"{meta_model.layers_path}.{number}.{ffn.bias_name}"
        for number, ffns in enumerate(meta_model.ffns)
        for ffn in ffns
    }
    return others | {
        stored
        for stored_parameters in meta_model.layer_parameters
        for stored_parameter in stored_parameters
        for stored in stored_parameter.stored
        if len(tensors[stored].shape) > 1 or stored_parameter.targets[0] in biases
    }


def repaired_tensors(
    meta_model: MetaModel, number: int, result: LayerRepairResult, deferred: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Take a layer's stored tensors out of `deferred`, with repaired values where the layer has them, not cut
    yet.
    """
    prefix = f"{meta_model.layers_path}.{number}."
    repaired = {prefix + name for name in result.parameters}
    found = {}
    for stored_parameter in meta_model.layer_parameters[number]:
        for place, stored in enumerate(stored_parameter.stored):
            tensor = deferred.pop(stored, None)
            if tensor is None:
                continue
            target = stored_parameter.targets[0]
            if target in repaired:
                resident = meta_model.model.get_parameter(target).data
                merged = "MergeModulelist" in stored_parameter.steps
                flipped = "Transpose" in stored_parameter.steps
                part = resident[place] if merged else resident
                part = part.transpose(-1, -2) if flipped else part
                if resident.dtype != tensor.dtype:
                    deltas = result.deltas[target.removeprefix(prefix)]
                    mine = [delta for delta in deltas if not merged or delta.expert == place]
                    tensor = with_deltas(tensor, mine, merged, flipped)
                    # memory now holds what the file will give back, with removed columns still zero
                    part.copy_(torch.where(part == 0, part, tensor.to(part)))
                else:
                    tensor = part.to(tensor.device).contiguous()
            found[stored] = tensor
    return found


def with_deltas(tensor: torch.Tensor, deltas: list[WeightDelta], merged: bool, flipped: bool) -> torch.Tensor:
    """A stored tensor with deltas added in double precision, so that it keeps the digits memory does not
    have.

    `merged`: each expert is a stored tensor of its own; `flipped`: matrices are stored transposed to memory's
    layout.
    """
    wide = tensor.double()
    for delta in deltas:
        one = wide if delta.expert is None or merged else wide[delta.expert]
        if delta.columns is None:
            one += delta.added.to(wide)
        else:
            upright = one.T if delta.transposed != flipped else one
            upright[:, delta.columns.to(wide.device)] += delta.added.to(wide)
    return wide.to(tensor.dtype)
