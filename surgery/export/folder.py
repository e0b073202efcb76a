"""The result of an export: a folder with the GGUF file, its card and surgeon.json, or the file alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from surgery.card.publish import write_card
from surgery.checkpoint.manifest import MANIFEST, SCHEMA_VERSION, dump_manifest, source_json, versions
from surgery.checkpoint.output_folder import check_destination, check_disk, check_file, complete_folder, flush
from surgery.checkpoint.reader import Checkpoint
from surgery.export.write import GgufPlan, write_gguf
from surgery.progress import Progress, no_progress


def file_name(checkpoint: Checkpoint, type_name: str) -> str:
    """Name of the GGUF file, by the habit of the Hub: MODEL-TYPE.gguf."""
    return f"{checkpoint.name.rpartition('/')[2]}-{type_name.upper()}.gguf"


def export_gguf(
    plan: GgufPlan,
    destination: Path,
    *,
    super_weights: list[dict[str, Any]] | None = None,
    command: str | None = None,
    progress: Progress[Any] = no_progress,
) -> dict[str, Any]:
    """Write the plan's file to `destination` and return the manifest.

    `destination` is a folder, which gets the card and surgeon.json too, or a path that ends in .gguf. Either
    appears under its name when it is complete. Raises CheckpointError for weights that can't be written.
    """
    manifest = gguf_manifest(plan, super_weights, command)
    if destination.suffix == ".gguf":
        manifest["gguf"]["file"] = destination.name
        destination.absolute().parent.mkdir(parents=True, exist_ok=True)
        partial = destination.with_name(f".{destination.name}.surgeon-partial")
        try:
            write_gguf(plan, partial, progress)
            flush(partial)
            partial.replace(destination)
        finally:
            partial.unlink(missing_ok=True)
        return manifest
    with complete_folder(destination) as folder:
        write_gguf(plan, folder / manifest["gguf"]["file"], progress)
        (folder / MANIFEST).write_text(dump_manifest(manifest), encoding="utf-8")
        write_card(folder, manifest, plan.checkpoint)
    return manifest


def gguf_manifest(
    plan: GgufPlan, super_weights: list[dict[str, Any]] | None, command: str | None
) -> dict[str, Any]:
    """The content of surgeon.json beside a GGUF file."""
    checkpoint = plan.checkpoint
    source = source_json(checkpoint)
    cut: dict[str, Any] = checkpoint.read_json(MANIFEST) if MANIFEST in checkpoint.other_files else {}
    if cut.get("repo"):
        source["name"] = cut["repo"]
    return {
        "schema_version": SCHEMA_VERSION,
        "source": source,
        "result": {"parameters": checkpoint.parameters, "bytes": plan.nbytes},
        "gguf": {
            "file": file_name(checkpoint, plan.chosen.name),
            "type": plan.chosen.name,
            "architecture": plan.model.architecture,
            "types": dict(sorted(Counter(plan.types.values()).items())),
            "tensors": len(plan.types),
            "context_length": plan.model.keys["context_length"],
            "widths": sorted({*plan.model.widths}),
            "quantiser": plan.by.name,
            "kept": plan.kept,
            "notes": plan.notes,
        },
        "super_weights": super_weights or [],
        "measurements": {},
        "repo": None,
        "versions": versions(),
        "command": command,
    }


def check_gguf_destination(path: Path, *, overwrite: bool, source: Path | None, needs_bytes: int) -> None:
    """Raise DestinationError when the folder or the .gguf file `path` can't be written."""
    if path.suffix != ".gguf":
        check_destination(path, overwrite=overwrite, source=source, needs_bytes=needs_bytes)
        return
    check_file(path, overwrite=overwrite)
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    check_disk(parent, needs_bytes, "--out")
