"""KindPlan: what a plan cuts besides FFN channels: whole layers, attention heads, rows of the vocabulary."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.errors import PlanError

# Names of groups: a whole layer, its whole attention or FFN, its key/value heads, its routed experts.
LAYER, ATTENTION, WHOLE_FFN, KV_HEADS, EXPERTS = "layer", "attention", "whole_ffn", "kv_heads", "experts"
SUBLAYER_GROUPS = {"attention": ATTENTION, "whole-ffn": WHOLE_FFN}  # by kind
VOCABULARY = (-1, "vocab")  # the group of all tokens


@dataclass(frozen=True)
class KindPlan:
    """The part of a plan that is of one kind.

    kind: the kind's name, as in `--cuts`.
    kept: sorted members [K] int64 that stay of every group, by (layer, group name); -1 is the layer of a
        group outside the layers.
    facts: its entry in `plan.cuts` of surgeon.json.
    """

    kind: str
    kept: dict[tuple[int, str], torch.Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


def layers_plan(count: int, removed: Collection[int], **facts: Any) -> KindPlan:
    """The plan that removes whole layers of a model with `count` layers, by their numbers."""
    kept = {(number, LAYER): torch.arange(number not in removed) for number in range(count)}
    stays = [number for number in range(count) if number not in removed]
    return KindPlan("layers", kept, {"removed": sorted(removed), "kept": stays, **facts})


def sublayer_plan(kind: str, layers: Collection[int], removed: Collection[int], **facts: Any) -> KindPlan:
    """The plan that removes the attention ("attention") or the FFN ("whole-ffn") of some of `layers`, the
    numbers of those that have one.
    """
    group = SUBLAYER_GROUPS[kind]
    kept = {(number, group): torch.arange(number not in removed) for number in layers}
    return KindPlan(kind, kept, {"removed": sorted(removed), **facts})


def kv_plan(kept: Mapping[tuple[int, str], Sequence[int]], **facts: Any) -> KindPlan:
    """The plan that keeps some key/value heads of every layer, by (layer, KV_HEADS)."""
    stays = {key: torch.tensor(sorted(members)) for key, members in kept.items()}
    listed = {str(layer): sorted(members) for (layer, _), members in kept.items()}
    return KindPlan("kv", stays, {"heads": max(map(len, kept.values())), "kept": listed, **facts})


def removed_layers(parts: Iterable[KindPlan]) -> frozenset[int]:
    """Numbers of the layers that go as a whole."""
    return _gone(parts, LAYER)


def removed_attention(parts: Iterable[KindPlan]) -> frozenset[int]:
    """Numbers of the layers whose attention goes."""
    return _gone(parts, ATTENTION)


def removed_ffns(parts: Iterable[KindPlan]) -> frozenset[int]:
    """Numbers of the layers whose FFN goes."""
    return _gone(parts, WHOLE_FFN)


def check_something_stays(attention: Collection[int], ffns: Collection[int]) -> None:
    """Raise PlanError for layers that would lose both their attention and their FFN, by their numbers."""
    both = sorted(set(attention) & set(ffns))
    if both:
        raise PlanError(
            "these layers would have neither attention nor FFN",
            where="--drop-attention, --drop-ffn",
            found=", ".join(map(str, both)),
            next_step="remove them whole, with --drop-layers",
        )


def check_an_ffn_stays(have: Collection[int], gone: Collection[int]) -> None:
    """Raise PlanError where all layers that `have` an FFN are among those `gone`."""
    if set(have) <= set(gone):
        raise PlanError("at least one FFN has to stay", where="--drop-ffn, --drop-layers")


def without(kept: Mapping[tuple[int, str], torch.Tensor], group: str) -> frozenset[int]:
    """Numbers of the layers whose group of this name keeps no member."""
    return frozenset(number for (number, name), members in kept.items() if name == group and not len(members))


def _gone(parts: Iterable[KindPlan], group: str) -> frozenset[int]:
    return frozenset[int]().union(*(without(part.kept, group) for part in parts))


def with_expert_places(
    super_weights: Iterable[dict[str, Any]], parts: Iterable[KindPlan]
) -> tuple[dict[str, Any], ...]:
    """Super weights with the new numbers of their experts; `column` is None where the expert goes.

    `ffn_before` is the name that the FFN had.
    """
    kept = {
        group: members for part in parts if part.kind == "experts" for group, members in part.kept.items()
    }
    found = []
    for weight in super_weights:
        members = kept.get((weight.get("layer_before", weight["layer"]), EXPERTS))
        name, _, number = weight["ffn"].partition(".")
        if members is None or not number:
            found.append(weight)
            continue
        place = (members == int(number)).nonzero()
        moved = {"ffn": f"{name}.{int(place[0])}"} if len(place) else {"column": None}
        found.append({**weight, "ffn_before": weight["ffn"], **moved})
    return tuple(found)
