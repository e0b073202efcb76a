"""Least squares on what stays: against closed forms, lossless special cases, and whole models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION
from transformers import AutoModelForCausalLM

from surgery.budget.repair_cost import column_blocks, pass_schedule, repair_bytes
from surgery.index.channel_index import ChannelIndex
from surgery.repair import layer_repair
from surgery.repair.least_squares import (
    RIDGES,
    Moments,
    SplitMoments,
    adds,
    least_squares,
    mean_shift,
    refit,
)

GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    GENERATOR.manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def moments(
    u: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, weights: torch.Tensor | None = None
) -> Moments:
    made = Moments.zeros(r.shape[1], u.shape[1], torch.device("cpu"))
    made.add(u, r, weight, torch.ones(len(u)) if weights is None else weights)
    return made


def test_all_channels_and_their_own_output_give_the_weights_back() -> None:
    u, weight = normal(500, 20) * torch.logspace(-1, 1, 20), normal(7, 20)
    for ridge in RIDGES:
        assert least_squares(moments(u, u @ weight.T, weight), ridge).abs().max() < 1e-5


def test_it_is_weighted_ridge_regression() -> None:
    u, r, weight, w = normal(300, 5), normal(300, 3), normal(3, 5), torch.rand(300, generator=GENERATOR) + 0.1
    found = least_squares(moments(u, r, weight, w), 0.03)
    gram = (u.double() * w[:, None].double()).T @ u.double()
    left = (r.double() - u.double() @ weight.double().T) * w[:, None].double()
    change = torch.linalg.solve(gram + 0.03 * gram.diagonal().diag(), u.double().T @ left).T
    assert torch.allclose(found, change, atol=1e-5)


@pytest.mark.parametrize(
    ("ridge", "bound"), [(1.0, 2e-6), (0.1, 1e-5), (1e-2, 3e-5), (1e-3, 2e-4), (1e-4, 1e-9)]
)
def test_solving_in_float32_is_as_good_as_float64(ridge: float, bound: float) -> None:
    mixing = torch.eye(96) + normal(96, 96)  # correlated inputs of very different power
    u = (normal(600, 96) @ mixing) * torch.logspace(-3, 3, 96)
    found = moments(u, normal(600, 8), torch.zeros(8, 96))
    gram, cross = found.gram, found.cross
    expected = torch.linalg.solve(gram + ridge * gram.diagonal().diag(), cross.T).T
    power = gram.diagonal().sqrt()  # in units of the inputs' power, as the error on tokens counts
    change = (least_squares(found, ridge) - expected) * power
    assert change.norm() < bound * (expected * power).norm()


def test_error_is_the_unexplained_share() -> None:
    u, weight, noise = normal(400, 6), normal(4, 6), normal(400, 4)
    r = u @ weight.T + noise
    expected = float(noise.square().sum() / r.square().sum())
    assert moments(u, r, weight).error() == pytest.approx(expected, rel=1e-4)
    assert moments(u, r, torch.zeros(4, 6)).error() == pytest.approx(1.0)
    assert moments(u, r, torch.zeros(4, 6)).error(weight.double()) == pytest.approx(expected, rel=1e-4)


def test_a_removed_copy_costs_nothing() -> None:
    u, weight = normal(400, 6), normal(4, 6)
    u[:, 5] = u[:, 2]
    kept = moments(u[:, :5], u @ weight.T, weight[:, :5])
    change = least_squares(kept, 1e-9)
    assert kept.error() > 0.01 and kept.error(change) < 1e-6
    assert torch.allclose(change[:, 2].float(), weight[:, 5], atol=1e-4)


def test_a_duplicated_kept_channel_does_not_break_the_solver() -> None:
    u, weight = normal(400, 6), normal(4, 6)
    u[:, 5] = u[:, 2]
    u[:, 1] = 0
    change = least_squares(moments(u, u @ weight.T + 0.1 * normal(400, 4), weight), 1e-4)
    assert change.isfinite().all() and torch.all(change[:, 1] == 0)


def test_repair_that_does_not_help_on_held_out_blocks_is_not_made() -> None:
    weight = normal(4, 30)
    train, held = (normal(20, 30) for _ in range(2))  # fewer tokens than channels: it can only learn noise
    noise = moments(train, normal(20, 4), weight)
    none = refit(SplitMoments(noise, moments(held, held @ weight.T, weight), 0), least_squares)
    assert none.ridge is None and none.change is None
    noisy = moments(held, held @ weight.T + normal(20, 4), weight)
    found = refit(SplitMoments(noise, noisy, 0), least_squares)
    assert found.ridge is None or found.after < found.before


def test_a_removed_constant_costs_nothing_where_there_is_a_bias() -> None:
    u, weight = normal(400, 6), normal(4, 6)
    u[:, 5] = 3.0
    r, ones = u @ weight.T, torch.ones(400)
    for solve in (least_squares, partial(mean_shift, has_bias=True)):
        kept = Moments.zeros(4, 5, torch.device("cpu"), constant=True)
        kept.add(u[:, :5], r, weight[:, :5], ones)
        change = solve(kept, 0.1)
        bound = 1e-6 if solve is least_squares else 0.01  # the sums are of float32 products
        assert kept.error() > 0.1 and kept.error(change) < bound
        assert torch.allclose(change[:, 5].float(), 3 * weight[:, 5], atol=0.2)


def test_without_a_bias_kept_channels_carry_the_mean() -> None:
    u, weight = normal(4000, 6) + 2, normal(4, 6)
    kept = Moments.zeros(4, 5, torch.device("cpu"), constant=True)
    kept.add(u[:, :5], u @ weight.T, weight[:, :5], torch.ones(4000))
    change = mean_shift(kept, 1e-6, has_bias=False)
    assert torch.all(change[:, 5] == 0)
    expected = torch.linalg.lstsq(
        u[:, :5], torch.ones(4000)
    ).solution  # of the constant 1 on the kept channels
    assert torch.allclose(
        change[:, :5].float(), torch.outer(u[:, 5].mean() * weight[:, 5], expected), atol=1e-3
    )


def test_channels_solved_for_in_parts() -> None:
    assert column_blocks(10, 4, None) == [slice(0, 10)] == column_blocks(10, 4, 10**6)
    assert column_blocks(10, 4, repair_bytes([4], 4)) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    u, weight = normal(900, 12) @ normal(12, 12), normal(4, 12)
    r, now, errors = u @ weight.T + 0.1 * normal(900, 4), weight[:, :8].clone(), []
    for chunk in column_blocks(8, 4, repair_bytes([3], 4)):
        found = Moments.zeros(4, chunk.stop - chunk.start, torch.device("cpu"))
        found.add(u[:, :8], r, now, torch.ones(900), chunk)
        errors.append(found.error())
        now[:, chunk] += least_squares(found, 1e-6).float()
        assert found.error(least_squares(found, 1e-6)) < errors[-1]
    whole = moments(u[:, :8], r, weight[:, :8])
    assert errors == sorted(errors, reverse=True)
    assert whole.error(least_squares(whole, 1e-6)) <= moments(u[:, :8], r, now).error() < errors[0]


FAMILIES = [
    "llama",
    "gpt2",
    "opt",
    "phi3",
    "gpt_neox",
    "olmo2",
    "gpt_oss",
    "mixtral",
    "deepseek_v3",
    "llama4_text",
    "falcon",
]


CASES = [
    *((variant, "lstsq-acc") for variant in FAMILIES),
    *((variant, "lstsq") for variant in ("llama", "opt", "deepseek_v3")),
    *((variant, "bias") for variant in ("llama", "opt", "gpt_oss")),
]


@pytest.mark.parametrize(("variant", "how"), CASES)
def test_repaired_models_load_and_are_closer_to_the_dense_one(
    variant: str, how: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny(variant)
    surgeon("index", str(source), "--out", "index", *CALIBRATION[:2], "--blocks", "16", "--block-size", "64")
    options = ["--sparsity", "0.5", "--multiple-of", "8", "--index", "index"]
    distances = {}
    ids = ChannelIndex.load(source.parent / "index").input_ids[:4].long()
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(source).eval()(ids, use_cache=False).logits
        for repair_option in ("none", how):
            surgeon("prune", str(source), *options, "--repair", repair_option, "--out", repair_option)
            cut, info = AutoModelForCausalLM.from_pretrained(
                source.parent / repair_option, output_loading_info=True
            )
            assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            distances[repair_option] = float((cut.eval()(ids, use_cache=False).logits - dense).norm())
    manifest = json.loads((source.parent / how / "surgeon.json").read_text())
    assert manifest["plan"]["repair"] == how and len(manifest["repair"]) == 6
    assert distances[how] < distances["none"], distances


def test_attention_makes_up_for_an_ffn_that_goes(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    """Layer 3's attention comes to the dense stream after the layer, later layers make up for the rest."""
    surgeon("index", str(save_tiny("llama")), "--out", "index", *CALIBRATION[:2], "--blocks", "16")
    ids, distances = ChannelIndex.load("index").input_ids[:4].long(), {}
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained("tiny")(ids).logits
        for how in ("none", "lstsq", "lstsq-acc"):
            surgeon("prune", "tiny", "--index", "index", "--drop-ffn", "3", "--repair", how, "--out", how)
            distances[how] = float((AutoModelForCausalLM.from_pretrained(how)(ids).logits - dense).norm())
    assert distances["lstsq-acc"] < 0.95 * distances["none"], distances
    assert distances["lstsq"] == distances["none"]  # every other layer stays as it was by itself
    entry = json.loads(Path("lstsq-acc/surgeon.json").read_text())["repair"][3]
    assert not entry["ffns"] and entry["attention"]["ridge"] is not None
    assert entry["attention"]["held_out_after"] < entry["attention"]["held_out_before"]


