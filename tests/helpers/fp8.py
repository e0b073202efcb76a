"""Turns a saved tiny model into FP8 checkpoints, by its own arithmetic: the second route of reading them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BLOCK = (20, 12)  # divides no width of the tiny models, so that the last blocks are smaller
LARGEST = 448.0  # of float8_e4m3fn
GROUP = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
Tensors = dict[str, torch.Tensor]


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    weights = {**GROUP, "strategy": strategy, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }


# form -> (quantization_config, rows and columns of a block or None for all, name of the scales, their shape)
FORMS: dict[str, tuple[Any, tuple[int | None, int | None], str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "blocks": (
        {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"},
        BLOCK,
        "weight_scale_inv",
        lambda s: s,
    ),
    "bfloat16 scales": (
        {"quant_method": "fp8", "weight_block_size": list(BLOCK)},
        BLOCK,
        "weight_scale_inv",
        lambda s: s.bfloat16(),
    ),
    "tensor": (
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        (None, None),
        "weight_scale",
        lambda s: s.view(()),
    ),
    "rows, FBGEMM": ({"quant_method": "fbgemm_fp8"}, (1, None), "weight_scale", lambda s: s),
    "rows": (compressed("channel"), (1, None), "weight_scale", lambda s: s.bfloat16()),
    "one": (compressed("tensor"), (None, None), "weight_scale", lambda s: s.view(1)),
    "compressed blocks": (
        compressed("block", block_structure="20x12"),
        BLOCK,
        "weight_scale",
        lambda s: s,
    ),
    "ModelOpt": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        (None, None),
        "weight_scale",
        lambda s: s.view(()),
    ),
    "not stated": (None, (1, None), "weight_scale", lambda s: s.view(-1)),
}


def expanded(scales: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    """The scale of every element of a matrix, by the definition of blocks."""
    rows, columns = (torch.arange(size) // step for size, step in zip(shape, block, strict=True))
    return scales.float()[rows][:, columns]


def quantise(
    weight: torch.Tensor,
    block: tuple[int | None, int | None],
    shaped: Callable[[torch.Tensor], torch.Tensor] = lambda s: s,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scales, dequantised float32) of a matrix [R, C] in blocks of (b0, b1)."""
    rows, columns = weight.shape
    size = (block[0] or rows, block[1] or columns)
    grid = (-(-rows // size[0]), -(-columns // size[1]))
    scales = torch.zeros(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = weight[i * size[0] : (i + 1) * size[0], j * size[1] : (j + 1) * size[1]]
            scales[i, j] = part.abs().max() / LARGEST
    stored = shaped(scales)
    wide = expanded(stored.view(grid), (rows, columns), size)
    codes = (weight.float() / wide).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes, stored, codes.float() * wide


def store_fp8(folder: Path, form: str) -> Tensors:
    """Rewrite a saved model in an FP8 form; returns the dequantised float32 tensors of the same model."""
    config, block, suffix, shaped = FORMS[form]
    stored: Tensors = {}
    dense: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            stored[name], dense[name] = tensor, tensor.float()
            if name.endswith("_proj.weight") and tensor.dim() == 2:
                codes, scales, dense[name] = quantise(tensor, block, shaped)
                stored[name], stored[name.removesuffix("weight") + suffix] = codes, scales
        file.unlink()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | ({} if config is None else {"quantization_config": config})
    path.write_text(json.dumps(fields))
    return dense


def add_tensors(folder: Path, more: Tensors, without: tuple[str, ...] = ()) -> None:
    """Add tensors to a folder with one weight file, and remove those named in `without`."""
    file = folder / "model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if name not in without} | more
    save_file(tensors, file, metadata={"format": "pt"})


def set_config(folder: Path, **values: Any) -> None:
    """Set fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
