"""Routed experts repaired together: against the joint least squares, and models without some experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION, opened
from transformers import AutoModelForCausalLM

from surgery.engine.hooks import FfnCall, module_outputs
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.index.channel_index import ChannelIndex
from surgery.repair.least_squares import Moments, least_squares
from surgery.repair.mixture import Routed, adds_experts, shares

TOKENS, INPUTS, OUTPUTS, EXPERTS = 400, 6, 5, 3


def test_passes_come_to_the_joint_least_squares() -> None:
    """The error falls in every pass, to what all experts' matrices solved for in one system leave."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    missing, inputs = normal(TOKENS, OUTPUTS), normal(EXPERTS, TOKENS, INPUTS)
    weight = torch.rand(EXPERTS, TOKENS, 1, generator=generator) + 0.1
    first = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(-1)[:, :2]  # two experts of each token
    goes = [(first == expert).any(-1).nonzero()[:, 0] for expert in range(EXPERTS)]
    design = torch.cat(
        [
            torch.zeros(TOKENS, INPUTS).index_copy(0, goes[e], (weight[e] * inputs[e])[goes[e]])
            for e in range(EXPERTS)
        ],
        1,
    ).double()
    best = design @ torch.linalg.lstsq(design, missing.double()).solution
    least = float((missing - best).square().sum())
    left, errors = missing, [float(missing.square().sum())]
    for _ in range(60):
        calls = [
            Routed(FfnCall(str(e), goes[e], inputs[e][goes[e]], missing), goes[e], weight[e][goes[e]])
            for e in range(EXPERTS)
        ]
        added = torch.zeros_like(missing)
        for one, share, power in shares(calls, left):
            moments = Moments.zeros(OUTPUTS, INPUTS, torch.device("cpu"))
            moments.add(one.call.u, share, torch.zeros(OUTPUTS, INPUTS), power)
            change = least_squares(moments, 1e-12).float()
            added.index_add_(0, one.tokens, one.weight * (one.call.u @ change.T))
        left = left - added
        errors.append(float(left.square().sum()))
    assert all(after < before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[3] - least < 0.5 * (errors[0] - least)
    assert errors[-1] == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "granitemoe"]
)
def test_what_experts_add_is_told_from_the_layer(family: str, save_tiny: Callable[..., Path]) -> None:
    model = StreamedModel(opened(save_tiny(family)))
    stream = TokenStream(model, torch.arange(24).view(2, 12), micro_batch=2)
    seen = set()
    for number, layer in model.stream_layers(range(len(model.layers))):
        ffns = model.ffns(number)
        entering = stream.store.get(0, stream.slices[0], model.device)
        run = partial(model.run_layer, layer, entering, stream.calls[0][number])
        has = any(ffn.stacked for ffn in ffns)
        assert adds_experts(ffns, run) == has, number
        if has:
            assert not adds_experts(ffns, lambda run=run: torch.cat([run()] * 2, -1))  # widened on the way
            module = next(ffn.module for ffn in ffns if ffn.stacked)
            with module_outputs({"experts": module}, lambda _, out: 2 * out):
                assert not adds_experts(ffns, run)
        seen.add(has)
        stream.forward(number, layer)
    assert True in seen


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"num_local_experts": 6}),
        ("qwen3_moe", {"num_experts": 6, "norm_topk_prob": True}),
        ("deepseek_v3", {"n_routed_experts": 6}),
        ("gpt_oss", {"num_local_experts": 6}),
    ],
)
def test_experts_that_stay_make_up_for_those_that_go(
    family: str, changes: dict[str, int], save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny(family, **changes)
    surgeon("index", "tiny", "--out", "index", *CALIBRATION[:2], "--blocks", "16", "--block-size", "64")
    ids, distances = ChannelIndex.load("index").input_ids[:4].long(), {}
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(source).eval()(ids, use_cache=False).logits
        for out, more in (("none", ("--repair", "none")), ("repaired", ())):
            surgeon("prune", "tiny", "--index", "index", "--keep-experts", "4", *more, "--out", out)
            cut = AutoModelForCausalLM.from_pretrained(out).eval()
            distances[out] = float((cut(ids, use_cache=False).logits - dense).norm())
    assert distances["repaired"] < 0.95 * distances["none"], distances
    entries = json.loads(Path("repaired/surgeon.json").read_text())["repair"]
    lacking = [entry["experts"]["lacking"] for entry in entries if "experts" in entry]
    assert lacking and all(one[-1] <= one[0] * (1 + 1e-6) for one in lacking)
    assert any(one[-1] < 0.99 * one[0] for one in lacking)
    changed = sum(bool(entry["experts"]["changed"]) for entry in entries if "experts" in entry)
    assert f"routed experts together in {changed}" in Path("repaired/README.md").read_text()
