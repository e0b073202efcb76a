"""`surgeon prune` with a repair in two processes over gloo, against one process; a process that dies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.subprocesses import SURGEON, in_two_processes, start_two, torchrun_killed
from helpers.tiny_models import CALIBRATION
from safetensors.torch import load_file

INDEX = ("index", "tiny", *CALIBRATION[:2], "--blocks", "5", "--block-size", "32", "--dtype", "float32")
CUT = ("prune", "tiny", "--index", "index", "--sparsity", "0.5", "--multiple-of", "4", "--dtype", "float32")


@pytest.fixture
def where(request: Any, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> Path:
    """A folder with a tiny model and its index."""
    folder = save_tiny(getattr(request, "param", "llama")).parent
    surgeon(*INDEX, "--out", "index")
    return folder


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("where", ["llama", "mixtral", "gpt2"], indirect=True)
@pytest.mark.parametrize("more", [(), ("--repair", "bias"), ("--memory", "40MiB")])
def test_two_processes_repair_as_one(
    more: tuple[str, ...], where: Path, surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    surgeon(*CUT, *more, "--out", "one", "--quiet")
    first, second = in_two_processes(SURGEON, *CUT, *more, "--out", "two", where=where)
    assert "Parameters" in first.stdout and second.stdout == "" and second.stderr == ""
    assert hidden(where) == []
    one, two = (load_file(where / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        scale = float(tensor.abs().max())
        assert torch.allclose(two[name], tensor, rtol=0, atol=2e-4 * scale), name
    reports = [json.loads((where / name / "surgeon.json").read_text()) for name in ("one", "two")]
    assert reports[0]["plan"] == reports[1]["plan"]
    shares = [
        [ffn["held_out_before"] for layer in report["repair"] for ffn in layer["ffns"].values()]
        for report in reports
    ]
    assert shares[0] and shares[1] == pytest.approx(shares[0], rel=1e-4)


def test_a_process_that_dies_ends_the_prune_and_the_next_goes_on(where: Path) -> None:
    in_two_processes(SURGEON, *CUT, "--out", "whole", where=where)
    torchrun_killed(where, "cut-3.json:1", "surgeon-journal-prune-1/", *CUT, "--out", "cut")
    assert not (where / "cut").exists()
    first, _ = in_two_processes(SURGEON, *CUT, "--out", "cut", where=where)
    assert "Resuming" in first.stderr and hidden(where) == []
    files = [where / name / "model.safetensors" for name in ("cut", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--repair", "none"), "one process without a repair"),
        (("--heal", "1k"), "neither search nor heal"),
    ],
)
def test_what_several_processes_do_not_share_is_refused(
    more: tuple[str, ...], message: str, where: Path
) -> None:
    for one in start_two(SURGEON, *CUT, *more, "--out", "cut", where=where):
        ended = one.wait()
        assert ended.returncode == 2 and message in ended.stderr
    assert not (where / "cut").exists()
