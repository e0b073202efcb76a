"""The compressed-tensors format: integer codes packed into int32, scales, and a quantization_config."""

from __future__ import annotations

import json
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.checkpoint.transformers_model import check_keys
from surgery.errors import CheckpointError, UsageError
from surgery.quantize.rounding import Scheme, round_to_nearest

if TYPE_CHECKING:
    from surgery.quantize.plan import QuantizePlan

PARTS = ("weight_packed", "weight_scale", "weight_shape")  # of a packed matrix: last words of its tensors


def check_packable(plan: QuantizePlan) -> None:
    """Raise UsageError for a plan the compressed-tensors format can't store, or if its library is missing."""
    if find_spec("compressed_tensors") is None:
        raise UsageError(
            "packed checkpoints are written with compressed-tensors, which is not installed",
            next_step="pip install 'ffn-surgeon[packed]', or use --simulate",
        )
    if plan.scheme.granularity not in ("group", "channel"):
        raise UsageError(
            "packed checkpoints have a scale for each row or group",
            where="--flat-block, --per-tensor",
            next_step="use --group-size or --per-channel, or --simulate",
        )
    if not plan.scheme.symmetric:
        # compressed-tensors 0.20 packs zero points, but builds the model that loads them with unpacked ones.
        raise UsageError(
            "packed zero points are not loaded by transformers yet",
            where="--asymmetric",
            next_step="leave it out, or use --simulate",
        )
    if plan.handling == "restore" and plan.places:
        raise UsageError(
            "the packed format has no place for single scalars",
            where="--super-weights restore",
            next_step="use --super-weights module, which leaves their matrices as they are, or --simulate",
        )
    joined = [name for name in plan.whole if name not in plan.modules]
    if joined:
        raise UsageError(
            "transformers loads the experts of a layer all packed or all whole",
            where="--super-weights module",
            found=f"a super weight in {joined[0]}",
            next_step="use --super-weights none, which rounds it too, or --simulate",
        )


def packed_tensors(weight: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensors that compressed-tensors stores for one matrix [R, C], by the last part of their names."""
    from compressed_tensors.compressors import pack_to_int32

    rounded = round_to_nearest(weight, scheme)
    rows, columns = weight.shape
    codes = pack_to_int32(rounded.codes.view(rows, columns), scheme.bits)
    return dict(zip(PARTS, (codes, rounded.scale.view(rows, -1), torch.tensor([rows, columns])), strict=True))


def weight_arguments(scheme: Scheme) -> dict[str, Any]:
    """A scheme as arguments of compressed-tensors' QuantizationArgs."""
    found: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": scheme.granularity,
        "dynamic": False,
    }
    return found | ({"group_size": scheme.size} if scheme.granularity == "group" else {})


def quantization_config(plan: QuantizePlan) -> dict[str, Any]:
    """The entry `quantization_config` of config.json, in the form that compressed-tensors reads."""
    arguments = weight_arguments(plan.scheme)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": arguments,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": list(plan.ignored),
    }


def check_unpacks(parts: dict[str, torch.Tensor], scheme: Scheme, expected: torch.Tensor, name: str) -> None:
    """Raise CheckpointError unless compressed-tensors unpacks `parts` to the rounded values `expected`."""
    if not torch.equal(unpacked(parts, scheme), expected):
        raise CheckpointError(
            "packed codes do not unpack to the rounded weights",
            where=name,
            next_step="report this: it is a fault of surgeon's",
        )


def unpacked(parts: dict[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The rounded values [R, C] that compressed-tensors unpacks from PARTS, in the dtype of the scales."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    reader = QuantizationScheme(targets=["Linear"], weights=weight_arguments(scheme))
    found: torch.Tensor = PackedQuantizationCompressor.decompress(parts, reader)["weight"]
    return found


def check_packed_loads(folder: Path, beside: Collection[str] = ()) -> None:
    """Raise CheckpointError unless the stored tensors are those that transformers' Auto class expects.

    `beside` are stored tensors that are not part of the model. No weight is read.
    """
    check_keys(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")), beside)
