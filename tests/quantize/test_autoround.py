"""`--rounding autoround`: what the library trains is what is written, measured and loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.subprocesses import run_forked
from helpers.tiny_models import CALIBRATION
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.checkpoint.output_folder import MARGIN_BYTES
from surgery.index.super_weights import SuperWeight
from surgery.quantize.autoround import TunedMatrices
from surgery.quantize.rounding import Scheme

pytest.importorskip("auto_round", reason="AutoRound is done by the library auto-round")

TUNED = ["--bits", "3", "--group-size", "16", "--rounding", "autoround", *CALIBRATION]
# The library wants multiples of 32; two layers, as it trains one after the other.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}
DOWN = "model.layers.0.mlp.down_proj."
JOB = "import json, sys; from surgery.quantize.autoround_job import run; run(json.load(open(sys.argv[1])))"
# As a manifest has it: the module of a super weight stays whole.
SUPER = SuperWeight(0, 3, 5, value=1.0, input=1.0, output=1.0, explained=1.0, ratio=1.0, rank=1, token=0)


def logits(folder: str, text: str) -> torch.Tensor:
    """Of the calibration text, by from_pretrained of the whole model, [4, 32, V] float32."""
    ids = torch.tensor(AutoTokenizer.from_pretrained("tiny")(text)["input_ids"][:128]).view(4, 32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Dtypes of the scales that the library trained."""
    found: list[torch.dtype] = []
    parts = TunedMatrices.parts

    def spy(self: TunedMatrices, name: str, tensor: torch.Tensor, scheme: Scheme) -> Any:
        found.append(self[name]["weight_scale"].dtype)
        return parts(self, name, tensor, scheme)

    monkeypatch.setattr(TunedMatrices, "parts", spy)
    return found


@pytest.fixture
def forked_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's process is forked from one that has torch, which spares the seconds of importing it."""

    def run(folder: Path, _: bool) -> None:
        ended = run_forked(JOB, str(folder / "job.json"), where=folder, AR_LOG_LEVEL="ERROR")
        assert ended.returncode == 0, ended.stderr[-3000:]

    monkeypatch.setattr("surgery.quantize.autoround._run", run)


def test_a_tuned_folder_loads_and_is_closer_than_rounding_to_nearest(
    save_tiny: Callable[..., Path],
    surgeon: Callable[..., Any],
    license_text: str,
    trained: list[torch.dtype],
) -> None:
    source = save_tiny("llama", **WIDE)
    manifest = {"schema_version": 1, "super_weights": [SUPER.as_json()]}
    (source / "surgeon.json").write_text(json.dumps(manifest))
    Path("json.py").write_text("raise SystemExit('code of the current folder was run')")
    surgeon("quantize", "tiny", *TUNED, "--tuning-steps", "60", "--out", "tuned", "--quiet")
    assert set(trained) == {torch.float32}
    surgeon("quantize", "tiny", *TUNED[:4], "--out", "nearest", "--quiet")
    tuned, nearest = load_file("tuned/model.safetensors"), load_file("nearest/model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in tuned.items()} == {
        name: (t.dtype, t.shape) for name, t in nearest.items()
    }
    dense = load_file(source / "model.safetensors")
    assert torch.equal(tuned[DOWN + "weight"], dense[DOWN + "weight"])
    up = "model.layers.0.mlp.up_proj.weight_packed"
    assert not torch.equal(tuned[up], nearest[up])
    exact = logits("tiny", license_text)
    far, near = (float((logits(f, license_text) - exact).square().mean()) for f in ("nearest", "tuned"))
    assert near < 0.9 * far
    fields = json.loads(Path("tuned/surgeon.json").read_text())
    assert fields["quantization"]["name"] == "INT3 sym group 16 by AutoRound"
    assert "--rounding autoround --tuning-steps 60" in fields["command"]
    tuning = fields["quantization"]["tuning"]
    assert (tuning["steps"], tuning["blocks"], tuning["block_size"]) == (60, 4, 32)
    assert "nothing was trained" not in Path("tuned/README.md").read_text()
    assert "by AutoRound: 60 training steps a layer on 4 blocks" in Path("tuned/README.md").read_text()


