"""surgeon.json, the manifest of an output folder: reading and formatting it."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import CheckpointError

if TYPE_CHECKING:
    from surgery.checkpoint.reader import Checkpoint


def source_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `source` entry of index.json and surgeon.json: name, revision, digests and sizes."""
    return {
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "model_type": checkpoint.config.get("model_type"),
        "config_digest": checkpoint.config_digest,
        "shape_digest": checkpoint.shape_digest,
        "parameters": checkpoint.parameters,
        "bytes": checkpoint.nbytes,
        "stored_form": checkpoint.stored_form,
    }


def versions() -> dict[str, str]:
    """Versions of surgeon, torch, transformers and Python that computed a result."""
    import torch
    import transformers

    from surgery import __version__

    return {
        "surgeon": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def reproduce_json(manifest: dict[str, Any]) -> dict[str, Any]:
    """The `reproduce` entry of surgeon.json: all that a program needs to make the folder again, and to check.

    `command` with the commit of its `source`, the `packages` it ran with, the `seeds` it drew with, and the
    `calibration` tokens by their sha256, which an index made again must have.
    """
    calibration, plan = manifest.get("calibration") or {}, manifest.get("plan") or {}
    source, ran = manifest["source"], manifest["versions"]
    seeds = {"calibration": calibration.get("seed"), "plan": plan.get("seed")}
    return {
        "command": manifest.get("command"),
        "source": {key: source.get(key) for key in ("name", "revision", "config_digest", "shape_digest")},
        "packages": {"ffn-surgeon": ran["surgeon"], **{k: v for k, v in ran.items() if k != "surgeon"}},
        "seeds": {key: seed for key, seed in seeds.items() if seed is not None},
        "calibration": {
            key: calibration[key] for key in ("name", "blocks", "block_size", "sha256") if key in calibration
        },
    }


MANIFEST = "surgeon.json"
SCHEMA_VERSION = 1


def dump_manifest(manifest: dict[str, Any]) -> str:
    """JSON text of a manifest, with one line per layer of the plan, for readable diffs."""
    if "plan" not in manifest:
        return json.dumps(manifest, indent=1, allow_nan=False) + "\n"
    layers = manifest["plan"]["layers"]
    lines = [json.dumps(layer, separators=(",", ":"), allow_nan=False) for layer in layers]
    marker = "@layers@"
    outline = {**manifest, "plan": {**manifest["plan"], "layers": marker}}
    text = json.dumps(outline, indent=1, allow_nan=False)
    return text.replace(f'"{marker}"', "[\n   " + ",\n   ".join(lines) + "\n  ]") + "\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read surgeon.json of a folder. Raises CheckpointError when it is missing or not JSON."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "no readable surgeon.json",
            where=folder.name,
            found=str(error).partition(":")[0],
            next_step="name a folder that `surgeon prune` wrote",
        ) from error
    return manifest
