"""Fixtures: saved tiny models, the command line, the real model, and a guard that keeps tests off the
network.
"""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
from click.testing import CliRunner
from helpers.tiny_models import REAL_MODEL, REAL_TEXT, ROOT, byte_tokenizer, tiny_model
from matplotlib.figure import Figure
from transformers.monkey_patching import clear_patch_mapping
from transformers.utils.import_utils import _LazyModule

from surgery.index.spike_detector import PROMPTS

BLANK_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNgAAAAAgAB5Sfe/AAAAABJRU5ErkJggg=="
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection that leaves this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_INET and address[0] != "127.0.0.1":
            raise OSError(f"tests must not use the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True, scope="session")
def fast_listing() -> Iterator[None]:
    """List the names of lazy modules in linear time: with quadratic, as in transformers, each load of a model
    whose layers have widths of their own spends 0.1 s on it.
    """

    def names(self: ModuleType) -> list[str]:
        return [*dict.fromkeys([*ModuleType.__dir__(self), *self.__all__])]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_LazyModule, "__dir__", names)
        yield


@pytest.fixture(autouse=True)
def forget_patches() -> Iterator[None]:
    """Leave no class patch behind: looking for classes to patch slows every later load in the process."""
    yield
    clear_patch_mapping()


@pytest.fixture(autouse=True)
def short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the machine's speed, from which durations are estimated, for an instant."""
    monkeypatch.setattr("surgery.budget.machine.PROBE_SECONDS", 0.01)


@pytest.fixture(autouse=True)
def few_prompts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for super weights with two of the prompts: all take a third of the time of a tiny model's index.

    Modules that start processes keep all, as those do.
    """
    if "helpers.subprocesses" not in {
        getattr(one, "__module__", "") for one in vars(request.module).values()
    }:
        monkeypatch.setattr("surgery.index.calibration.PROMPTS", PROMPTS[:2])


@pytest.fixture(autouse=True)
def blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are plotted, but matplotlib renders them in tests marked `draws` alone: it takes a third of the
    time of a tiny model's prune.
    """
    if "draws" not in request.keywords:
        blank = {".png": BLANK_PNG, ".svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}

        def savefig(_: Figure, path: Path, **__: Any) -> None:
            path.write_bytes(blank[path.suffix])

        monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture
def save_tiny(tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny model with its tokenizer; returns the folder."""

    def save(family: str, shard: str | None = None, name: str = "tiny", **changes: Any) -> Path:
        folder = tmp_path / name
        tiny_model(family, **changes).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
        byte_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def license_text() -> str:
    """Eleven kilobytes of English that are in the repo anyway."""
    return (ROOT / "LICENSE").read_text()


@pytest.fixture
def surgeon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, license_text: str) -> Callable[..., Any]:
    """Run a surgeon command in the test's folder; returns click's result."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(license_text)

    from surgery.cli.main import main

    def run(*arguments: str, code: int = 0) -> Any:
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == code, (arguments, result.output, result.exception)
        return result

    return run


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct as `make test` fetched it."""
    if not REAL_MODEL.exists() or not REAL_TEXT.exists():
        pytest.skip("no SmolLM2 in .cache: run `python examples/assets.py .cache`, as `make test` does")
    return REAL_MODEL
