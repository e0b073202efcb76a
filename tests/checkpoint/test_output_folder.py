"""A killed run leaves the destination absent or as it was, and the next run succeeds."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.subprocesses import run_forked
from helpers.tiny_models import CALIBRATION

from surgery.checkpoint.output_folder import complete_folder, recover

KILL_AT = """
import os, signal, sys
sys.argv[0] = "surgeon"
target, count = os.environ["KILL_AT"].split(":")
left = int(count)
def watch(event, arguments):
    global left
    named = arguments[0] if target != "os.rename" else arguments[:2]
    if event == target and ".surgeon-partial" in str(named):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
from surgery.cli.main import main
main()
"""
PRUNE = ["prune", "tiny", "--index", "index", "--multiple-of", "8", "--out", "out", "--overwrite", "--quiet"]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# open: writing the shard, config, manifest, card, reading back; os.rename: the last step.
@pytest.mark.parametrize(
    ("moment", "existing"),
    [
        *(("os.mkdir:1", False), ("open:1", True), ("open:3", False), ("open:6", True)),
        *(("open:10", False), ("open:14", True), ("os.rename:1", False), ("os.rename:1", True)),
    ],
)
def test_sigkill(
    moment: str, existing: bool, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama")
    out = source.parent / "out"
    surgeon("index", str(source), "--out", "index", *CALIBRATION)
    if existing:
        out.mkdir()
        (out / "precious.txt").write_text("as it was")
    killed = run_forked(KILL_AT, *PRUNE, where=source.parent, KILL_AT=moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    recover(out)  # what the next run does first; needed only for a kill between the two renames
    assert out.exists() == existing
    if existing:
        assert contents(out) == {"precious.txt": b"as it was"}
    surgeon(*PRUNE)
    finished = contents(out)
    surgeon(*PRUNE)
    assert contents(out) == finished and "model.safetensors" in finished
    assert [p.name for p in source.parent.iterdir() if p.name.startswith(".")] == []


def test_sigkill_while_indexing(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    source = save_tiny("llama")
    for moment in ("os.mkdir:1", "open:1", "os.rename:1"):
        index = ["index", "tiny", "--out", "index", *CALIBRATION]
        killed = run_forked(KILL_AT, *index, where=source.parent, KILL_AT=moment)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (source.parent / "index").exists()
    surgeon("index", "tiny", "--out", "index", *CALIBRATION)
    surgeon("show", "index")


def test_an_error_leaves_no_trace(tmp_path: Path) -> None:
    def write_half() -> None:
        with complete_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert list(tmp_path.iterdir()) == []
