"""`surgeon prune`: carry out a plan. Tensors are read, cut and written one at a time; the model is never held."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint, TensorEntry
from surgery.destination import complete_folder
from surgery.errors import CheckpointError
from surgery.index import ChannelIndex, Track, source_json, untracked
from surgery.indexing import versions
from surgery.plan import ResizePlan
from surgery.resize import TensorCut, checkpoint_cuts, cut_tensor, resized_shape
from surgery.skeleton import quiet_transformers
from surgery.writer import ShardWriter, TensorSpec

COPY_BYTES = 64 << 20
MANIFEST = "surgeon.json"
SCHEMA_VERSION = 1


def planned_specs(
    checkpoint: Checkpoint, plan: ResizePlan, cuts: dict[str, TensorCut]
) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor after the cut, by name."""
    return {
        entry.name: TensorSpec(entry.dtype, resized_shape(entry, cuts.get(entry.name), plan))
        for entry in checkpoint.tensors.values()
    }


def write_pruned(
    checkpoint: Checkpoint,
    index: ChannelIndex,
    plan: ResizePlan,
    destination: Path,
    *,
    dense: dict[str, Any] | None = None,
    measure: Callable[[Checkpoint], dict[str, Any]] | None = None,
    track: Track[Any] = untracked,
) -> dict[str, Any]:
    """Write the shrunk checkpoint to `destination`, check that it loads, and return its manifest.

    `dense` holds measurements of the source; `measure`, when given, makes the same of the written checkpoint. The
    folder appears under its name only when it is complete and AutoModelForCausalLM accepts it. Raises
    CheckpointError when that fails; whatever happens, a folder already there is as it was.
    """
    index.check_source(checkpoint)
    cuts = checkpoint_cuts(checkpoint)
    specs = planned_specs(checkpoint, plan, cuts)
    with complete_folder(destination) as folder:
        with ShardWriter(folder, specs) as writer:
            entries = sorted(checkpoint.tensors.values(), key=lambda e: (e.file, e.start))
            for entry in track(entries, "writing", len(entries)):
                _write_tensor(checkpoint, entry, cuts.get(entry.name), plan, writer)
        _carry_files(checkpoint, plan, folder)
        check_loads(folder)
        measurements = {"dense": dense} if dense else {}
        if measure is not None:
            measurements["shrunk"] = measure(Checkpoint.open(folder))
        manifest = make_manifest(checkpoint, index, plan, specs, measurements)
        (folder / MANIFEST).write_text(dump_manifest(manifest), encoding="utf-8")
        write_card(folder, manifest, checkpoint)
    return manifest


def _write_tensor(
    checkpoint: Checkpoint, entry: TensorEntry, cut: TensorCut | None, plan: ResizePlan, writer: ShardWriter
) -> None:
    if cut is not None:
        writer.write(entry.name, cut_tensor(checkpoint.read(entry.name), cut, plan))
        return
    for start in range(entry.start, entry.stop, COPY_BYTES):
        stop = min(start + COPY_BYTES, entry.stop)
        writer.write_bytes(entry.name, checkpoint.source.read(entry.file, start, stop), start - entry.start)


def _carry_files(checkpoint: Checkpoint, plan: ResizePlan, folder: Path) -> None:
    """Copy every file that holds no weights; config.json gets the new width and keeps all else."""
    from surgery.families import layout_of

    for file in checkpoint.other_files:
        if file in ("README.md", MANIFEST):
            continue
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        data = bytes(checkpoint.source.read(file, 0, checkpoint.source.size(file)))
        if file == "config.json" and plan.width_after != plan.width_before:
            width_key = layout_of(checkpoint.config, checkpoint.name).width_key
            config = {**checkpoint.config, width_key: plan.width_after}
            data = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        target.write_bytes(data)


def make_manifest(
    checkpoint: Checkpoint,
    index: ChannelIndex,
    plan: ResizePlan,
    specs: dict[str, TensorSpec],
    measurements: dict[str, Any],
) -> dict[str, Any]:
    """The content of surgeon.json: what was cut from what, chosen how, and what was measured."""
    import torch

    return {
        "schema_version": SCHEMA_VERSION,
        "source": source_json(checkpoint),
        "result": {
            "parameters": sum(torch.Size(spec.shape).numel() for spec in specs.values()),
            "bytes": sum(spec.nbytes for spec in specs.values()),
        },
        "plan": plan.as_json(),
        "super_weights": list(plan.super_weights),
        "calibration": index.calibration,
        "index_run": index.run,
        "versions": versions(),
        "measurements": measurements,
    }


def dump_manifest(manifest: dict[str, Any]) -> str:
    """JSON text with one line per layer's list of channels, so that diffs stay readable."""
    layers = manifest["plan"]["layers"]
    lines = [json.dumps(layer, separators=(",", ":"), allow_nan=False) for layer in layers]
    marker = "@layers@"
    outline = {**manifest, "plan": {**manifest["plan"], "layers": marker}}
    text = json.dumps(outline, indent=1, allow_nan=False)
    return text.replace(f'"{marker}"', "[\n   " + ",\n   ".join(lines) + "\n  ]") + "\n"


def write_card(folder: Path, manifest: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Write README.md, the model card, from the manifest and the source's own card."""
    from cards import render_card

    source_card = None
    if "README.md" in checkpoint.file_names:
        size = checkpoint.source.size("README.md")
        source_card = bytes(checkpoint.source.read("README.md", 0, size)).decode("utf-8", errors="replace")
    (folder / "README.md").write_text(render_card(manifest, source_card), encoding="utf-8")


def check_loads(folder: Path) -> None:
    """Raise CheckpointError unless AutoModelForCausalLM takes every tensor of `folder` and wants no other.

    Loaded onto the meta device: names and shapes are checked by transformers itself, no weight is read.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet_transformers():
            _, info = AutoModelForCausalLM.from_pretrained(
                str(folder), device_map="meta", output_loading_info=True, dtype="auto"
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            "the written checkpoint does not load", found=str(error).splitlines()[0]
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            raise CheckpointError(
                f"the written checkpoint does not load cleanly: {kind}",
                found=str(sorted(info[kind], key=str)[:3]),
            )
