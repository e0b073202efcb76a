"""Disks that fill up, fail, or lose the end of a file while a run is under way: one line, the layer named."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from surgery.checkpoint.source import LocalFolder
from surgery.engine import resume as journal

INDEX = ("index", "tiny", "--out", "index", *CALIBRATION)


def one_line(result: Any) -> str:
    """The error, once it is seen to be one line and a next step, with nothing under the final name."""
    lines = [line for line in result.stderr.splitlines() if line.startswith(("Error", "Next"))]
    assert [line.split(":")[0] for line in lines] == ["Error", "Next"] and "Traceback" not in result.output
    assert not Path("index").exists() and not Path("cut").exists()
    return lines[0]


@pytest.mark.parametrize("kind", ["os", "safetensors"])
def test_a_disk_full_in_the_middle_and_then_not(
    kind: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = save_tiny("llama").parent
    surgeon(*INDEX)
    whole = {file.name: file.read_bytes() for file in (where / "index").iterdir()}
    (where / "index").rename(where / "whole")
    real = journal.save_file

    def full(tensors: Any, path: Path) -> None:
        if path.name == "layer-3.safetensors":
            if kind == "os":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(tensors, path)

    monkeypatch.setattr(journal, "save_file", full)
    told = one_line(surgeon(*INDEX, code=1))
    assert "the disk is full" in told and "layer 3" in told
    monkeypatch.setattr(journal, "save_file", real)
    assert "Resuming" in surgeon(*INDEX).stderr
    assert {file.name: file.read_bytes() for file in (where / "index").iterdir()} == whole


def test_room_for_hidden_states_is_claimed_before_anything_is_computed(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama")

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert "the disk is full" in one_line(surgeon(*INDEX, code=1))


@pytest.mark.parametrize("fault", ["read error", "truncated"])
@pytest.mark.parametrize("command", ["index", "prune"])
def test_a_shard_that_fails_in_the_middle(
    command: str,
    fault: str,
    save_tiny: Callable[..., Path],
    surgeon: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_tiny("llama")
    if command == "prune":
        surgeon("index", "tiny", "--out", "channels", *CALIBRATION)

    def fail(self: LocalFolder, file: str) -> None:
        if fault == "read error":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self.path / file))
        os.truncate(self.path / file, 100)

    real, seen = LocalFolder.read, 0
    size = 48 * 32 * 4  # an FFN matrix; three a layer

    def read(self: LocalFolder, file: str, start: int, stop: int) -> Any:
        nonlocal seen
        seen += stop - start == size
        if seen == 3 * 3 + 1:  # the first matrix of layer 3
            seen += 1
            fail(self, file)
        return real(self, file, start, stop)

    monkeypatch.setattr(LocalFolder, "read", read)
    cut = ("prune", "tiny", "--index", "channels", "--out", "cut", "--sparsity", "0.5", "--multiple-of", "8")
    told = one_line(surgeon(*(INDEX if command == "index" else (*cut, "--repair", "none")), code=1))
    assert ("a disk failed" if fault == "read error" else "ends too early") in told
    assert re.search(r"layer [23], model.safetensors", told), told


def test_nan_in_the_weights(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    folder = save_tiny("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[4].mlp.down_proj.weight.data[1, 1] = float("nan")
    model.save_pretrained(folder)
    assert "layer 4" in one_line(surgeon(*INDEX, code=1))
    assert torch.isnan(model.model.layers[4].mlp.down_proj.weight).any()
