"""Rounds every linear of the decoder layers and keeps super weights (`surgeon quantize`).

One tensor is in memory at a time. There are two output formats. Simulated: the same tensors with rounded
values, for measurements and for any loader. Packed: integer codes in the compressed-tensors format, which
transformers and vLLM load. It can't store single scalars, so the module of a super weight is not rounded.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.budget.pass_cost import PassCost, PassJob, StreamShape, pass_cost
from surgery.card.publish import write_card
from surgery.checkpoint.manifest import MANIFEST, reproduce_json, source_json, versions
from surgery.checkpoint.other_files import copy_other_files
from surgery.checkpoint.output_folder import complete_folder
from surgery.checkpoint.safetensors_header import TensorEntry
from surgery.checkpoint.shard_writer import ShardWriter, TensorSpec
from surgery.checkpoint.transformers_model import auto_class, check_loads
from surgery.engine.hooks import module_inputs
from surgery.engine.malloc import Malloc
from surgery.engine.open_model import Model
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.errors import UnsupportedModelError
from surgery.model.ffn import Ffn
from surgery.model.leftovers import leftovers_json
from surgery.model.meta_model import MetaModel
from surgery.progress import Progress, no_progress
from surgery.quantize.autoround import TunedMatrices
from surgery.quantize.compressed_tensors import (
    check_packable,
    check_packed_loads,
    check_unpacks,
    packed_tensors,
    quantization_config,
)
from surgery.quantize.plan import QuantizePlan
from surgery.quantize.rounding import Scheme, choose_clip, round_excluding
from surgery.text import TokenBlocks


@torch.no_grad()
def input_power(
    opened: Model,
    blocks: TokenBlocks,
    progress: Progress[Any] = no_progress,
    *,
    largest: bool = False,
) -> dict[str, torch.Tensor]:
    """Sum of squares of every linear's inputs over calibration tokens, [C] by module path.

    With `largest`, max |input| instead. All tokens have equal weight: the token with a super activation has
    values in the thousands in a few columns, and a clip that changes its output destroys the model even if
    all other tokens are hardly affected. One forward pass, one layer resident. Raises MemoryBudgetError.
    """
    cost = input_power_cost(opened, *blocks.ids.shape)
    model = StreamedModel(opened)
    step = cost.blocks_together(blocks.ids.shape[1])
    stream = TokenStream(model, blocks.ids.long(), micro_batch=step, place=cost.hidden_on)
    found: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        x = x.float().flatten(0, -2)
        new = (x.abs().amax(0) if largest else x.square().sum(0)).cpu()
        total = found.get(name, torch.zeros_like(new))
        found[name] = torch.maximum(total, new) if largest else total + new

    count = len(model.layers)
    for number, layer in progress(model.stream_layers(range(count)), "inputs", count):
        linears = {
            f"{model.meta_model.layers_path}.{number}.{name}": module
            for name, module in layer.named_modules()
            if type(module).__name__ == "Linear"
        }
        with module_inputs(linears, add):
            stream.forward(number, layer)
    return found


def input_power_cost(opened: Model, blocks: int, block_size: int) -> PassCost:
    """Cost of `input_power`. Raises MemoryBudgetError."""
    job = PassJob((StreamShape(blocks, block_size),))
    return pass_cost(opened.meta_model, job, opened.run)


def rounded_tensor(
    plan: QuantizePlan, name: str, tensor: torch.Tensor, power: dict[str, torch.Tensor]
) -> tuple[Scheme, torch.Tensor]:
    """(scheme with the chosen clip, rounded values) of a stored tensor; `power` is that of `input_power`."""
    places = plan.places.get(name, [])
    scheme = plan.scheme
    if plan.clipping:
        scheme = choose_clip(tensor, scheme, places, power.get(plan.modules.get(name, "")))
    return scheme, round_excluding(tensor, scheme, places)[1]


def write_quantized(
    opened: Model,
    plan: QuantizePlan,
    power: dict[str, torch.Tensor],
    destination: Path,
    *,
    packed: bool,
    weights: list[dict[str, Any]],
    tuned: TunedMatrices | None = None,
    index: dict[str, Any] | None = None,
    command: str | None = None,
    progress: Progress[Any] = no_progress,
) -> dict[str, Any]:
    """Write the quantised checkpoint, verify that it loads, and return its manifest.

    `power` is the result of `input_power`; `tuned` are the matrices of a scheme that is not rounded to
    nearest; `weights` are super weights for the manifest, `index` its entry about the published index they
    are from. Raises UsageError for a plan that can't be packed, and CheckpointError when the result does not
    load; `destination` is then left as it was.
    """
    if packed:
        check_packable(plan)
    checkpoint, chosen = opened.checkpoint, set(plan.tensors)
    malloc = Malloc(opened.run.memory)  # the budget leaves an eighth for freed pages, as for layers
    stored = kept_tensors(opened.meta_model)
    specs = quantized_specs(stored, plan, packed)
    clips: dict[str, float | None] = {}
    with complete_folder(destination) as folder:
        with ShardWriter(folder, specs) as writer:
            for entry in progress(stored, "tensors", len(stored)):
                if entry.name not in chosen:
                    writer.copy(entry.name, checkpoint, entry)
                    continue
                tensor = checkpoint.read(entry.name)
                if tuned is None:
                    clips[entry.name] = _write_rounded(writer, plan, entry.name, tensor, power, packed=packed)
                else:
                    _write_parts(writer, entry.name, tuned.parts(entry.name, tensor, plan.scheme))
                del tensor
                malloc.trim()
        manifest = {
            "schema_version": 1,
            "source": source_json(checkpoint),
            "auto_class": auto_class(opened.meta_model.config).__name__,
            "result": {"bytes": sum(spec.nbytes for spec in specs.values())},
            "quantization": {
                **asdict(plan.scheme),
                "name": plan.scheme.name,
                "packed": packed,
                "matrices": len(plan.tensors),
                "super_weights": plan.handling,
                "modules_kept": list(plan.whole),
                "clip_chosen": clips if plan.clipping else None,
                **({} if tuned is None else {"tuning": tuned.tuning}),
            },
            "super_weights": weights,
            **(index or {}),
            "measurements": {},
            "repo": None,
            "versions": versions(),
            "command": command,
            "outside_model": leftovers_json(opened.meta_model.leftovers),
            "left_behind": checkpoint.left_behind,
        }
        manifest["reproduce"] = reproduce_json(manifest)
        config = checkpoint.config
        if packed:
            config = {**config, "quantization_config": quantization_config(plan)}
        pictures = tuple(file for file in checkpoint.other_files if file.endswith(".png"))
        copy_other_files(checkpoint, folder, config, ("README.md", MANIFEST, *pictures))
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        write_card(folder, manifest, checkpoint)
        if packed:
            check_packed_loads(folder, opened.meta_model.may_be_unexpected)
        else:
            check_loads(folder, opened.meta_model.may_be_unexpected)
    return manifest


def _write_rounded(
    writer: ShardWriter,
    plan: QuantizePlan,
    name: str,
    tensor: torch.Tensor,
    power: dict[str, torch.Tensor],
    *,
    packed: bool,
) -> float | None:
    """Round one stored matrix and write it; returns the clip that was chosen."""
    scheme, values = rounded_tensor(plan, name, tensor, power)
    if not packed:
        writer.write(name, values.to(tensor.dtype))
        return scheme.clip
    parts = packed_tensors(tensor, scheme)
    check_unpacks(parts, scheme, values, name)
    _write_parts(writer, name, parts)
    return scheme.clip


def _write_parts(writer: ShardWriter, name: str, parts: dict[str, torch.Tensor]) -> None:
    for suffix, part in parts.items():
        writer.write(name.removesuffix("weight") + suffix, part)


@dataclass(frozen=True)
class RoundMatrices:
    """An edit for `ablation`: rounds the resident layer's matrices with `plan`.

    `names` maps parameter paths in the layer to stored names, `dtype` is that of the checkpoint.
    """

    plan: QuantizePlan
    names: dict[str, str]
    power: dict[str, torch.Tensor]
    dtype: torch.dtype

    def apply(self, _: list[Ffn], layer: nn.Module) -> int:
        """Change the resident layer; returns the number of matrices changed."""
        for path, stored in self.names.items():
            parameter = layer.get_parameter(path)
            rounded = rounded_tensor(self.plan, stored, parameter.data.to(self.dtype), self.power)
            parameter.data.copy_(rounded[1])
        return len(self.names)


def rounding_edits(
    meta_model: MetaModel, plan: QuantizePlan, power: dict[str, torch.Tensor]
) -> dict[int, list[Any]]:
    """Edits that round every layer, by layer.

    Raises UnsupportedModelError where stored matrices are one parameter in memory (experts), or the reverse.
    """
    chosen = set(plan.tensors)
    edits: dict[int, list[Any]] = {}
    for number, stored_parameters in enumerate(meta_model.layer_parameters):
        prefix = f"{meta_model.layers_path}.{number}."
        matrices = [a for a in stored_parameters if chosen.intersection(a.stored)]
        if any(len(a.stored) > 1 or len(a.targets) > 1 for a in matrices):
            raise UnsupportedModelError(
                "experts joined in memory can't be compared without writing them",
                where=meta_model.checkpoint.name,
                next_step="quantise, then `surgeon eval` of the folder",
            )
        names = {a.targets[0].removeprefix(prefix): a.stored[0] for a in matrices}
        dtype = meta_model.checkpoint.tensors[matrices[0].stored[0]].dtype if matrices else torch.float32
        edits[number] = [RoundMatrices(plan, names, power, dtype)]
    return edits


def kept_tensors(meta_model: MetaModel) -> list[TensorEntry]:
    """The stored tensors that a quantised checkpoint has too: all but those that are dropped."""
    dropped = meta_model.dropped
    return [entry for entry in meta_model.checkpoint.tensors.values() if entry.name not in dropped]


def quantized_specs(stored: list[TensorEntry], plan: QuantizePlan, packed: bool) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor that will be written, for the `stored` ones that are kept."""
    chosen = set(plan.tensors)
    specs = {}
    examples: dict[tuple[Any, ...], dict[str, TensorSpec]] = {}  # one matrix of each shape is packed
    for entry in stored:
        if not packed or entry.name not in chosen:
            specs[entry.name] = TensorSpec(entry.dtype, tuple(entry.shape))
            continue
        kind = (entry.dtype, *entry.shape)
        if kind not in examples:
            parts = packed_tensors(torch.zeros(entry.shape, dtype=entry.dtype), plan.scheme)
            examples[kind] = {name: TensorSpec(part.dtype, tuple(part.shape)) for name, part in parts.items()}
        for suffix, spec in examples[kind].items():
            specs[entry.name.removesuffix("weight") + suffix] = spec
    return specs
