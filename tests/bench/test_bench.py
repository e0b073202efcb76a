"""`surgeon bench`: what is counted and divided, what is recorded, and what can't run and why."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.bench import bench as bench_module
from surgery.bench.bench import subject, why_not
from surgery.bench.child import timed_batch
from surgery.bench.loaded import Loaded
from surgery.bench.runtimes import LOADERS
from surgery.errors import UsageError

SMALL = [
    *("--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "2", "--device", "cpu"),
    *("--batch", "1", "--batch", "2", "--threads", "1", "--dtype", "float32"),
]


def test_prefill_and_decode_follow_from_two_times() -> None:
    """A runtime that takes 2 s for a prompt and 0.5 s a token, by a clock of its own."""
    now, calls = 0.0, []

    def generate(prompts: list[list[int]], tokens: int) -> None:
        nonlocal now
        calls.append((len(prompts), len(prompts[0]), tokens))
        now += 2.0 + 0.5 * (tokens - 1)

    job = {"prompt_tokens": 100, "new_tokens": 10, "repeats": 3, "seed": 1}
    found = timed_batch(Loaded(generate, {}, 50), job, 4, clock=lambda: now)
    assert found["prefill"] == {"median": 200.0, "min": 200.0, "max": 200.0, "runs": 3}
    assert found["decode"] == {"median": 8.0, "min": 8.0, "max": 8.0, "runs": 3}
    assert found["warm_up_seconds"] == 2.0 + 7.0 and len(calls) == 8
    assert {*calls} == {(4, 100, 1), (4, 100, 11)}


def test_a_folder_and_a_file_are_measured_and_recorded(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama")
    surgeon("export", str(source), "--gguf", "--type", "q8_0")
    only = ["--runtime", "llama.cpp", "--gguf-type", "f32", "--json"]
    shown = surgeon("bench", "tiny-GGUF", "--against", str(source), *SMALL, *only)
    found = json.loads(shown.stdout)
    assert json.loads(Path("tiny-GGUF/surgeon.json").read_text())["bench"] == found
    assert [(one["model"], one["type"], one.get("failed")) for one in found["results"]] == [
        ("tiny-Q8_0", None, None),
        ("tiny", "f32", None),
    ]
    for one in found["results"]:
        assert one["load_seconds"] > 0 and one["peak_bytes"] > 1 << 20 and one["versions"]
        assert [batch["batch"] for batch in one["batches"]] == [1, 2]
        assert all(batch["prefill"]["median"] > 0 for batch in one["batches"])
    assert found["results"][0]["file_bytes"] < found["results"][1]["file_bytes"]
    card = Path("tiny-GGUF/README.md").read_text()
    assert "## Speed" in card and "xllamacpp" in card
    assert "| tiny | llama.cpp, f32 | 2 |" in card
    surgeon("card", "tiny-GGUF")
    assert Path("tiny-GGUF/README.md").read_text() == card


@pytest.mark.parametrize("runtime", ["transformers", "transformers-compiled"])
def test_transformers_generates_as_many_tokens_as_asked(
    runtime: str, save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward: forward)  # compiling takes a minute
    job = {"runtime": runtime, "model": str(save_tiny("llama")), "threads": 0, "dtype": "float32"}
    loaded = LOADERS[runtime]({**job, "device": "cpu", "prompt_tokens": 8, "new_tokens": 3})
    assert loaded.vocabulary == 258 and "torch" in loaded.versions
    loaded.generate([[1] * 8, [2] * 8], 4)  # raises where it stops early


def test_what_can_not_run_says_why(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("qwen3")
    config = json.loads((folder / "config.json").read_text())
    uneven = {**config, "per_layer_config": {"0": {"intermediate_size": 16}}}
    (folder / "config.json").write_text(json.dumps(uneven))
    shown = surgeon("bench", str(folder), *SMALL, "--runtime", "llama.cpp").stdout
    assert "not measured (llama.cpp has no architecture for layers of their own widths" in shown
    monkeypatch.setattr(bench_module, "find_spec", lambda name: object() if name == "vllm" else None)
    what = subject(str(folder))
    assert "--pad" in (why_not("vllm", what) or "")
    assert why_not("llama.cpp", what) == "xllamacpp is not installed"
    with pytest.raises(UsageError):
        why_not("onnx", what)
    surgeon("bench", "no-such-folder", *SMALL, code=1)


def test_the_process_of_llama_cpp_does_not_hold_torch() -> None:
    code = "import sys, surgery.bench.child; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_process_that_fails_says_so(tmp_path: Path) -> None:
    job = {
        "runtime": "llama.cpp",
        "batches": [1],
        "prompt_tokens": 4,
        "new_tokens": 1,
        "threads": 1,
        "vocabulary": 9,
    }
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    found = bench_module.run_child({**job, "gguf": str(tmp_path / "broken.gguf")}, tmp_path)
    assert "llama.cpp can't load the file" in found["failed"]
    (tmp_path / "result.json").unlink()
    found = bench_module.run_child({"runtime": "none such"}, tmp_path)
    assert "none such" in found["failed"]
