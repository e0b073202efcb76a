"""The compressed-tensors format: integer codes packed into int32, scales beside them, a config that says so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.errors import CheckpointError, UsageError
from surgery.rounding import Scheme, round_to_nearest
from surgery.skeleton import quiet_transformers

if TYPE_CHECKING:
    from surgery.quantize import QuantizePlan


def check_packable(plan: QuantizePlan) -> None:
    """Raise UsageError for what the compressed-tensors format has no place for."""
    if plan.scheme.granularity not in ("group", "channel"):
        raise UsageError(
            "packed checkpoints have a scale for each row or group",
            where="--block-size, --per-tensor",
            next_step="use --group-size or --per-channel, or --simulate",
        )
    if not plan.scheme.symmetric:
        # compressed-tensors 0.20 packs zero points, but builds the model to load them into with unpacked ones
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


def packed_tensors(weight: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensors compressed-tensors stores for one matrix [R, C], by the last part of their names."""
    from compressed_tensors.compressors import pack_to_int32

    rounded = round_to_nearest(weight, scheme)
    rows, columns = weight.shape
    return {
        "weight_packed": pack_to_int32(rounded.codes.view(rows, columns), scheme.bits),
        "weight_scale": rounded.scale.view(rows, -1),
        "weight_shape": torch.tensor([rows, columns]),
    }


def quantization_config(plan: QuantizePlan) -> dict[str, Any]:
    """`quantization_config` of config.json, as compressed-tensors reads it."""
    scheme = plan.scheme
    arguments: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": scheme.granularity,
        "dynamic": False,
    }
    if scheme.granularity == "group":
        arguments["group_size"] = scheme.size
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
        "ignore": ["lm_head", *(name.removesuffix(".weight") for name in plan.whole)],
    }


def check_packed_loads(folder: Path) -> None:
    """Load with AutoModelForCausalLM and run one token: what is packed must unpack."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(str(folder))
            logits = model(torch.tensor([[0, 1]]), use_cache=False).logits
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise CheckpointError(
            "the packed checkpoint does not load", where=folder.name, found=str(error).splitlines()[0]
        ) from error
    if not logits.isfinite().all():
        raise CheckpointError("the packed model's logits are not finite", where=folder.name)
