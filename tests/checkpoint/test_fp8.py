"""Checkpoints stored in FP8 are read as their dequantised weights, and pruned to plain checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fp8 import FORMS, Tensors, add_tensors, expanded, quantise, set_config, store_fp8
from helpers.live_memory import Live
from helpers.loopback_hub import serving
from helpers.masking import IDS, kept_channels, mask
from helpers.tiny_models import CALIBRATION
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from surgery.checkpoint import fp8
from surgery.checkpoint.fp8 import Fp8Checkpoint, dequantise
from surgery.checkpoint.fp8_scales import find_grids
from surgery.checkpoint.quantised_forms import Fp8Scheme
from surgery.checkpoint.quiet_transformers import quiet_transformers
from surgery.checkpoint.safetensors_header import TensorEntry
from surgery.engine.open_model import open_checkpoint, open_model
from surgery.evaluate.perplexity import perplexity, perplexity_cost
from surgery.text import TokenBlocks

UP = "model.layers.2.mlp.up_proj.weight"
SCALE = "model.layers.2.mlp.up_proj.weight_scale_inv"


def full_model(folder: Path, dense: Tensors) -> Any:
    """The dequantised model, in float32, from the second route's tensors."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    plain = folder.parent / "dense"
    shutil.copytree(folder, plain)
    (plain / "config.json").write_text(json.dumps(config))
    save_file(dense, plain / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()


@pytest.mark.parametrize("form", FORMS)
def test_tensors_are_the_codes_times_their_scales(form: str, save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("llama", dtype=torch.bfloat16)
    dense = store_fp8(folder, form)
    plain = load_file(folder / "model.safetensors")
    for dtype in ("float32", "bfloat16", "float16"):
        checkpoint = open_checkpoint(folder, dtype=dtype)
        assert set(checkpoint.tensors) == set(dense)
        for name, entry in checkpoint.tensors.items():
            coded = plain[name].dtype == torch.float8_e4m3fn
            wanted = dense[name].to(getattr(torch, dtype)) if coded else plain[name]
            assert (entry.dtype, entry.shape) == (wanted.dtype, tuple(wanted.shape))
            assert torch.equal(checkpoint.read(name), wanted), (name, dtype)
            assert b"".join(checkpoint.pieces(name)) == bytes(wanted.view(-1).view(torch.uint8).numpy())
        assert "quantization_config" not in checkpoint.config and checkpoint.config["dtype"] == dtype
        assert checkpoint.nbytes == sum(entry.nbytes for entry in checkpoint.tensors.values())
    automatic = open_checkpoint(folder)
    assert automatic.tensors[UP].dtype == torch.bfloat16
    # an index made in one dtype serves another
    assert automatic.shape_digest == checkpoint.shape_digest
    assert automatic.config_digest == checkpoint.config_digest


@pytest.mark.parametrize("form", ["blocks", "rows", "one", "compressed blocks"])
def test_tensors_equal_what_transformers_dequantises(form: str, save_tiny: Callable[..., Path]) -> None:
    """transformers takes FP8 apart on a CPU, where its blocks divide the matrices."""
    folder = save_tiny("llama", dtype=torch.bfloat16, intermediate_size=180, hidden_size=60, head_dim=30)
    store_fp8(folder, form)
    options = {} if form == "blocks" else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    with quiet_transformers():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).state_dict()
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.read(name), theirs[name]), name


