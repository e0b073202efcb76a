"""LayerIndex: the FFNs of one decoder layer, their summary in index.json, and their stored tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.bootstrap import Interval
from surgery.index import supernodes as supernode_module
from surgery.index.block_sums import restored, stored
from surgery.index.ffn_index import HALO_ONLY, LATER, SECOND_ORDER, STATISTICS, FfnIndex
from surgery.index.lazy_statistics import LazyStatistics
from surgery.index.published_form import StoredTensors, left_out
from surgery.model.families import DENSE, EXPERT

INTERVALS = "intervals"  # of a published layer's figures, in index.json


def checked_intervals(fields: Any) -> dict[str, Any]:
    """`fields` as an index.json holds intervals: word -> key -> fields of an Interval, or null.

    Raises ValueError for anything else, as in an index of somebody else's.
    """
    for entries in _dictionary(fields).values():
        for found in _dictionary(entries).values():
            if found is None:
                continue
            one = Interval(**_dictionary(found))
            numbers = (one.estimate, one.low, one.high, one.level)
            if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
                raise ValueError("an interval is not of finite numbers")
            if one.low > one.high or not isinstance(one.blocks, int):
                raise ValueError("an interval has its ends in the wrong order, or no number of blocks")
    return dict(fields)


def _dictionary(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError("intervals are not by word and key")
    return found


@dataclass
class LayerIndex:
    """One decoder layer: its FFNs by name ("dense", "shared", "expert.0", …), and `maxima`.

    `maxima` are the largest |input| and |output| of the down projections on the first prompt. `stored` is the
    layer's entry of the index.json it was read from; without one `summary` computes it.
    """

    ffns: dict[str, FfnIndex]
    maxima: dict[str, float] = field(default_factory=dict)
    stored: dict[str, Any] | None = None

    @property
    def experts(self) -> list[FfnIndex]:
        """The routed experts; empty in a dense layer."""
        return [ffn for ffn in self.ffns.values() if ffn.expert is not None]

    @property
    def others(self) -> dict[str, FfnIndex]:
        """The FFNs that process every token."""
        return {name: ffn for name, ffn in self.ffns.items() if ffn.expert is None}

    @property
    def main(self) -> list[FfnIndex]:
        """The FFNs that a layer's figures are of: its routed experts, or its dense FFN."""
        return self.experts or list(self.ffns.values())[:1]

    @property
    def statistics(self) -> MutableMapping[str, torch.Tensor]:
        """Statistics by name: [E, F] for routed experts, [F] for a dense FFN."""
        if self.experts:
            names = self.experts[0].statistics
            return {name: torch.stack([e.statistics[name] for e in self.experts]) for name in names}
        return next(iter(self.ffns.values())).statistics

    @property
    def supernodes(self) -> torch.Tensor:
        """Sorted supernodes of a dense FFN; for experts, indices into the flattened [E, F] statistics."""
        if self.experts:
            return torch.cat([e.supernodes + n * e.width for n, e in enumerate(self.experts)])
        return next(iter(self.ffns.values())).supernodes

    @property
    def width(self) -> int:
        """Channels of the dense FFN, or of one expert; 0 without an FFN."""
        return self.main[0].width if self.ffns else 0

    def summary(self) -> dict[str, Any]:
        """The entry of `layers` in index.json."""
        if self.stored is not None:
            return self.stored
        if not self.ffns:
            return {
                "width": 0,
                "lp_share": {},
                "supernodes": [],
                "overlap": {},
                "halo": {"channels": 0, "redundancy_mean": 0.0},
            }
        fields = _summary(self.main)
        fields["supernodes"] = self.supernodes.tolist()
        fields["prompt_max"] = self.maxima
        if self.experts:
            fields["experts"] = len(self.experts)
            fields["expert_tokens"] = [expert.tokens for expert in self.experts]
            for name, ffn in self.others.items():
                fields[name] = {**_summary([ffn]), "supernodes": ffn.supernodes.tolist()}
        return fields


def _summary(ffns: list[FfnIndex]) -> dict[str, Any]:
    """LP shares, overlaps and halo of FFNs of equal width.

    Averages over FFNs: LP shares are weighted by LP mass, overlaps by supernodes, redundancy by halo
    channels.
    """
    seen = [ffn for ffn in ffns if len(ffn.supernodes)]
    mass = [float(f.statistics["loss_proxy"].double().sum()) for f in seen]
    cores = [len(f.supernodes) for f in seen]
    halos = [f.halo for f in seen]

    def average(values: list[float], weights: list[Any]) -> float:
        total = sum(weights)
        return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 0.0

    def overlaps(values: list[Any]) -> float:
        shares = [supernode_module.overlap(f.supernodes, v) for f, v in zip(seen, values, strict=True)]
        return average(shares, cores)

    return {
        "width": ffns[0].width,
        "lp_share": {
            str(fraction): average(
                [supernode_module.mass_share(f.statistics["loss_proxy"], fraction) for f in seen], mass
            )
            for fraction in supernode_module.SHARE_FRACTIONS
        },
        "overlap": {
            "activation_power": overlaps([f.statistics["activation_power"] for f in seen]),
            "max_abs": overlaps([f.statistics["max_abs"] for f in seen]),
            "weight_norm": overlaps([f.weight_norm for f in seen]),
        },
        "halo": {
            "channels": sum(len(members) for members in halos),
            "redundancy_mean": average(
                [
                    float(f.statistics["halo_redundancy"][members].mean()) if len(members) else 0.0
                    for f, members in zip(seen, halos, strict=True)
                ],
                [len(members) for members in halos],
            ),
        },
    }