@pytest.mark.parametrize("variant", ["llama", "olmo2", "opt", "mixtral"])
def test_a_small_budget_solves_in_parts_and_still_repairs(
    variant: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(variant)
    surgeon("index", str(source), "--out", "index", *CALIBRATION[:2], "--blocks", "16", "--block-size", "64")
    options = ["--sparsity", "0.5", "--multiple-of", "8", "--index", "index"]
    kl = {}
    for name, width in (("none", None), ("parts", 9), ("whole", None)):
        monkeypatch.setattr(
            layer_repair,
            "column_blocks",
            lambda w, d, _, width=width: column_blocks(w, d, width and repair_bytes([width], d)),
        )
        how = "none" if name == "none" else "lstsq-acc"
        surgeon("prune", str(source), *options, "--repair", how, "--out", name)
        ids = ChannelIndex.load("index").input_ids[:8].long()
        with torch.no_grad():
            dense, cut = (
                AutoModelForCausalLM.from_pretrained(folder)(ids, use_cache=False).logits.log_softmax(-1)
                for folder in (source, name)
            )
        kl[name] = float((dense.exp() * (dense - cut)).sum(-1).mean())
    entries = json.loads(Path("parts/surgeon.json").read_text())["repair"]
    assert any(found.get("parts") == 3 for entry in entries for found in entry["ffns"].values())
    assert kl["parts"] < kl["none"] and kl["whole"] < kl["none"]


def test_attention_is_repaired_where_its_output_can_be_told(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    for variant, expected in (("llama", True), ("gpt_neox", True), ("olmo2", False), ("mixtral", False)):
        source = save_tiny(variant, name=variant)
        surgeon("prune", str(source), "--multiple-of", "8", "--out", f"{variant}-cut", *CALIBRATION)
        entries = json.loads((source.parent / f"{variant}-cut" / "surgeon.json").read_text())["repair"]
        assert any(entry["attention"] for entry in entries) == expected, variant


@pytest.mark.parametrize("variant", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_storage_finer_than_memory_keeps_its_digits(
    variant: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny(variant)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16).save_pretrained(source)
    surgeon("prune", str(source), "--multiple-of", "8", "--dtype", "bfloat16", "--out", "cut", *CALIBRATION)
    before, after = (
        dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).named_parameters())
        for folder in (source, "cut")
    )
    downs = [name for name in after if re.search(r"down_proj(.weight)?$|mlp.c_proj.weight$", name)]
    finer = [name for name in downs if not torch.equal(after[name], after[name].bfloat16().half())]
    assert len(finer) == len(downs) >= 6  # bfloat16 has three binary digits less than float16
    assert all(after[name].shape != before[name].shape for name in downs)


@pytest.mark.parametrize("variant", ["llama", "mixtral"])
def test_rounding_to_the_stored_dtype_is_no_difference(
    variant: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    """Computed in float32, stored in bfloat16: what is compared is what the file gives back."""
    save_tiny(variant, dtype=torch.bfloat16)
    surgeon("prune", "tiny", "--multiple-of", "8", "--dtype", "float32", "--out", "cut", *CALIBRATION)
    measured = json.loads(Path("cut/surgeon.json").read_text())["measurements"]["verification"]
    assert measured["dtype"] == "float32" and measured["relative_difference"] < 1e-5


def test_experts_are_repaired_in_turns_that_fit() -> None:
    chunks = {f"expert.{n}": column_blocks(8, 16, repair_bytes([4], 16)) for n in range(3)}
    assert len(pass_schedule(chunks, 16, None)) == 2
    turns = pass_schedule(chunks, 16, repair_bytes([4, 4], 16))
    assert all(len(turn) <= 2 for turn in turns)
    for name, found in chunks.items():
        assert [turn[name] for turn in turns if name in turn] == found


def test_same_seed_same_bytes(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    source = save_tiny("llama")
    for name in ("a", "b"):
        surgeon("prune", str(source), "--multiple-of", "8", "--out", name, *CALIBRATION)
    files = [(source.parent / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_an_output_scaled_on_its_way_is_not_taken_for_added() -> None:
    stream, added = normal(2, 8, 16), normal(2, 8, 16)
    assert adds(added + 1e-4 * normal(2, 8, 16), added, stream)
    assert not adds(0.9 * added, added, stream) and not adds(1.1 * added, added, stream)


def test_the_recorded_command_has_the_calibrations_seed(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama")
    surgeon("index", str(source), "--out", "index", "--seed", "7", *CALIBRATION)
    surgeon(
        "prune", str(source), "--index", "index", "--multiple-of", "8", "--repair", "none", "--out", "cut"
    )
    assert "--seed 7" in json.loads(Path("cut/surgeon.json").read_text())["command"]
