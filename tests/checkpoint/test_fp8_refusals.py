"""FP8 that is refused, and other quantised forms: from headers by name, or where a scale is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fp8 import add_tensors, compressed, set_config, store_fp8
from safetensors.torch import load_file

from surgery.engine.open_model import open_checkpoint
from surgery.errors import CheckpointError

F8 = torch.float8_e4m3fn
UP = "model.layers.2.mlp.up_proj.weight"
SCALE = "model.layers.2.mlp.up_proj.weight_scale_inv"


def change_scale(value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda f: add_tensors(f, {SCALE: value(load_file(f / "model.safetensors")[SCALE])})


def stated(**values: Any) -> Callable[[Path], None]:
    return lambda folder: set_config(folder, quantization_config=values)


def put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda scale: scale.index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(value))


HEADERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no scale": (lambda f: add_tensors(f, {}, without=(SCALE,)), f"without its scales; in .*{UP}"),
    "two scales": (lambda f: add_tensors(f, {UP + "_scale": torch.ones(())}), "two tensors of scales"),
    "wrong shape": (change_scale(lambda s: s[:-1].contiguous()), f"shape that fits it; in .*{SCALE}"),
    "wrong dtype": (change_scale(lambda s: s.int()), f"dtype that scales don't have; in .*{SCALE}"),
    "another block": (
        stated(quant_method="fp8", weight_block_size=[16, 16]),
        r"shape that fits it.*expected \[2, 3\] for a weight \[32, 48\]; found \[2, 4\]",
    ),
    "no block": (stated(quant_method="fp8", weight_block_size=[0, 16]), "not two positive numbers"),
    "FP4 experts": (stated(quant_method="fp8", expert_dtype="fp4"), "FP4 experts"),
    "NVFP4": (change_scale(lambda s: s.to(F8)), "two tensors|scales"),
    "MXFP4": (stated(quant_method="mxfp4"), "MXFP4"),
    "ModelOpt NVFP4": (stated(quant_method="modelopt", quant_algo="NVFP4"), "NVFP4"),
    "packed": (stated(**compressed("group", num_bits=4, type="int")), "4-bit int, group"),
    "zero points": (stated(**compressed("tensor", symmetric=False)), "zero points"),
    "sparse": (
        stated(**compressed("tensor"), sparsity_config={"format": "sparse-24-bitmask"}),
        "sparse-24-bitmask",
    ),
    "EETQ": (stated(quant_method="eetq"), "EETQ"),
    "HQQ": (stated(quant_method="hqq"), "HQQ"),
    "torchao": (stated(quant_method="torchao"), "torchao"),
    "Quark": (stated(quant_method="quark"), "quark"),
    "MLX": (lambda f: set_config(f, quantization={"bits": 8, "group_size": 64}), "MLX"),
    "MLX, by its tensors": (
        lambda f: add_tensors(
            f, {UP: torch.zeros(4, 4, dtype=torch.uint32), UP.replace("weight", "scales"): torch.ones(4, 1)}
        ),
        "MLX",
    ),
    "in the language model's config": (
        lambda f: set_config(
            f, quantization_config=None, text_config={"quantization_config": {"quant_method": "gptq"}}
        ),
        "GPTQ",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_refused_from_headers(case: str, save_tiny: Callable[..., Path]) -> None:
    source = save_tiny("llama")
    store_fp8(source, "blocks")
    damage, words = HEADERS[case]
    damage(source)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(source)
    assert caught.value.next_step or case == "no block"


VALUES = {
    "zero": put(0.0),
    "infinite": put(float("inf")),
    "NaN": put(float("nan")),
    "negative": put(-1.0),
}


@pytest.mark.parametrize("case", VALUES)
def test_scales_that_are_no_scales_are_refused_on_reading(case: str, save_tiny: Callable[..., Path]) -> None:
    source = save_tiny("llama")
    store_fp8(source, "blocks")
    change_scale(VALUES[case])(source)
    with pytest.raises(CheckpointError, match=f"not finite; in .*{SCALE}"):
        open_checkpoint(source).read(UP)


def test_codes_that_are_no_numbers_and_overflow_are_refused(save_tiny: Callable[..., Path]) -> None:
    source = save_tiny("llama")
    store_fp8(source, "blocks")
    change_scale(lambda s: s * 1e6)(source)
    with pytest.raises(CheckpointError, match="float16") as caught:
        open_checkpoint(source, dtype="float16").read(UP)
    assert "bfloat16" in caught.value.next_step
    assert open_checkpoint(source, dtype="bfloat16").read(UP).isfinite().all()
    codes = load_file(source / "model.safetensors")[UP].view(torch.uint8)
    codes[3, 5] = 0x7F
    add_tensors(source, {UP: codes.view(F8)})
    with pytest.raises(CheckpointError, match=f"not finite in bfloat16; in .*{UP}"):
        open_checkpoint(source, dtype="bfloat16").read(UP)


def test_zero_points_have_to_be_zero(save_tiny: Callable[..., Path]) -> None:
    source = save_tiny("llama")
    dense = store_fp8(source, "rows")
    point = UP + "_zero_point"
    add_tensors(source, {point: torch.zeros(48, 1)})
    checkpoint = open_checkpoint(source, dtype="float32")
    assert point not in checkpoint.tensors and torch.equal(checkpoint.read(UP), dense[UP])
    add_tensors(source, {point: torch.ones(48, 1)})
    with pytest.raises(CheckpointError, match="zero point"):
        open_checkpoint(source).read(UP)


def test_a_config_that_says_fp8_without_fp8_weights_is_refused(save_tiny: Callable[..., Path]) -> None:
    source = save_tiny("llama")
    set_config(source, quantization_config={"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match="no stored tensor is"):
        open_checkpoint(source)
