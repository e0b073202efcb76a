"""`surgeon prune`: carry out a plan. One layer is read, cut and written at a time; the model is never held."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.cut_costs import cut_costs, planned
from surgery.cutting import CuttingWalk
from surgery.destination import complete_folder, replace_text
from surgery.families import check_prunable, family_of, text_config
from surgery.gate import GATE_TOKENS, cpu_options, pass_gate
from surgery.index import ChannelIndex, Track, source_json, untracked
from surgery.indexing import RunOptions, versions
from surgery.journal import Journal
from surgery.plan import ResizePlan
from surgery.plots import CONCENTRATION, CUT, save_figures
from surgery.resize import TensorCut, resized_shape, tensor_cuts
from surgery.skeleton import auto_class
from surgery.stream import StreamedModel
from surgery.writer import TensorSpec

MANIFEST = "surgeon.json"
SCHEMA_VERSION = 1
MODELING = "modeling_per_layer"
MODELING_TEMPLATE = '''"""{name} whose decoder layers have feed-forward widths of their own.

`per_layer_config` in config.json holds them. Written by surgeon; loaded with `trust_remote_code=True`. With surgeon
installed, `import surgery.loading` does the same and no code of this repo is run.
"""

from transformers import {name}


class PerLayerForCausalLM({name}):
    def __init__(self, config):
        super().__init__(config)
        layers = self.{layers}
        for index, layer in enumerate(layers):
            layers[index] = type(layer)(config.per_layer_config[index], index)
        self.post_init()
'''


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
    options: RunOptions | None = None,
    dense: dict[str, Any] | None = None,
    measure: Callable[[Checkpoint], dict[str, Any]] | None = None,
    command: str | None = None,
    repo: str | None = None,
    card_template: str | None = None,
    journal: Journal | None = None,
    track: Track[Any] = untracked,
) -> dict[str, Any]:
    """Write the shrunk checkpoint to `destination`, put it through the load gate, and return its manifest.

    Every tensor is read once (those outside the layers twice where memory is short): cut and written, and run with the removed channels masked on a block of calibration
    tokens, which the gate compares with the written model. `dense` holds measurements of the source; `measure`, when
    given, makes the same of the written checkpoint; `command` is recorded as the way to make it again, `repo` as where it
    will be published; `card_template` replaces the shipped card. With `journal`, no layer that is done is done again. The folder appears under its name only when the gate is
    passed; whatever happens, a folder already there is as it was. Raises CheckpointError when the gate fails.
    """
    index.check_source(checkpoint)
    check_prunable(checkpoint.config, checkpoint.name)
    options = options or cpu_options(checkpoint)
    ids = index.input_ids[:1, :GATE_TOKENS].long()
    model = StreamedModel(checkpoint, options.device, options.dtype, memory=options.memory)
    skeleton, cuts = model.skeleton, tensor_cuts(model.skeleton)
    specs = planned_specs(checkpoint, plan, cuts)
    with complete_folder(destination) as folder:
        size = sum(spec.nbytes for spec in specs.values())
        costs = cut_costs(skeleton, planned(plan, index.input_ids, size), options)
        walk = CuttingWalk(model, plan, specs, cuts, costs, journal)
        expected, repairs = walk.run(folder, ids, index.input_ids.long(), track)
        _carry_files(checkpoint, plan, folder)
        if plan.per_layer_widths:
            code = modeling_code(skeleton.model, skeleton.layers_path)
            (folder / f"{MODELING}.py").write_text(code, encoding="utf-8")
        written = Checkpoint.open(folder)
        gate = pass_gate(written, expected, ids, options, plan)
        measurements: dict[str, Any] = {"gate": gate, **({"dense": dense} if dense else {})}
        if measure is not None:
            measurements["shrunk"] = measure(written)
        manifest = make_manifest(checkpoint, index, plan, specs, measurements) | {
            "command": command,
            "auto_class": auto_class(skeleton.config).__name__,
            "repo": repo,
            "repair": repairs,
        }
        (folder / MANIFEST).write_text(dump_manifest(manifest), encoding="utf-8")
        save_figures(folder, manifest)
        write_card(folder, manifest, checkpoint, card_template)
    return manifest


def _carry_files(checkpoint: Checkpoint, plan: ResizePlan, folder: Path) -> None:
    """Copy every file that holds no weights; config.json gets the new width and keeps all else."""
    for file in checkpoint.other_files:
        if file in ("README.md", MANIFEST, CONCENTRATION, CUT):
            continue
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        data = bytes(checkpoint.source.read(file, 0, checkpoint.source.size(file)))
        if file == "config.json" and plan.changes_config:
            config = resized_config(checkpoint, plan)
            data = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        target.write_bytes(data)


def resized_config(checkpoint: Checkpoint, plan: ResizePlan) -> dict[str, Any]:
    """config.json with the new widths, each under the key its family uses, where that stands; all else as it was."""
    config = copy.deepcopy(checkpoint.config)
    text = text_config(config)
    family = family_of(config, checkpoint.name)
    changes = {change.key: change.after for change in plan.widths}
    for key, value in {**changes, **dict(family.config_changes if family else ())}.items():
        (config if key in config and key not in text else text)[key] = value
    if plan.per_layer_widths:
        text["per_layer_config"] = {
            str(layer): {
                c.key: c.per_layer[layer] for c in plan.widths if c.per_layer[layer] not in (None, c.after)
            }
            for layer in range(len(plan.layers))
        }
        text["per_layer_config"] = {k: v for k, v in text["per_layer_config"].items() if v}
        text["allow_global_per_layer_attribute_access"] = True
        config["auto_map"] = {"AutoModelForCausalLM": f"{MODELING}.PerLayerForCausalLM"}
    return config


def modeling_code(model: Any, layers_path: str) -> str:
    """A modeling file that loads per-layer widths with `trust_remote_code=True`, where surgeon is not installed."""
    name = type(model).__name__
    return MODELING_TEMPLATE.format(name=name, layers=layers_path)


def make_manifest(
    checkpoint: Checkpoint,
    index: ChannelIndex,
    plan: ResizePlan,
    specs: dict[str, TensorSpec],
    measurements: dict[str, Any],
) -> dict[str, Any]:
    """The content of surgeon.json: what was cut from what, chosen how, and what was measured."""
    return {
        "schema_version": SCHEMA_VERSION,
        "source": source_json(checkpoint),
        "result": {
            "parameters": sum(spec.numel for spec in specs.values()),
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
    if "plan" not in manifest:
        return json.dumps(manifest, indent=1, allow_nan=False) + "\n"
    layers = manifest["plan"]["layers"]
    lines = [json.dumps(layer, separators=(",", ":"), allow_nan=False) for layer in layers]
    marker = "@layers@"
    outline = {**manifest, "plan": {**manifest["plan"], "layers": marker}}
    text = json.dumps(outline, indent=1, allow_nan=False)
    return text.replace(f'"{marker}"', "[\n   " + ",\n   ".join(lines) + "\n  ]") + "\n"


def write_card(
    folder: Path, manifest: dict[str, Any], checkpoint: Checkpoint, template: str | None = None
) -> None:
    """Write README.md, the model card, from the manifest and the source's own card."""
    from cards import render_card

    source_card = None
    if "README.md" in checkpoint.file_names:
        size = checkpoint.source.size("README.md")
        source_card = bytes(checkpoint.source.read("README.md", 0, size)).decode("utf-8", errors="replace")
    (folder / "README.md").write_text(render_card(manifest, source_card, template), encoding="utf-8")


def name_repo(folder: Path, repo: str) -> None:
    """Note in surgeon.json and the card of a finished folder under which Hub id it is published."""
    from cards import render_card

    path, card = folder / MANIFEST, folder / "README.md"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("repo") == repo:
        return
    manifest["repo"] = repo
    replace_text(path, dump_manifest(manifest))
    existing = card.read_text(encoding="utf-8") if card.exists() else None
    replace_text(card, render_card(manifest, existing))