@pytest.mark.parametrize(
    ("form", "family", "words"),
    [
        ("blocks", "llama", "FP8 (e4m3, blocks of 20 x 12), dequantised to float32"),
        ("tensor", "qwen3", "FP8 (e4m3, one scale a matrix), dequantised to float32"),
        ("rows", "deepseek_v3", "FP8 (e4m3, one scale a row), dequantised to float32"),
        ("blocks", "mixtral", "FP8 (e4m3, blocks of 20 x 12), dequantised to float32"),
    ],
)
def test_a_pruned_model_is_plain_and_equals_masking(
    form: str, family: str, words: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny(family, shard="20KB")
    dense = store_fp8(source, form)
    (source / "hf_quant_config.json").write_text("{}")
    (source / "recipe.yaml").write_text("{}")
    options = ["--multiple-of", "8", "--repair", "none", "--dtype", "float32", "--out", "cut"]
    surgeon("index", "tiny", "--out", "index", *CALIBRATION)
    surgeon("prune", "tiny", "--index", "index", *options)
    cut = source.parent / "cut"
    model, info = AutoModelForCausalLM.from_pretrained(cut, output_loading_info=True)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config = json.loads((cut / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert not {"hf_quant_config.json", "recipe.yaml"} & {file.name for file in cut.iterdir()}
    manifest = json.loads((cut / "surgeon.json").read_text())
    assert manifest["source"]["stored_form"] == words and words in (cut / "README.md").read_text()
    assert manifest["source"]["bytes"] == 4 * sum(tensor.numel() for tensor in dense.values())
    masked = full_model(source, dense)
    meta_model = open_model(source, dtype="float32").meta_model
    mask(masked, meta_model.family.sites, meta_model.layers_path, kept_channels(manifest))
    with torch.no_grad():
        difference = model.eval()(IDS, use_cache=False).logits - masked(IDS, use_cache=False).logits
    assert difference.abs().max() < 1e-4
    refused = surgeon("prune", "tiny", "--index", "index", *options[:-1], "tiny", code=1)
    assert "is the source" in refused.stderr


def test_every_command_reads_it(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    source = save_tiny("llama", dtype=torch.bfloat16)
    dense = store_fp8(source, "blocks")
    shutil.copytree(source, source.parent / "plain")
    plain = source.parent / "plain"
    kept = load_file(source / "model.safetensors")
    values = {n: t.bfloat16() if kept[n].dtype == torch.float8_e4m3fn else kept[n] for n, t in dense.items()}
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    set_config(plain, quantization_config=None)
    text = ["--text", "text.txt", "--blocks", "2", "--block-size", "32", "--json"]
    ours, theirs = (json.loads(surgeon("eval", name, *text).stdout) for name in ("tiny", "plain"))
    assert ours["perplexity"] == theirs["perplexity"]
    rounding = ["--simulate", "--super-weights", "none", "--group-size", "8", *CALIBRATION]
    surgeon("quantize", "tiny", "--out", "rounded", *rounding)
    surgeon("quantize", "plain", "--out", "rounded-plain", *rounding)
    ours, theirs = (load_file(source.parent / f / "model.safetensors") for f in ("rounded", "rounded-plain"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and len(ours) == len(theirs)
    surgeon(
        "quantize", "tiny", "--out", "packed", "--super-weights", "none", "--group-size", "16", *CALIBRATION
    )
    stated = json.loads((source.parent / "packed" / "config.json").read_text())["quantization_config"]
    assert stated["quant_method"] == "compressed-tensors"
    card = (source.parent / "rounded" / "README.md").read_text()
    assert "FP8 (e4m3, blocks of 20 x 12), dequantised to bfloat16" in card
    surgeon("prune", "tiny", "--multiple-of", "8", "--out", "cut", *CALIBRATION)  # with the default repair
    surgeon("prune", "plain", "--multiple-of", "8", "--out", "cut-plain", *CALIBRATION)
    ours, theirs = (load_file(source.parent / f / "model.safetensors") for f in ("cut", "cut-plain"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and len(ours) == len(theirs)


def test_scales_of_activations_are_dropped_and_layers_beside_the_model_are_dequantised(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama")
    store_fp8(source, "tensor")
    codes, scale, extra = quantise(torch.randn(32, 64), (None, None), lambda s: s.view(()))
    attention = "model.layers.0.self_attn."
    more = {f"{attention}q_proj.input_scale": torch.tensor(0.5), f"{attention}k_scale": torch.tensor(2.0)}
    add_tensors(source, more | {"mtp.fc.weight": codes, "mtp.fc.weight_scale": scale})
    surgeon(
        "prune", "tiny", "--multiple-of", "8", "--out", "cut", "--dtype", "float32", "--repair", "none",
        *CALIBRATION,
    )  # fmt: skip
    cut = source.parent / "cut"
    written = load_file(cut / "model.safetensors")
    assert torch.equal(written["mtp.fc.weight"], extra)
    assert not [name for name in written if "scale" in name]
    fates = json.loads((cut / "surgeon.json").read_text())["outside_model"]
    assert ("drop", 2) in {(f["fate"], f["tensors"]) for f in fates if "activations" in f["reason"]}


@pytest.mark.parametrize("ranges", [False, True])
def test_a_checkpoint_on_the_hub_is_read(
    ranges: bool, save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    folder = save_tiny("llama")
    dense = store_fp8(folder, "blocks")
    with serving() as hub:
        hub.put("org/tiny", {path.name: path.read_bytes() for path in folder.iterdir()})
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        checkpoint = open_checkpoint("org/tiny", dtype="float32", range_reads=ranges)
        assert isinstance(checkpoint, Fp8Checkpoint) and checkpoint.revision
        assert torch.equal(checkpoint.read(UP), dense[UP])
        assert bool(list((tmp_path / "cache").rglob("*.safetensors"))) != ranges
        size = (folder / "model.safetensors").stat().st_size
        assert checkpoint.file_fingerprints()["model.safetensors"][0] == size


def entry(name: str, dtype: torch.dtype, *shape: int) -> TensorEntry:
    return TensorEntry(name, "model.safetensors", dtype, shape, 0, torch.Size(shape).numel() * dtype.itemsize)


F8, F32 = torch.float8_e4m3fn, torch.float32
# name, shape of the weight, shape of the scales, scheme, and the axes of one scale for every element
FLIPPED = Fp8Scheme(None, flipped_experts=True)
STACKED = [
    ("gate_up_proj", (3, 40, 24), (3, 2, 2), Fp8Scheme((32, 16)), lambda s: blocks_of(s, (32, 16))),
    ("gate_up_proj", (3, 40, 24), (3, 2, 1), Fp8Scheme(None), lambda s: blocks_of(s, (20, 24))),
    ("gate_up_proj", (3, 24, 40), (3, 1, 40), FLIPPED, lambda s: s),
    ("down_proj", (3, 40, 24), (3, 24, 1), FLIPPED, lambda s: s.transpose(1, 2)),
    ("down_proj", (3, 24, 24), (3, 24, 1), FLIPPED, lambda s: s.transpose(1, 2)),
    ("down_proj", (3, 24, 40), (3, 24, 1), Fp8Scheme(None), lambda s: s),
    ("down_proj", (3, 24, 40), (3,), Fp8Scheme(None), lambda s: s[:, None, None]),
    ("down_proj", (3, 24, 40), (3, 1, 1), Fp8Scheme(), lambda s: s),
    ("down_proj", (3, 24, 40), (), Fp8Scheme(), lambda s: s),
]


def blocks_of(scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    return torch.stack([expanded(one, (40, 24), block) for one in scales])


@pytest.mark.parametrize(("leaf", "shape", "scales", "scheme", "spread"), STACKED)
@pytest.mark.parametrize("chunk", [1, 100, 1 << 18])
def test_stacked_experts(
    leaf: str,
    shape: tuple[int, ...],
    scales: tuple[int, ...],
    scheme: Fp8Scheme,
    spread: Callable[[torch.Tensor], torch.Tensor],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fp8, "CHUNK", chunk)
    name = f"layers.0.experts.{leaf}"
    for suffix in ("_scale_inv", "_scale"):
        stored = [entry(name, F8, *shape), entry(name + suffix, F32, *scales)]
        found = find_grids({one.name: one for one in stored}, scheme)
        assert found[name].scale == name + suffix
    grid = found[name]
    codes = torch.randn(shape).to(F8)
    values = torch.rand(scales) + 0.5
    made = dequantise(codes, values.view(grid.grid), grid, F32)
    assert made is not None and torch.equal(made, codes.float() * spread(values))


def test_blocks_of_a_config_that_states_nothing_are_128_wide(save_tiny: Callable[..., Path]) -> None:
    source = save_tiny("llama", intermediate_size=200)
    store_fp8(source, "not stated")
    codes, scales, _ = quantise(torch.randn(200, 32), (128, 128))
    scale = UP.removesuffix("weight") + "weight_scale"
    add_tensors(source, {UP: codes, SCALE: scales}, without=(scale,))
    made = open_checkpoint(source, dtype="float32").read(UP)
    assert torch.equal(made, codes.float() * expanded(scales, (200, 32), (128, 128)))


@pytest.mark.parametrize("stored", ["float8_e8m0fnu", "bytes"])
def test_scales_that_are_powers_of_two(stored: str, save_tiny: Callable[..., Path]) -> None:
    if stored != "bytes" and not hasattr(torch, stored):
        pytest.skip("PyTorch 2.7 and later")
    source = save_tiny("llama")
    store_fp8(source, "blocks")
    before = load_file(source / "model.safetensors")
    exponents = torch.randint(110, 130, before[SCALE].shape, dtype=torch.uint8)
    add_tensors(source, {SCALE: exponents if stored == "bytes" else exponents.view(torch.float8_e8m0fnu)})
    config = json.loads((source / "config.json").read_text())["quantization_config"]
    set_config(source, quantization_config=config | {"scale_fmt": "ue8m0"})
    scales = 2.0 ** (exponents.float() - 127)
    made = open_checkpoint(source, dtype="float32").read(UP)
    assert torch.equal(made, before[UP].float() * expanded(scales, tuple(made.shape), (20, 12)))


@pytest.mark.parametrize("form", ["blocks", "rows"])
def test_memory_of_reading_is_estimated(form: str, save_tiny: Callable[..., Path]) -> None:
    source = save_tiny("llama", hidden_size=256, intermediate_size=2048)
    store_fp8(source, form)
    model = open_model(source, dtype="float32", device="cpu")
    checkpoint = model.checkpoint
    with Live() as live:
        result = checkpoint.read(UP)
    assert live.peak <= result.nbytes + checkpoint.reading_bytes
    cost = perplexity_cost(model, *IDS.shape)
    assert cost.smallest_bytes > checkpoint.reading_bytes
    scarce = open_model(source, dtype="float32", device="cpu", memory=cost.smallest_bytes)
    estimated = perplexity_cost(scarce, *IDS.shape).host_bytes
    with Live() as live:
        perplexity(scarce, TokenBlocks(IDS, "random", None, 1))
    assert live.peak <= estimated