@pytest.mark.usefixtures("forked_job")
def test_scales_are_trained_in_the_dtype_that_is_stored(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], trained: list[torch.dtype]
) -> None:
    """So that writing them changes nothing: INT8 by row lost a third of its accuracy by that.

    The same command writes the same bytes.
    """
    save_tiny("llama", dtype=torch.bfloat16, **WIDE)
    how = ("--bits", "8", "--per-channel", "--rounding", "autoround", "--tuning-steps", "2", *CALIBRATION)
    for out in ("once", "again"):
        surgeon("quantize", "tiny", *how, "--super-weights", "none", "--out", out, "--quiet")
    assert set(trained) == {torch.bfloat16}
    assert Path("once/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


@pytest.mark.usefixtures("forked_job")
def test_a_frontier_measures_what_quantize_writes(
    save_tiny: Callable[..., Path],
    surgeon: Callable[..., Any],
    license_text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("surgery.quantize.autoround.STEPS", 10)
    save_tiny("llama", **WIDE)
    on = ["--text", "text.txt", "--text-blocks", "4", "--text-block-size", "32", "--no-speed"]
    points = ["--sparsity", "0.5", "--multiple-of", "32", "--round", "3:16:autoround", "--dtype", "float32"]
    command = ["frontier", "tiny", *CALIBRATION, *on, *points, "--out", "front", "--json", "--quiet"]
    found = {point["name"]: point for point in json.loads(surgeon(*command).stdout)["points"]}
    assert list(found) == [
        *("dense", "INT3 sym group 16 by AutoRound"),
        *("cut 50%", "cut 50%, INT3 sym group 16 by AutoRound"),
    ]
    surgeon("quantize", "tiny", *TUNED, "--out", "tuned", "--super-weights", "none", "--quiet")
    rows = logits("tuned", license_text)[:, :-1].double()
    ids = torch.tensor(AutoTokenizer.from_pretrained("tiny")(license_text)["input_ids"][:128]).view(4, 32)
    nats = torch.nn.functional.cross_entropy(rows.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert found["INT3 sym group 16 by AutoRound"]["texts"][0]["nats"] == pytest.approx(float(nats), rel=1e-5)
    for point in found.values():
        assert 0 <= point["bytes"] - point["predicted_bytes"] < 16_000


def test_what_autoround_can_not_do_is_refused(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama", intermediate_size=48)
    how = ["quantize", "tiny", "--group-size", "16", "--rounding", "autoround", "--out", "x"]
    for more, told in (
        (["--asymmetric"], "symmetric"),
        (["--bits", "5"], "2, 3, 4, 8 bits"),
        (["--simulate"], "--simulate"),
        (["--compare"], "--compare"),
        (["--clip"], "--clip"),
    ):
        assert told in surgeon(*how, *more, code=2).stderr
    assert "multiples of 32" in surgeon(*how, code=1).stderr
    save_tiny("llama", name="wide", **WIDE)
    wide = ["quantize", "wide", *how[2:], "--memory", "1MiB"]
    assert "holds the whole model" in surgeon(*wide, code=1).stderr
    save_tiny("mixtral", name="mixture", **WIDE)
    assert "a module of their own" in surgeon("quantize", "mixture", *how[2:], code=1).stderr
    only = surgeon("quantize", "tiny", "--tuning-steps", "9", "--out", "x", code=2).stderr
    assert "--rounding autoround" in only
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"per_layer_config": {}}))
    assert "per_layer_config" in surgeon(*how, code=1).stderr
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("surgery.quantize.autoround.find_spec", lambda _: None)
    assert "ffn-surgeon[autoround]" in surgeon(*how, code=2).stderr
    assert not Path("x").exists()


def test_a_disk_too_small_for_temporary_files_is_refused_before_the_work(
    save_tiny: Callable[..., Path],
    surgeon: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Also where it could hold the temporary files or the result, but not both."""
    save_tiny("llama", **WIDE)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    tuned = ["--group-size", "16", "--rounding", "autoround"]
    quantize = ["quantize", "tiny", *tuned, "--out", "x"]
    points = ["--sparsity", "0.5", "--multiple-of", "32", "--round", "3:16:autoround", "--no-speed"]
    frontier = ["frontier", "tiny", *CALIBRATION, "--text", "text.txt", *points, "--out", "front"]
    for command in (quantize, frontier):
        size = json.loads(surgeon(*command, "--dry-run", "--json").stdout)
        least = size["bytes_after"] if "bytes_after" in size else size["costs"]["disk_bytes"]
        free = MARGIN_BYTES + least
        with monkeypatch.context() as full:
            full.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
            said = surgeon(*command, code=1).stderr
        assert "the disk is too small" in said and "TMPDIR" in said
    assert not Path("x").exists() and not Path("front").exists()


def test_a_failure_of_the_library_leaves_nothing(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", **WIDE)
    monkeypatch.setattr("surgery.quantize.autoround.SEED", "no seed")
    failed = surgeon("quantize", "tiny", *TUNED, "--out", "x", "--quiet", code=1)
    assert "AutoRound failed" in failed.stderr and not Path("x").exists()
