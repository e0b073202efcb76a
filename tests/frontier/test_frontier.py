"""`surgeon frontier`: every point against a folder made by another command and run whole by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.budget.kv_cache import cached_numbers
from surgery.errors import UnsupportedModelError
from surgery.frontier import run as frontier_run
from surgery.frontier import speed as frontier_speed
from surgery.frontier.decide import Row, TextLoss, best_row, difference, not_dominated, sentence
from surgery.frontier.page import document, figures, markdown
from surgery.frontier.points import Point, all_points
from surgery.quantize.rounding import Scheme
from surgery.report.page import render_page

TEXT = ["--text", "text.txt", "--text-blocks", "3", "--text-block-size", "32"]
POINTS = ["--sparsity", "0.5", "--multiple-of", "16", "--round", "4:16", "--dtype", "float32"]
COMMAND = ["frontier", "tiny", *CALIBRATION, *TEXT, *POINTS, "--out", "front"]


def whole_bits(folder: Path, text: str, text_bytes: int) -> float:
    """Bits per byte of three blocks of 32 tokens, the whole model by from_pretrained."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:96]).view(3, 32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return float(nats) / 0.6931471805599453 / text_bytes


@pytest.mark.draws
def test_points_are_what_other_commands_make(
    save_tiny: Callable[..., Path],
    surgeon: Callable[..., Any],
    license_text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = save_tiny("llama")
    save_tiny("llama", name="other", seed=1, intermediate_size=32)
    told = json.loads(surgeon(*COMMAND, "--against", "other", "--dry-run", "--json").stdout)
    with monkeypatch.context() as patched:
        patched.setattr(frontier_speed, "measure_once", interrupted)
        surgeon(*COMMAND, "--against", "other", code=1)
        # what was finished is not made again
        patched.setattr(frontier_run, "prune", None)
        patched.setattr(frontier_run, "last_states", None)
        patched.setattr(frontier_speed, "measure_once", lambda *_: (200.0, 10.0))
        found = json.loads(surgeon(*COMMAND, "--against", "other", "--json", "--quiet").stdout)
    assert [path.name for path in folder.parent.glob(".front*")] == []
    points = {point["name"]: point for point in found["points"]}
    names = ["dense", "INT4 sym group 16", "cut 50%", "cut 50%, INT4 sym group 16", "other"]
    assert list(points) == names and found["left_out"] == []
    assert [point["name"] for point in told["points"]] == names
    sizes = {point["name"]: point["bytes"] for point in told["points"]}
    surgeon("prune", "tiny", *CALIBRATION, *POINTS[:4], *POINTS[-2:], "--out", "cut")
    rounding = ["--bits", "4", "--group-size", "16", "--super-weights", "module", "--dtype", "float32"]
    surgeon("quantize", "tiny", *rounding, "--symmetric", "--simulate", "--no-clip", "--out", "rounded")
    surgeon("quantize", "cut", *rounding, "--symmetric", "--simulate", "--no-clip", "--out", "both")
    made = {"dense": "tiny", names[1]: "rounded", "cut 50%": "cut", names[3]: "both", "other": "other"}
    for name, where in made.items():
        (text,) = points[name]["texts"]
        expected = whole_bits(folder.parent / where, license_text, text["bytes"])
        assert text["bits_per_byte"] == pytest.approx(expected, rel=1e-5), name
        assert 0 <= points[name]["bytes"] - sizes[name] < 16_000, name  # headers of the files
    assert points["dense"]["texts"][0]["kl"]["mean"] == pytest.approx(0, abs=1e-9)
    assert points["cut 50%"]["texts"][0]["kl"]["mean"] > 0
    assert points["dense"]["speed"]["decode"] == 10.0
    front = folder.parent / "front"
    assert {file.name for file in front.iterdir()} == {
        "frontier.json",
        "frontier.html",
        "frontier.md",
        "frontier.png",
    }
    assert found["answer"] in (front / "frontier.md").read_text()
    assert "cut 50%, INT4 sym group 16" in (front / "frontier.html").read_text()
    assert [one.id for one in figures(found)] == ["size", "memory", "speed"]
    used = f"{(points['other']['bytes'] + points['other']['cache_bytes']) / 2**20:,.1f} MiB"
    assert f"| other | {points['other']['bytes'] / 2**20:,.1f} MiB | {used} |" in markdown(found)
    for point in found["points"]:  # as of a model with recurrent states
        point |= {"cache_bytes": None, "cache_missing": "can't be predicted: mamba"}
    assert [one.id for one in figures(found)] == ["size", "speed"]
    assert f"| other | {points['other']['bytes'] / 2**20:,.1f} MiB |  |" in markdown(found)
    assert "No memory in use of other" in render_page(document(found), "frontier.json")


@pytest.mark.parametrize("family", ["jamba", "lfm2"])
def test_recurrent_states_are_not_counted_as_keys_and_values(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="can't be predicted"):
        cached_numbers(tiny_model(family).config.to_dict(), 6, family)


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_packed_folder_runs_and_what_can_not_is_said(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    save_tiny("llama")
    found = json.loads(surgeon(*COMMAND, "--heal", "512", "--json", "--quiet").stdout)
    points = found["points"]
    names = [point["name"] for point in [*points, *found["left_out"]]]
    assert {"cut 50%, healed", "cut 50%, healed, INT4 sym group 16"} < set(names) and len(names) == 6
    for point in points:
        assert point["speed"]["decode"] > 0 and point["speed"]["prefill"] > 0, point
    refused = surgeon(*COMMAND, code=1).stderr
    assert "exists" in refused
    refused = surgeon("frontier", "tiny", *TEXT, *POINTS, "--round", "4:48", "--out", "x", code=2).stderr
    assert "group size" in refused
    refused = surgeon("frontier", "tiny", *TEXT, "--no-speed", "--target-speed", "3", code=2).stderr
    assert "--target-speed" in refused


def row(name: str, cut: bool, size: int, bits: list[float], decode: float | None = None) -> Row:
    """A row of `size` MiB whose blocks of 8 bytes have so many bits per byte each."""
    nats = tuple(8 * value * 0.6931471805599453 for value in bits)
    return Row(name, cut, size << 20, (TextLoss("t", "d", nats, 8 * len(bits)),), decode)


DENSE = row("dense", False, 100, [1.0, 1.0, 1.0], 10)
ROUNDED = row("INT4", False, 30, [1.1, 1.1, 1.1], 10)


def test_the_sentence_says_do_not_cut_where_rounding_is_better() -> None:
    cut = row("cut 50%", True, 60, [1.5, 1.4, 1.6], 20)
    assert sentence([DENSE, ROUNDED, cut]).startswith("Do not cut: ")
    assert "do not cut; cut 50% has 0.4000 bits per byte more (± 0.0577)" in sentence(
        [DENSE, ROUNDED, cut], size=70 << 20
    )
    # a cut is the only point that is fast enough
    assert "cut 50%" in sentence([DENSE, ROUNDED, cut], speed=15)
    assert "slowest round decoded 12.0" in sentence([DENSE, ROUNDED, replace(cut, slowest=12.0)], speed=15)
    assert "no uncut point fits" in sentence([DENSE, ROUNDED, cut], speed=15)
    assert sentence([DENSE, ROUNDED, cut], size=10 << 20).startswith("No point has at most 10")
    assert best_row([DENSE, ROUNDED, cut], 70 << 20, None) is ROUNDED
    assert [each.name for each in not_dominated([DENSE, ROUNDED, cut])] == ["INT4", "dense"]


def test_the_sentence_names_cuts_that_are_worth_their_bytes() -> None:
    small = row("cut 50%, INT4", True, 20, [1.3, 1.3, 1.3])
    assert sentence([DENSE, ROUNDED, small]).startswith(
        "Do not cut unless the model must be smaller than INT4"
    )
    good = row("cut 25%", True, 60, [1.02, 1.08, 1.05])
    assert sentence([DENSE, ROUNDED, good]).endswith(
        "no uncut point of the same bytes is as good as cut 25%."
    )
    unclear = row("cut 25%", True, 60, [1.02, 1.2, 1.05])
    assert sentence([DENSE, ROUNDED, unclear]).startswith("Do not cut: ")
    near = row("cut 30%", True, 29, [1.0, 1.2, 1.095])
    said = sentence([DENSE, ROUNDED, near], size=30 << 20)
    assert "INT4 (30 MiB, 1.1000 bits per byte, +0.1000) is best: do not cut; cut 30% has 0.0017" in said
    assert "less (± 0.0578), which is no clear difference" in said
    gap, error = difference(near, ROUNDED)
    assert gap == pytest.approx(-0.005 / 3) and error == pytest.approx(0.0577639, rel=1e-4)


def test_cache_is_what_transformers_caches() -> None:
    for family in ("llama", "gemma2", "gpt2", "deepseek_v3"):
        model = tiny_model(family, **({"num_key_value_heads": None} if family == "gpt2" else {}))
        with torch.no_grad():
            cache = model(torch.zeros(1, 6, dtype=torch.long), use_cache=True).past_key_values
        stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert 4 * cached_numbers(model.config.to_dict(), 6, family) == stored, family


def test_points_follow_their_bases() -> None:
    schemes = [Scheme(8, True, size=32), Scheme(4, True, size=32)]
    points = all_points([0.25], schemes, heal_tokens=1000, other="small", key="k")
    assert [point.name for point in points] == [
        "dense",
        "INT8 sym group 32",
        "INT4 sym group 32",
        "cut 25%",
        "cut 25%, INT8 sym group 32",
        "cut 25%, INT4 sym group 32",
        "cut 25%, healed",
        "cut 25%, healed, INT8 sym group 32",
        "cut 25%, healed, INT4 sym group 32",
        "small",
    ]
    assert len({point.slug for point in points}) == 10
    assert Point(0.25, 1000).slug != Point(0.25, 2000).slug
