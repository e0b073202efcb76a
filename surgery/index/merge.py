"""Merges indexes of one model on disjoint calibration blocks into the index of all blocks.

Means over tokens are averaged in float64, weighted by the calibration tokens of each index; this holds for
experts too, because their means are over all tokens and not only over routed ones. Maxima are the largest of
all indexes. Supernodes and halo are recomputed: redundancy from the sampled q of all indexes, reduced to the
tokens that one index of all blocks would have sampled; connectivity from the weights, one layer resident.
Sums by block are selected and grouped anew; where one index has none, the result has none. The result differs
from the index of all blocks by rounding only, since stored means are float32.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from surgery.budget.model_size import CORRELATION_TOKENS
from surgery.budget.pass_cost import PassCost, PassJob, pass_cost
from surgery.checkpoint.reader import Checkpoint
from surgery.engine.open_model import Model
from surgery.engine.run_options import RunOptions
from surgery.engine.streamed_model import StreamedModel
from surgery.errors import IndexMismatchError, UsageError
from surgery.index.block_sums import block_sums
from surgery.index.build import index_ffn
from surgery.index.channel_index import SAMPLE_FILE, TENSOR_FILE, ChannelIndex
from surgery.index.layer_index import LayerIndex, sample_name
from surgery.index.statistics import SUMMED, FfnStatistics, sample_stride
from surgery.progress import Progress, no_progress
from surgery.text import TokenBlocks


def merge_indexes(folders: list[Path], opened: Model, progress: Progress[Any] = no_progress) -> ChannelIndex:
    """Merge the indexes in `folders`, blocks in that order; super weights are those of the first index.

    Runs on the CPU in the dtype of the indexes. Second-order statistics are not sums over tokens and are left
    out. Raises IndexMismatchError when an index is not of this model, differs in compute dtype or block size,
    repeats a block, or was built without --save-samples; UsageError for fewer than two indexes.
    """
    indexes = mergeable(folders, opened.checkpoint)
    first = indexes[0]
    ids = torch.cat([index.input_ids for index in indexes])
    blocks = TokenBlocks(ids, _name(indexes), first.calibration["seed"], 0)
    tokens = sum(index.loss["tokens"] for index in indexes)
    nats = sum(index.loss["nats"] for index in indexes)
    run = RunOptions(torch.device("cpu"), getattr(torch, first.run["dtype"]), opened.run.memory)
    model = StreamedModel(Model(opened.checkpoint, run))
    layers = []
    count = len(model.layers)
    for number, _ in progress(model.stream_layers(range(count)), "layers", count):
        ffns = {}
        for ffn in model.ffns(number):
            parts = [index.layers[number].ffns[ffn.name] for index in indexes]
            values = _averaged([part.statistics for part in parts], indexes)
            samples = [
                _sample(folder, number, ffn.name, index, ids)
                for folder, index in zip(folders, indexes, strict=True)
            ]
            ffn_tokens = sum(part.tokens for part in parts)
            merged = FfnStatistics(values, torch.cat(samples), ffn_tokens)
            found = [_by_block(folder, number, ffn.name) for folder in folders]
            by_block = [sums for sums in found if sums is not None]
            if len(by_block) == len(folders):
                lp, power = torch.cat(by_block, 1)[:, None]
                ranks = values["loss_proxy"][None], values["activation_power"][None]
                (merged.block_sums,) = block_sums(*ranks, lp, power)
            ffns[ffn.name] = index_ffn(ffn, merged, ids.shape[1])
        layers.append(LayerIndex(ffns, first.layers[number].maxima))
    return ChannelIndex(
        source=first.source,
        calibration={**blocks.as_json(), "merged": [index.calibration for index in indexes]},
        run=first.run,
        loss={"nats": nats, "tokens": tokens, "perplexity": math.exp(nats / tokens)},
        layers=layers,
        super_weights=first.super_weights,
        echoes=first.echoes,
        structures=first.structures,
        input_ids=ids,
        widths=first.widths,
        keys=first.keys,
    )


def merge_cost(folders: list[Path], opened: Model) -> PassCost:
    """Cost of merging: one layer at a time, the statistics of all indexes, and the samples of one FFN.

    Raises MemoryBudgetError.
    """
    statistics = sum(
        (folder / TENSOR_FILE).stat().st_size for folder in folders if (folder / TENSOR_FILE).exists()
    )
    widest = max((ffn.width for ffns in opened.meta_model.ffns for ffn in ffns), default=0)
    samples = 4 * 4 * CORRELATION_TOKENS * widest * max(1, len(folders))
    return pass_cost(opened.meta_model, PassJob((), beside=2 * statistics + samples), opened.run)


def mergeable(folders: list[Path], checkpoint: Checkpoint) -> list[ChannelIndex]:
    """Load the indexes and check that they can be merged. Raises the errors of `merge_indexes`."""
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
                next_step="make it with `surgeon index --save-samples`",
            )
        blocks = {block.numpy().tobytes() for block in index.input_ids}
        if len(blocks) < len(index.input_ids) or blocks & seen:
            raise IndexMismatchError(
                "a calibration block that counts twice",
                where=folder.name,
                expected="disjoint calibration sets",
                next_step="draw them from other text",
            )
        seen |= blocks
    return indexes


def _has_samples(folder: Path, index: ChannelIndex) -> bool:
    """Whether the folder has a sample of every FFN and, for experts, the positions of the sampled tokens."""
    if not (folder / SAMPLE_FILE).exists():
        return False
    with safe_open(folder / SAMPLE_FILE, framework="pt") as stored:
        names = set(stored.keys())
    return all(
        {sample_name(number, name, kind) for kind in ("q", *["position"] * (ffn.expert is not None))} <= names
        for number, layer in enumerate(index.layers)
        for name, ffn in layer.ffns.items()
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
    """Means [F] over the tokens of all indexes, and the largest of their maxima."""
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


def _by_block(folder: Path, number: int, ffn: str) -> torch.Tensor | None:
    """Sums [2, N, F] over each block of one index; None where an earlier version made it."""
    name = sample_name(number, ffn, "blocks")
    with safe_open(folder / SAMPLE_FILE, framework="pt") as stored:
        return stored.get_tensor(name) if name in stored.keys() else None  # noqa: SIM118


def _sample(folder: Path, number: int, ffn: str, index: ChannelIndex, ids: torch.Tensor) -> torch.Tensor:
    """Sampled q [S, F] of one index, reduced to the tokens that an index of all blocks would have sampled."""
    positions = sample_name(number, ffn, "position")
    with safe_open(folder / SAMPLE_FILE, framework="pt") as stored:
        sample: torch.Tensor = stored.get_tensor(sample_name(number, ffn))
        if positions in stored.keys():  # noqa: SIM118 (an open safetensors file is not a dict)
            return sample[stored.get_tensor(positions) % sample_stride(ids.numel()) == 0]
    blocks = len(index.input_ids)
    step = sample_stride(ids.numel()) // sample_stride(index.input_ids.numel())
    return sample.view(blocks, len(sample) // blocks, -1)[:, ::step].flatten(0, 1)
