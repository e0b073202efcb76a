"""Indexes of one model on disjoint calibration blocks, made into the index of all of them.

Means over tokens are averaged in float64 by the tokens each saw, maxima taken, supernodes and halo found anew: redundancy
from the sampled q of all, thinned to the tokens one index of all blocks would have sampled, and connectivity from the
weights, one layer resident. Means of experts are over all tokens too, whoever they were routed to. What is left is rounding, since a stored mean has float32's digits.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from surgery.calibration import TokenBlocks
from surgery.checkpoint import Checkpoint
from surgery.errors import IndexMismatchError, UsageError
from surgery.ffn import EXPERT
from surgery.index import SAMPLE_FILE, ChannelIndex, LayerIndex, Track, sample_name, untracked
from surgery.indexing import index_ffn
from surgery.statistics import SUMMED, UnitStatistics, sample_stride
from surgery.stream import StreamedModel


def merge_indexes(folders: list[Path], checkpoint: Checkpoint, track: Track[Any] = untracked) -> ChannelIndex:
    """The index of the blocks of all `folders` together, in that order; super weights are the first one's.

    Second-order statistics are no sums over tokens and are left out. Raises IndexMismatchError when the indexes are not of
    this checkpoint, were computed in another way, share blocks, or were made without --keep-sample; UsageError for fewer
    than two.
    """
    indexes = mergeable(folders, checkpoint)
    first = indexes[0]
    ids = torch.cat([index.input_ids for index in indexes])
    blocks = TokenBlocks(ids, _name(indexes), first.calibration["seed"], 0)
    tokens = sum(index.loss["tokens"] for index in indexes)
    nats = sum(index.loss["nats"] for index in indexes)
    model = StreamedModel(checkpoint, torch.device("cpu"), getattr(torch, first.run["dtype"]))
    layers = []
    count = len(model.layers)
    for number, _ in track(model.walk(range(count)), "layers", count):
        units = {}
        for ffn in model.ffns(number):
            for place, unit in enumerate(ffn.units):
                parts = [index.layers[number].ffns[unit] for index in indexes]
                values = _averaged([part.statistics for part in parts], indexes)
                samples = [
                    _sample(folder, number, unit, index, ids)
                    for folder, index in zip(folders, indexes, strict=True)
                ]
                tokens_seen = sum(part.tokens for part in parts)
                whole = UnitStatistics(values, torch.cat(samples), tokens_seen)
                units[unit] = index_ffn(ffn, place, whole, ids.shape[1])
        layers.append(LayerIndex(units, first.layers[number].maxima))
    return ChannelIndex(
        source=first.source,
        calibration={**blocks.as_json(), "merged": [index.calibration for index in indexes]},
        run=first.run,
        loss={"nats": nats, "tokens": tokens, "perplexity": math.exp(nats / tokens)},
        layers=layers,
        super_weights=first.super_weights,
        echoes=first.echoes,
        input_ids=ids,
        widths=first.widths,
        keys=first.keys,
    )


def mergeable(folders: list[Path], checkpoint: Checkpoint) -> list[ChannelIndex]:
    """The indexes, loaded. Raises unless they can be merged, as `merge_indexes` says."""
    if len(folders) < 2:
        raise UsageError("merging takes two indexes or more", found=str(len(folders)))
    indexes = [ChannelIndex.load(folder) for folder in folders]
    first = indexes[0]
    seen: set[bytes] = set()
    for index, folder in zip(indexes, folders, strict=True):
        index.check_source(checkpoint)
        _equal(index.run["dtype"], first.run["dtype"], "compute dtype", folder)
        _equal(str(index.input_ids.shape[1]), str(first.input_ids.shape[1]), "block size", folder)
        if not _has_samples(folder, index):
            raise IndexMismatchError(
                "an index that keeps no sample for redundancy",
                where=folder.name,
                expected=SAMPLE_FILE,
                next_step="make it with `surgeon index --keep-sample`",
            )
        mine = {block.numpy().tobytes() for block in index.input_ids}
        if len(mine) < len(index.input_ids) or mine & seen:
            raise IndexMismatchError(
                "a calibration block that counts twice",
                where=folder.name,
                expected="disjoint calibration sets",
                next_step="draw them from other text",
            )
        seen |= mine
    return indexes


def _has_samples(folder: Path, index: ChannelIndex) -> bool:
    """Whether a sample is kept of every FFN, and of experts where its tokens were."""
    if not (folder / SAMPLE_FILE).exists():
        return False
    with safe_open(folder / SAMPLE_FILE, framework="pt") as stored:
        names = set(stored.keys())
    return all(
        {sample_name(number, unit, kind) for kind in ("q", *["position"] * unit.startswith(EXPERT))} <= names
        for number, layer in enumerate(index.layers)
        for unit in layer.ffns
    )


def _equal(found: str, expected: str, what: str, folder: Path) -> None:
    if found != expected:
        raise IndexMismatchError(
            f"another {what} than the first index", where=folder.name, expected=expected, found=found
        )


def _name(indexes: list[ChannelIndex]) -> str:
    names = list(dict.fromkeys(str(index.calibration["name"]) for index in indexes))
    return " + ".join(names)


def _averaged(
    statistics: list[dict[str, torch.Tensor]], indexes: list[ChannelIndex]
) -> dict[str, torch.Tensor]:
    """Means [F] over the tokens of all indexes, and the largest of maxima."""
    shares = [index.input_ids.numel() for index in indexes]
    merged = {
        name: (
            sum(one[name].double() * share for one, share in zip(statistics, shares, strict=True))
            / sum(shares)
        ).float()  # type: ignore[union-attr]
        for name in SUMMED
    }
    merged["max_abs"] = torch.stack([one["max_abs"] for one in statistics]).amax(0)
    return merged


def _sample(folder: Path, number: int, unit: str, index: ChannelIndex, ids: torch.Tensor) -> torch.Tensor:
    """An index's q of those sampled tokens that one index of all blocks would have sampled, [S, F]."""
    positions = sample_name(number, unit, "position")
    with safe_open(folder / SAMPLE_FILE, framework="pt") as stored:
        sample: torch.Tensor = stored.get_tensor(sample_name(number, unit))
        if positions in stored.keys():  # noqa: SIM118 (an open file is no dict)
            return sample[stored.get_tensor(positions) % sample_stride(ids.numel()) == 0]
    blocks = len(index.input_ids)
    step = sample_stride(ids.numel()) // sample_stride(index.input_ids.numel())
    return sample.view(blocks, len(sample) // blocks, -1)[:, ::step].flatten(0, 1)
