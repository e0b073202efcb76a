"""Progress without a terminal."""

from __future__ import annotations

import pytest

from surgery.cli import common


def test_a_log_shows_life(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(common.time, "monotonic", lambda: float(next(clock)))
    assert list(common.bars(quiet=False)(range(10), "layers", 10)) == list(range(10))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "layers: 2 of 10, about 5 min left"
    assert len(lines) == 3  # one line for three steps of 25 seconds
    assert list(common.bars(quiet=True)(range(10), "layers", 10)) == list(range(10))
    assert capsys.readouterr().err == ""
