"""Packed integers of compressed-tensors as a plain checkpoint: values, refusals, whole commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import pack_to_int32
from helpers.fp8 import add_tensors, set_config
from helpers.tiny_models import CALIBRATION
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import surgery
from surgery.engine.open_model import open_checkpoint
from surgery.errors import CheckpointError, UsageError
from surgery.evaluate.perplexity import evaluation_blocks

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def packed(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> Callable[..., Path]:
    """A tiny model rounded and packed by `surgeon quantize`."""

    def make(*options: str, family: str = "llama") -> Path:
        source = save_tiny(family, name="dense")
        keep = ("--super-weights", "none", "--no-clip")
        surgeon("quantize", "dense", *(options or ("--group-size", "8")), *keep, "--out", "packed")
        return source.parent / "packed"

    return make


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("options", [("--group-size", "8"), ("--per-channel", "--bits", "8")])
def test_the_model_is_that_which_transformers_loads(
    family: str, options: tuple[str, ...], packed: Callable[..., Path]
) -> None:
    folder = packed(*options, family=family)
    plain = surgery.open_model(folder, dtype="float32")
    assert "INT" in str(plain.checkpoint.stored_form)
    blocks = evaluation_blocks(plain, "text.txt", 4, 16)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(blocks.ids).logits
    following = blocks.ids[:, 1:].flatten().long()
    nats = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), following, reduction="sum")
    assert surgery.perplexity(plain, blocks).nats == pytest.approx(float(nats), rel=1e-5)


def test_zero_points_and_columns_out_of_order(packed: Callable[..., Path]) -> None:
    """As llm-compressor writes them: W = (q - z) s with the group of every column."""
    folder = packed()
    stored = load_file(folder / "model.safetensors")
    rows, columns = stored[Q + ".weight_shape"].tolist()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    groups = columns // 8
    zeros = torch.randint(-8, 8, (rows, groups), generator=generator, dtype=torch.int8)
    order = torch.arange(columns).remainder(groups)[torch.randperm(columns, generator=generator)]
    add_tensors(
        folder,
        {
            Q + ".weight_packed": pack_to_int32(codes, 4),
            Q + ".weight_zero_point": pack_to_int32(zeros, 4, packed_dim=0).contiguous(),
            Q + ".weight_g_idx": order.int(),
        },
    )
    scales = stored[Q + ".weight_scale"].float()
    expected = (codes.float() - zeros.float()[:, order]) * scales[:, order]
    assert torch.equal(open_checkpoint(folder, dtype="float32").read(Q + ".weight"), expected)


def test_a_command_measures_it_and_surgery_says_what_was_read(
    packed: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    folder = packed()
    said = json.loads(surgeon("eval", "packed", "--text", "text.txt", "--block-size", "32", "--json").stdout)
    assert said["perplexity"] > 1
    surgeon("prune", "packed", "--sparsity", "0.5", "--multiple-of", "4", "--out", "cut", *CALIBRATION)
    cut = folder.parent / "cut"
    assert "quantization_config" not in json.loads((cut / "config.json").read_text())
    assert "INT4 (packed, groups of 8)" in (cut / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(cut)


def stated(**changes: Any) -> Callable[[Path], None]:
    """Change the weights' entry of the quantization_config; `inputs` are those of activations."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        group = config["config_groups"]["group_0"]
        group["input_activations"] = changes.pop("inputs", None)
        group["weights"] |= changes
        set_config(folder, quantization_config=config)

    return change


def two_widths(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = {**group, "weights": {**group["weights"], "num_bits": 8}}
    set_config(folder, quantization_config=config)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "rounded activations": (stated(inputs={"num_bits": 8, "type": "int"}), "quantised"),
    "two widths": (two_widths, "quantised"),
    "floats": (stated(type="float"), "4-bit float"),
    "no scales": (lambda f: add_tensors(f, {}, without=(Q + ".weight_scale",)), "without their scales"),
    "scales of other rows": (
        lambda f: add_tensors(f, {Q + ".weight_scale": torch.ones(3, 4)}),
        r"fits the others.*weight_scale.*found F32 \[3, 4\]",
    ),
    "no groups": (
        lambda f: add_tensors(f, {Q + ".weight_scale": torch.ones(32, 0)}),
        r"expected 1 to 32 groups of 32 columns",
    ),
    "more groups than columns": (
        lambda f: add_tensors(f, {Q + ".weight_scale": torch.ones(32, 33)}),
        r"expected 1 to 32 groups of 32 columns",
    ),
    "zero points of another shape": (
        lambda f: add_tensors(f, {Q + ".weight_zero_point": torch.zeros(1, 1, dtype=torch.int32)}),
        "fits the others.*weight_zero_point",
    ),
    "codes of another dtype": (
        lambda f: add_tensors(f, {Q + ".weight_packed": torch.zeros(32, 4)}),
        r"fits the others.*found F32 \[32, 4\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_from_headers(case: str, packed: Callable[..., Path]) -> None:
    folder = packed()
    change, words = REFUSED[case]
    change(folder)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)


READ: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "no number": ("weight_scale", lambda s: s * float("nan"), "weights is not finite"),
    "another shape": ("weight_shape", lambda s: s + 1, "the stored shape of their matrix"),
    "a group without scale": ("weight_scale", lambda s: s, "has no scale"),
}


@pytest.mark.parametrize("case", READ)
def test_refused_on_reading(case: str, packed: Callable[..., Path]) -> None:
    folder = packed()
    name, change, words = READ[case]
    stored = load_file(folder / "model.safetensors")
    changed = {f"{Q}.{name}": change(stored[f"{Q}.{name}"])}
    if "group" in case:
        changed[Q + ".weight_g_idx"] = torch.full((int(stored[Q + ".weight_shape"][1]),), 99).int()
    add_tensors(folder, changed)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder).read(Q + ".weight")


def test_without_the_library_it_is_refused_with_how_to_get_it(
    packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed()
    monkeypatch.setattr("surgery.checkpoint.packed_integers.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="not installed") as caught:
        open_checkpoint(folder)
    assert "packed" in caught.value.next_step
