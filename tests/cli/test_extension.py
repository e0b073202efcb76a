"""`hf surgeon`: the `hf` command line finds the console script and passes its arguments on."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from helpers.tiny_models import ROOT

from surgery import __version__


def test_hf_runs_the_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extensions = pytest.importorskip("huggingface_hub.cli.extensions")
    folder, said = tmp_path / "hf-surgeon", tmp_path / "said"
    folder.mkdir()
    script = folder / "hf-surgeon"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m surgery.cli.extension "$@" > {said}\n')
    script.chmod(0o755)
    fields = {"owner": "me", "repo": "hf-surgeon", "repo_id": "me/hf-surgeon", "short_name": "surgeon"}
    fields |= {"executable_path": str(script), "type": "python", "installed_at": "2026-11-26T00:00:00+00:00"}
    (folder / extensions.MANIFEST_FILENAME).write_text(json.dumps(fields))
    monkeypatch.setattr(extensions, "EXTENSIONS_ROOT", tmp_path)
    monkeypatch.setattr(extensions.constants, "HF_HUB_DISABLE_UPDATE_CHECK", True)
    monkeypatch.chdir(ROOT)
    assert extensions.dispatch_unknown_top_level_extension(["surgeon", "--version"], {"jobs"}) == 0
    assert __version__ in said.read_text()


def test_the_console_script_is_the_one_that_hf_looks_for() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["hf-surgeon"].partition(":")
    assert callable(getattr(import_module(module), function))
    shown = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("Usage: hf surgeon")
