"""The time of a token from timed layers: fitted, asked of a planted machine, and of real random models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import CALIBRATION, opened
from transformers import AutoModelForCausalLM

from surgery.bench import child, layer_speed
from surgery.bench.layer_speed import ROUNDS, fit, measure_layer_speed
from surgery.bench.settings import BenchSettings
from surgery.budget.target import SpeedModel
from surgery.checkpoint.transformers_model import build_config
from surgery.errors import SurgeonError

ENDS, LAYER, NUMBER = 2e-3, 5e-4, 1e-8


def planted_machine(job: dict[str, Any], _: Path) -> dict[str, Any]:
    """Times of a machine that takes ENDS, LAYER a layer and NUMBER a parameter of the layers."""
    model = AutoModelForCausalLM.from_config(build_config(job["config"], "planted"))
    layers = next(one for one in model.modules() if type(one).__name__ == "ModuleList")
    parameters = sum(one.numel() for one in layers.parameters())
    seconds = ENDS + LAYER * len(layers) + NUMBER * parameters
    return {"batches": [{"decode": {"median": 1 / seconds}, "prefill": {"median": 10 / seconds}}]}


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "gemma3_text"])
def test_a_planted_machine_is_found(family: str, save_tiny: Callable[..., Path]) -> None:
    model = opened(save_tiny(family))
    found = measure_layer_speed(model, run=planted_machine)
    dense = AutoModelForCausalLM.from_pretrained(model.name if Path(model.name).exists() else model.folder)
    layers = dense.get_submodule(model.meta_model.layers_path)
    parameters = sum(one.numel() for one in layers.parameters())
    expected = ENDS + LAYER * len(layers) + NUMBER * parameters
    assert found.seconds(len(layers), model.checkpoint.parameters) == pytest.approx(expected, rel=1e-6)
    assert (found.ends, found.layer) == (pytest.approx(ENDS, rel=1e-3), pytest.approx(LAYER, rel=1e-3))
    prefill = measure_layer_speed(model, "prefill", run=planted_machine)
    assert prefill.seconds(3, 10**6) == pytest.approx(found.seconds(3, 10**6) / 10, rel=1e-3)


def test_no_part_of_a_time_is_below_zero() -> None:
    points = [(2, 100, 1.0), (4, 200, 2.1), (2, 50, 1.02), (4, 100, 2.0)]
    found = fit(points, "decode", 0)
    assert min(found.ends, found.layer, found.number) == 0.0
    assert found.layer == pytest.approx(0.5, rel=0.05)


def test_the_median_round_counts(save_tiny: Callable[..., Path]) -> None:
    """A machine that is ten times as slow in one round, whichever it is, gives the same answer."""
    model, jobs = opened(save_tiny("llama")), []

    def disturbed(job: dict[str, Any], folder: Path) -> dict[str, Any]:
        jobs.append(job)
        found = planted_machine(job, folder)
        if 4 < len(jobs) <= 8:  # the second round of four shapes
            found["batches"][0]["decode"]["median"] /= 10
        return found

    calm = measure_layer_speed(model, run=planted_machine)
    assert measure_layer_speed(model, run=disturbed).seconds(5, 10**5) == pytest.approx(
        calm.seconds(5, 10**5)
    )


def test_random_layers_run_in_transformers(save_tiny: Callable[..., Path]) -> None:
    settings = BenchSettings(prompt_tokens=8, new_tokens=12, batches=(1,), repeats=3, threads=1)
    jobs = []

    def run(job: dict[str, Any], _: Path) -> dict[str, Any]:
        jobs.append(job)
        return child.run(job)

    found = measure_layer_speed(opened(save_tiny("llama")), settings=settings, run=run)
    assert 0 < found.seconds(6, 100_000) < 10
    shapes = [(job["config"]["num_hidden_layers"], job["config"]["intermediate_size"]) for job in jobs]
    assert shapes == [(3, 48), (3, 24), (6, 48), (6, 24)] * ROUNDS


def test_what_can_not_run_is_said(save_tiny: Callable[..., Path]) -> None:
    with pytest.raises(SurgeonError, match="can't be measured here"):
        measure_layer_speed(opened(save_tiny("llama")), run=lambda *_: {"failed": "no room"})


def test_a_speed_is_a_target(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def measured(model: Any, of: str, **_: Any) -> SpeedModel:
        asked.append(of)
        return SpeedModel(of, 1e-3, 1e-4, 1e-7, model.checkpoint.parameters - 60_000)

    monkeypatch.setattr(layer_speed, "measure_layer_speed", measured)
    options = ["--target-speed", "1.3x", "--multiple-of", "4", "--search-time", "0s", "--repair", "none"]
    done = surgeon("prune", str(save_tiny("llama")), *options, *CALIBRATION, "--json", "--out", "cut")
    found = json.loads(done.stdout)
    target, speed = (
        found["plan"]["search"]["target"],
        SpeedModel(**found["plan"]["search"]["target"]["speed"]),
    )
    model = AutoModelForCausalLM.from_pretrained("cut")
    parameters, layers = sum(one.numel() for one in model.parameters()), len(model.model.layers)
    assert found["plan"]["search"]["predicted"] == round(1e9 * speed.seconds(layers, parameters))
    assert 0.9 * target["amount"] < found["plan"]["search"]["predicted"] <= target["amount"]
    assert asked == ["decode"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-speed", "0.9x"], "not a factor above 1"),
        (["--target-speed", "1.3x", "--cuts", "ffn,attention"], "is not measured"),
        (["--target-speed", "1.3x", "--target-params", "1k"], "one target"),
        (["--sparsity", "0.5", "--speed-of", "prefill"], "is for --target-speed"),
    ],
)
def test_speeds_that_make_no_sense_are_refused(
    options: list[str], message: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    refused = surgeon("prune", str(save_tiny("llama")), *options, *CALIBRATION, "--out", "cut", code=2)
    assert message in refused.output and "Indexing" not in refused.output
