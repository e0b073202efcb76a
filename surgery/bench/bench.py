"""bench: load time, memory and speed of a checkpoint by runtime, each in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from surgery.bench.settings import RUNTIMES, BenchSettings
from surgery.checkpoint.gguf_file import GgufFile
from surgery.checkpoint.manifest import MANIFEST
from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.transformers_model import text_config
from surgery.engine.open_model import open_checkpoint
from surgery.errors import CheckpointError, SurgeonError, UsageError, one_line
from surgery.export.file_types import FileType
from surgery.export.write import known_super_weights, plan_gguf, write_gguf

PACKAGES = {"llama.cpp": "xllamacpp", "vllm": "vllm"}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A model to measure: its name, what a runtime loads, and its checkpoint (None: packed, or GGUF)."""

    name: str
    path: str
    revision: str | None = None
    checkpoint: Checkpoint | None = None
    gguf: Path | None = None
    why_not_gguf: str = ""


def subject(model: str, revision: str | None = None) -> Subject:
    """The Subject of a folder, a .gguf file or a Hub id. Raises CheckpointError for what can't be opened."""
    path = Path(model).expanduser()
    gguf = _gguf_file(path)
    if gguf is not None:
        return Subject(gguf.stem, str(path), gguf=gguf)
    try:
        checkpoint = open_checkpoint(model, revision=revision)
    except CheckpointError as error:
        config = path / "config.json"
        if not config.is_file() or "quantization_config" not in json.loads(
            config.read_text(encoding="utf-8")
        ):
            raise
        return Subject(path.resolve().name, str(path), why_not_gguf=error.what)
    if path.is_dir():
        return Subject(checkpoint.name, str(path), checkpoint=checkpoint)
    return Subject(checkpoint.name, checkpoint.name, checkpoint.revision, checkpoint)


def _gguf_file(path: Path) -> Path | None:
    """The file itself, or the one of a folder that `surgeon export` wrote."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    manifest = path / MANIFEST
    if not manifest.is_file():
        return None
    entry = json.loads(manifest.read_text(encoding="utf-8")).get("gguf")
    return path / entry["file"] if entry else None


def why_not(runtime: str, what: Subject) -> str | None:
    """Why a runtime can't run a model, before anything is started; None where it may."""
    if runtime not in RUNTIMES:
        raise UsageError("unknown runtime", expected=", ".join(RUNTIMES), found=runtime)
    package = PACKAGES.get(runtime)
    if package and find_spec(package) is None:
        return f"{package} is not installed"
    if runtime == "llama.cpp":
        return what.why_not_gguf or None
    if what.gguf is not None:
        return "the model is a GGUF file"
    config = text_config(what.checkpoint.config) if what.checkpoint is not None else {}
    if runtime == "vllm" and config.get("per_layer_config"):
        return "vLLM builds every layer with one width; prune with --pad or uniformly"
    return None


def bench(
    models: list[Subject],
    settings: BenchSettings,
    runtimes: tuple[str, ...],
    gguf_types: tuple[FileType, ...],
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """The entry `bench` of surgeon.json: settings, machine, and one result a model, runtime and type.

    A runtime that is missing or fails has the reason in place of figures. GGUF files are written to a
    temporary folder.
    """
    results = []
    for what in models:
        for runtime in runtimes:
            kinds = gguf_types if runtime == "llama.cpp" and what.gguf is None else (None,)
            for kind in kinds:
                label = runtime if kind is None else f"{runtime}, {kind.name}"
                say(f"{what.name} in {label}")
                entry = {"model": what.name, "runtime": runtime, "type": kind.name if kind else None}
                results.append({**entry, **_result(what, settings, runtime, kind)})
                if "failed" in results[-1]:
                    say(f"Not measured: {results[-1]['failed']}")
    return {"settings": settings.as_json(), "machine": machine(settings.device), "results": results}


def _result(what: Subject, settings: BenchSettings, runtime: str, kind: FileType | None) -> dict[str, Any]:
    reason = why_not(runtime, what)
    if reason is not None:
        return {"failed": reason}
    with tempfile.TemporaryDirectory(prefix="surgeon-bench-") as name:
        folder = Path(name)
        job = {**settings.as_json(), "runtime": runtime, "model": what.path, "revision": what.revision}
        if runtime == "llama.cpp":
            try:
                job["gguf"] = str(what.gguf or _exported(what, kind, folder))
            except SurgeonError as error:
                return {"failed": error.message}
            file = GgufFile(Path(job["gguf"]))
            job |= {"file_bytes": file.size, "vocabulary": len(file.metadata["tokenizer.ggml.tokens"])}
        found = run_child(job, folder)
        return {**found, "file_bytes": job["file_bytes"]} if "file_bytes" in job else found


def _exported(what: Subject, kind: FileType | None, folder: Path) -> Path:
    assert what.checkpoint is not None and kind is not None
    plan = plan_gguf(what.checkpoint, kind, known_super_weights(what.checkpoint))
    file = folder / "model.gguf"
    write_gguf(plan, file)
    return file


def run_child(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the measured process says about a job; `failed` where it died."""
    job_file, result_file = folder / "job.json", folder / "result.json"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "surgery.bench.child", str(job_file), str(result_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
    if not result_file.exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failed": f"the process ended with code {done.returncode}: {last[:200]}"}
    found: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
    return found


def machine(device: str) -> dict[str, Any]:
    """Processor, its cores, the accelerator if one computes, and the operating system."""
    import torch

    accelerator = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "accelerator": accelerator,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        return platform.processor() or one_line(error)
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
