"""Which quantised form a checkpoint has, told from its config and from the headers of its tensors.

FP8 (`fp8.py`) and packed integers (`packed_integers.py`) are read; every other form is refused by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from surgery.checkpoint.safetensors_header import DTYPE_NAMES, TensorEntry
from surgery.errors import CheckpointError

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
CONFIG_KEYS = ("quantization_config", "compression_config")  # the second is an older name
DEFAULT_BLOCK = (128, 128)  # of quant_method fp8 in transformers, and of the models that have blocks
FORMS = {
    "fp8": "FP8 weights",
    "fbgemm_fp8": "FP8 weights (FBGEMM)",
    "mxfp4": "MXFP4 weights",
    "gptq": "GPTQ weights",
    "awq": "AWQ weights",
    "bitsandbytes": "bitsandbytes weights",
    "eetq": "EETQ weights",
    "hqq": "HQQ weights",
    "torchao": "torchao weights",
    "quanto": "Quanto weights",
    "metal": "MLX weights",
}
PACKED = "pack-quantized"  # the format of compressed-tensors that packs integers into int32
PACKED_ENDING = ".weight_packed"
# Endings of stored names that only a quantised form has.
ENDINGS = {
    ".qweight": "GPTQ or AWQ weights",
    PACKED_ENDING: "packed compressed-tensors weights",
    ".absmax": "bitsandbytes weights",
    ".SCB": "bitsandbytes weights",
    ".W_q": "HQQ weights",
}
SCALE_ENDINGS = (".weight_scale", ".weight_scale_inv", ".scale", ".scales")
INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.uint32)


@dataclass(frozen=True)
class Fp8Scheme:
    """How FP8 weights are scaled, as far as the config tells; the scales' shapes tell the rest.

    `block`: rows and columns of a block, for scales that have as many entries as there are blocks; None where
    none may be in blocks. `exponents`: scales stored as integers e stand for 2^(e - 127). `flipped_experts`:
    the stacked down projections [E, F, D] have their scales [E, D, 1], one for each column (FBGEMM).
    """

    block: tuple[int, int] | None = DEFAULT_BLOCK
    exponents: bool = False
    flipped_experts: bool = False


def stated_form(config: dict[str, Any]) -> str | None:
    """The quantised form that a config.json states, in words; None where it states none.

    Raises CheckpointError for a quantization_config that is not an object.
    """
    stated = _stated(config)
    method = str(stated.get("quant_method") or "")
    own = config.get("quantization")
    if (isinstance(own, dict) and "bits" in own) or (not method and "bits" in stated):
        return "MLX weights"
    if method == "compressed-tensors":
        return f"compressed-tensors weights ({_groups_form(stated)})"
    if method == "modelopt":
        return f"ModelOpt weights ({_modelopt_algorithm(stated)})"
    if method == "fp8" and stated.get("expert_dtype") == "fp4":
        return "FP4 experts beside FP8 weights"
    if method:
        return FORMS.get(method, f"{method} weights")
    return None


def fp8_scheme(config: dict[str, Any]) -> Fp8Scheme | None:
    """The FP8 scheme of a config.json; None where it states another form.

    A config that states nothing may belong to FP8 weights all the same: it has the default scheme. Raises
    CheckpointError for a block size that is none.
    """
    stated, form = _stated(config), stated_form(config)
    method = str(stated.get("quant_method") or "")
    if form == "MLX weights":
        return None
    block = _block(stated.get("weight_block_size", DEFAULT_BLOCK))
    if not method:
        return Fp8Scheme(block)
    if method == "fp8" and stated.get("expert_dtype", "fp8") == "fp8":
        return Fp8Scheme(block, exponents=stated.get("scale_fmt") == "ue8m0")
    if method == "fbgemm_fp8":
        return Fp8Scheme(None, flipped_experts=True)
    if method == "modelopt" and _modelopt_algorithm(stated) in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        return Fp8Scheme(None)
    if method == "compressed-tensors" and _groups_form(stated) == "FP8":
        blocks = {_block(w.get("block_structure")) for w in _weights(stated) if w.get("strategy") == "block"}
        return Fp8Scheme(next(iter(blocks), None))
    return None


def packed_bits(config: dict[str, Any]) -> int | None:
    """Bits of the packed integers of compressed-tensors that a config.json states; None for another form.

    Other forms are those whose activations are rounded as well, so that the weights alone are not the model,
    and those with several numbers of bits.
    """
    stated = _stated(config)
    groups = stated.get("config_groups")
    if stated.get("quant_method") != "compressed-tensors" or not isinstance(groups, dict) or not groups:
        return None
    if _obstacle(stated) is not None:
        return None
    found = set()
    for group in groups.values():
        weights = group.get("weights") or {}
        if group.get("input_activations") or group.get("output_activations"):
            return None
        if (group.get("format") or stated.get("format")) != PACKED or weights.get("type") != "int":
            return None
        if weights.get("strategy") not in ("group", "channel"):
            return None
        found.add(weights.get("num_bits"))
    bits = found.pop()
    return bits if not found and isinstance(bits, int) and 2 <= bits <= 8 else None


def refused_tensors(tensors: Mapping[str, TensorEntry], packed: bool = False) -> str | None:
    """The quantised form that stored tensors have and that is not read, in words, with an example; else None.

    FP8 is read, and with `packed` packed integers are.
    """
    for name, entry in tensors.items():
        if packed and name.endswith(PACKED_ENDING):
            continue
        stem, _, leaf = name.rpartition(".")
        kind = DTYPE_NAMES[entry.dtype]
        form = next((form for ending, form in ENDINGS.items() if name.endswith(ending)), None)
        if form is None and entry.dtype in INTEGERS and leaf == "weight":
            if f"{stem}.scales" in tensors:
                form = "MLX weights"
            elif any(stem + ending in tensors for ending in SCALE_ENDINGS):
                form = "INT8 or FP4 weights" if entry.dtype.itemsize == 1 else "packed weights"
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors:
            form = "MXFP4 weights"
        if entry.dtype in FP8_DTYPES and leaf.endswith(("_scale", "_scales")):
            form = "FP4 weights (NVFP4), whose scales are FP8"
        if form is not None:
            return f"{form}, {kind} as {name}"
    return None


def without_quantisation(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config.json that states no quantisation at any depth."""
    return {
        key: without_quantisation(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in CONFIG_KEYS
    }


def _stated(config: dict[str, Any]) -> dict[str, Any]:
    """The first quantisation that a config.json states, of the whole model or of a part; empty for none."""
    for found in _entries(config):
        if not isinstance(found, dict):
            raise CheckpointError(
                "quantization_config is not an object", where="config.json", found=type(found).__name__
            )
        return found
    return {}


def _entries(config: dict[str, Any]) -> Iterator[Any]:
    yield from (config[key] for key in CONFIG_KEYS if config.get(key))
    for value in config.values():
        if isinstance(value, dict):
            yield from _entries(value)


def _weights(stated: dict[str, Any]) -> list[dict[str, Any]]:
    """The `weights` entries of all config groups of compressed-tensors."""
    groups = stated.get("config_groups")
    found = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
    return [weights for weights in found if isinstance(weights, dict)]


def _groups_form(stated: dict[str, Any]) -> str:
    """ "FP8" where every group of a compressed-tensors config is, else what stands against it."""
    obstacle = _obstacle(stated)
    if obstacle is not None:
        return obstacle
    groups = _weights(stated)
    for weights in groups:
        bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
        if (bits, kind) != (8, "float") or strategy not in ("tensor", "channel", "block"):
            return f"{bits}-bit {kind}, {strategy or 'tensor'}"
        if weights.get("symmetric") is False:
            return "FP8 with zero points"
    if len({str(w.get("block_structure")) for w in groups if w.get("strategy") == "block"}) > 1:
        return "FP8 in blocks of several sizes"
    return "FP8" if groups else str(stated.get("format") or "no config_groups")


def _obstacle(stated: dict[str, Any]) -> str | None:
    """What compressed-tensors does beside rounding, which is not read; None for nothing."""
    sparse = stated.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format") not in (None, "dense"):
        return f"sparse, {sparse['format']}"
    return "with transforms" if (stated.get("transform_config") or {}).get("config_groups") else None


def _modelopt_algorithm(stated: dict[str, Any]) -> str:
    nested = stated.get("quantization")
    return str(stated.get("quant_algo") or (nested.get("quant_algo") if isinstance(nested, dict) else None))


def _block(stated: Any) -> tuple[int, int] | None:
    """A block size given as [rows, columns] or "128x128"; None for none. Raises CheckpointError."""
    if stated is None:
        return None
    parts = stated.split("x") if isinstance(stated, str) else stated
    try:
        rows, columns = (int(part) for part in parts)
    except (TypeError, ValueError):
        rows = columns = 0
    if min(rows, columns) < 1:
        raise CheckpointError(
            "the block size of FP8 weights is not two positive numbers",
            where="config.json",
            found=str(stated)[:80],
        )
    return rows, columns