def layer_tensors(number: int, layer: LayerIndex) -> dict[str, torch.Tensor]:
    """Tensors of one layer by stored name: `layers.{i}.{name}`, or `layers.{i}.shared.{name}` if shared."""
    groups = {"": layer.statistics} if layer.ffns else {}
    if layer.experts:
        groups |= {f"{key}.": ffn.statistics for key, ffn in layer.others.items()}
    found = {
        f"layers.{number}.{prefix}{name}": value.contiguous()
        for prefix, statistics in groups.items()
        for name, value in statistics.items()
    }
    for prefix in groups:
        ffns = [layer.ffns[prefix[:-1]]] if prefix else layer.main
        sums = [ffn.block_sums for ffn in ffns]
        found |= stored(f"layers.{number}.{prefix}", sums, stacked=not prefix and bool(layer.experts))
    return found


def sample_name(number: int, ffn: str, kind: str = "q") -> str:
    """Stored name of one FFN's sample (`kind` "q"), its tokens' positions ("position"), or its "blocks"."""
    return f"layers.{number}.{ffn}.{kind}"


def sample_tensors(number: int, layer: LayerIndex) -> dict[str, torch.Tensor]:
    """Samples of one layer, their positions and the sums by block, by stored name."""
    found = {}
    for name, ffn in layer.ffns.items():
        for kind, tensor in (("q", ffn.sample), ("position", ffn.positions), ("blocks", ffn.by_block)):
            if tensor is not None:
                found[sample_name(number, name, kind)] = tensor.contiguous()
    return found


def layer_from(
    number: int, entry: dict[str, Any], tensors: Mapping[str, torch.Tensor], tokens: int
) -> LayerIndex:
    """Inverse of `layer_tensors` and `LayerIndex.summary`; `tokens` is the number of calibration tokens.

    Raises ValueError for intervals that are none.
    """

    def load(prefix: str, width: int, expert: int | None = None) -> LazyStatistics:
        return _statistics(tensors, f"layers.{number}.{prefix}", width, expert)

    def samples(ffn: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        sample, positions = (tensors.get(sample_name(number, ffn, kind)) for kind in ("q", "position"))
        return sample, positions

    checked_intervals(entry.get(INTERVALS, {}))
    core = torch.tensor(entry["supernodes"], dtype=torch.long)
    maxima, width = entry.get("prompt_max", {}), entry["width"]
    kept_entry = entry if left_out(tensors) else None  # can't be computed from what is left
    if width == 0:
        return LayerIndex({}, maxima)
    if "experts" not in entry:
        dense = FfnIndex(load("", width), core, tokens, *samples(DENSE), channels=width)
        return LayerIndex(_with_blocks(number, {DENSE: dense}, tensors), maxima, kept_entry)
    ffns = {}
    for expert, routed in enumerate(entry["expert_tokens"]):
        expert_core = core[core // width == expert] % width
        name = f"{EXPERT}{expert}"
        values = load("", width, expert)
        ffns[name] = FfnIndex(values, expert_core, routed, *samples(name), "experts", expert, width)
    for key in entry:
        if f"layers.{number}.{key}.loss_proxy" in tensors:
            shared = torch.tensor(entry[key]["supernodes"], dtype=torch.long)
            values = load(f"{key}.", entry[key]["width"])
            ffns[key] = FfnIndex(values, shared, tokens, *samples(key), key, channels=entry[key]["width"])
    return LayerIndex(_with_blocks(number, ffns, tensors), maxima, kept_entry)


def _with_blocks(
    number: int, ffns: dict[str, FfnIndex], tensors: Mapping[str, torch.Tensor]
) -> dict[str, FfnIndex]:
    """The FFNs of a layer, given what is stored of their sums by block."""
    for name, ffn in ffns.items():
        prefix = "" if name == DENSE or ffn.expert is not None else f"{name}."
        ffn.block_sums = restored(f"layers.{number}.{prefix}", tensors, ffn.expert)
        ffn.by_block = tensors.get(sample_name(number, name, "blocks"))
    return ffns


def _statistics(
    tensors: Mapping[str, torch.Tensor], stem: str, width: int, expert: int | None
) -> LazyStatistics:
    """The statistics [F] of one FFN. Raises KeyError when one that every index holds is missing."""
    skipped = left_out(tensors)
    for name in STATISTICS:
        if stem + name not in tensors and name not in skipped:
            raise KeyError(stem + name)

    def load(name: str) -> torch.Tensor:
        if name in HALO_ONLY and isinstance(tensors, StoredTensors) and skipped:
            return tensors.of_halo(stem, name, width, expert)
        value = tensors[stem + name]
        return value if expert is None else value[expert]

    known = (name for name in (*STATISTICS, *LATER, *SECOND_ORDER) if stem + name in tensors)
    return LazyStatistics(known, load, skipped)
