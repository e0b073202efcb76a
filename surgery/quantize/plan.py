"""QuantizePlan: which matrices are rounded, and where their super weights are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from surgery.errors import UnsupportedModelError, UsageError
from surgery.model.families import DENSE
from surgery.model.ffn import ffn_named
from surgery.model.meta_model import MetaModel
from surgery.quantize.rounding import Scheme

ROUTERS = ("gate", "router", "shared_expert_gate")
HANDLINGS = ("restore", "module", "none")
Places = dict[str, list[tuple[int, int]]]


@dataclass(frozen=True)
class QuantizePlan:
    """Which stored tensors are rounded, how, and where their super weights are.

    tensors: stored names of the matrices that are rounded.
    whole: stored names of the matrices that are not rounded because they contain a super weight.
    places: (row, column) of the super weights that are restored after rounding, by stored name.
    handling: one of HANDLINGS.
    clipping: whether z is chosen for each matrix by its error.
    modules: module path of each matrix, by stored name.
    ignored: module paths of the linears that are not rounded.
    """

    scheme: Scheme
    tensors: tuple[str, ...]
    whole: tuple[str, ...]
    places: Places
    handling: str
    clipping: bool
    modules: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def plan_quantization(
    meta_model: MetaModel,
    weights: list[dict[str, Any]],
    scheme: Scheme,
    handling: str = "restore",
    clipping: bool = False,
) -> QuantizePlan:
    """Plan to round every matrix of a linear in the decoder layers.

    Norms, embeddings, routers and the head are not rounded. `weights` are super weights (`layer`, `ffn`,
    `row`, `column`). Raises UnsupportedModelError for a model whose linears are stored transposed or whose
    experts are stored as one tensor, and UsageError for an unknown `handling`.
    """
    check_roundable(meta_model)
    if handling not in HANDLINGS:
        raise UsageError("unknown handling of super weights", expected=", ".join(HANDLINGS), found=handling)
    names: list[str] = []
    owners: dict[str, str] = {}
    for stored_parameter in (
        a for stored_parameters in meta_model.layer_parameters for a in stored_parameters
    ):
        for stored in stored_parameter.stored:
            *parts, last = stored.split(".")
            matrix = len(meta_model.checkpoint.tensors[stored].shape) == 2 and last == "weight"
            if matrix and not set(parts) & set(ROUTERS) and "norm" not in parts[-1]:
                names.append(stored)
        if len(stored_parameter.stored) == 1:
            owners[stored_parameter.stored[0]] = stored_parameter.targets[0].removesuffix(".weight")
    places: Places = {}
    for weight in weights if handling != "none" else []:
        if weight["column"] is None:  # removed, perhaps with its layer
            continue
        name = stored_name(meta_model, weight)
        if name in names:
            places.setdefault(name, []).append((weight["row"], weight["column"]))
    whole = tuple(sorted(places)) if handling == "module" else ()
    kept = places if handling == "restore" else {}
    chosen = tuple(n for n in names if n not in whole)
    rounded = {owners[name] for name in chosen if name in owners}
    linears = [n for n, m in meta_model.model.named_modules() if type(m).__name__ == "Linear"]
    ignored = tuple(name for name in linears if name not in rounded)
    tensors = meta_model.checkpoint.tensors
    # matrices beside the model are not rounded, which other runtimes have to know
    beside = sorted(name for name in meta_model.beside if len(tensors[name].shape) == 2)
    ignored += tuple(name.removesuffix(".weight") for name in beside)
    return QuantizePlan(scheme, chosen, whole, kept, handling, clipping, owners, ignored)


def check_roundable(meta_model: MetaModel) -> None:
    """Raise UnsupportedModelError for a model whose matrices can't be rounded one by one."""
    name, reason = meta_model.checkpoint.name, ""
    if any(type(module).__name__ == "Conv1D" for module in meta_model.model.modules()):
        reason = "linears stored transposed (Conv1D) are not quantised yet"
    for number, ffns in enumerate(meta_model.ffns):
        for ffn in ffns:
            if ffn.stacked and len(meta_model.stored_parameter(number, ffn.down_name).stored) == 1:
                reason = "experts stored as one tensor are not quantised yet"
    if reason:
        raise UnsupportedModelError(reason, where=name)


def stored_name(meta_model: MetaModel, weight: dict[str, Any]) -> str:
    """Stored name of the down projection that contains a super weight."""
    ffn = ffn_named(meta_model.ffns[weight["layer"]], weight.get("ffn", DENSE))
    stored = meta_model.stored_parameter(weight["layer"], ffn.down_name).stored
    return stored[ffn.expert if ffn.expert is not None and len(stored) > 1 else 0]
