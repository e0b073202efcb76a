"""`surgeon quantize`: every linear of the decoder layers rounded to nearest, super weights kept; one tensor at a time.

Two outputs. Simulated: the same tensors with rounded values, for tables and for any loader. Packed: integer codes in the
compressed-tensors format, which transformers and vLLM load; it has no place for single scalars, so that the module of a
super weight stays as it is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.calibration import TokenBlocks
from surgery.checkpoint import Checkpoint
from surgery.cutting import COPY_BYTES
from surgery.dense import run_observed
from surgery.destination import complete_folder
from surgery.devices import micro_batch
from surgery.errors import UnsupportedModelError, UsageError
from surgery.ffn import Ffn
from surgery.gate import check_loads
from surgery.index import Track, source_json, untracked
from surgery.indexing import RunOptions, versions
from surgery.packing import (
    check_packable,
    check_packed_loads,
    check_unpacks,
    packed_tensors,
    quantization_config,
)
from surgery.prune import MANIFEST
from surgery.rounding import Scheme, choose_clip, held_out
from surgery.skeleton import Skeleton
from surgery.stream import StreamedModel
from surgery.tokens import TokenStream
from surgery.writer import ShardWriter, TensorSpec

ROUTERS = ("gate", "router", "shared_expert_gate")
HANDLINGS = ("restore", "module", "none")
Places = dict[str, list[tuple[int, int]]]


@dataclass(frozen=True)
class QuantizePlan:
    """Which stored tensors are rounded, how, and where super weights lie in them.

    `tensors` are names of matrices; `whole` those of super weights' modules that stay as they are; `places` (row, column)
    of super weights by tensor name; `handling` one of HANDLINGS; with `clipping` each matrix's z is chosen by error.
    `modules` are the modules matrices belong to in memory, by name on disk; `ignored` the linears that are not rounded.
    """

    scheme: Scheme
    tensors: tuple[str, ...]
    whole: tuple[str, ...]
    places: Places
    handling: str
    clipping: bool
    modules: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def plan_quantization(
    skeleton: Skeleton,
    weights: list[dict[str, Any]],
    scheme: Scheme,
    handling: str = "restore",
    clipping: bool = False,
) -> QuantizePlan:
    """Every matrix of a linear in the decoder layers; norms, embeddings, routers and the head stay as they are.

    `weights` are super weights (`layer`, `ffn`, `row`, `column`). Raises UnsupportedModelError for a model whose linears
    are stored transposed, whose experts are one tensor, or that is a GGUF file.
    """
    check_roundable(skeleton)
    if handling not in HANDLINGS:
        raise UsageError("unknown handling of super weights", expected=", ".join(HANDLINGS), found=handling)
    names: list[str] = []
    owners: dict[str, str] = {}
    for assembly in (a for assemblies in skeleton.inside for a in assemblies):
        for stored in assembly.stored:
            *parts, last = stored.split(".")
            matrix = len(skeleton.checkpoint.tensors[stored].shape) == 2 and last == "weight"
            if matrix and not set(parts) & set(ROUTERS) and "norm" not in parts[-1]:
                names.append(stored)
        if len(assembly.stored) == 1:
            owners[assembly.stored[0]] = assembly.targets[0].removesuffix(".weight")
    places: Places = {}
    for weight in weights if handling != "none" else []:
        name = stored_name(skeleton, weight)
        if name in names and weight["column"] is not None:
            places.setdefault(name, []).append((weight["row"], weight["column"]))
    whole = tuple(sorted(places)) if handling == "module" else ()
    kept = places if handling == "restore" else {}
    chosen = tuple(n for n in names if n not in whole)
    rounded = {owners[name] for name in chosen if name in owners}
    linears = [n for n, m in skeleton.model.named_modules() if type(m).__name__ == "Linear"]
    ignored = tuple(name for name in linears if name not in rounded)
    return QuantizePlan(scheme, chosen, whole, kept, handling, clipping, owners, ignored)


def check_roundable(skeleton: Skeleton) -> None:
    """Raise UnsupportedModelError for a model whose matrices surgeon can't round one by one."""
    name, reason = skeleton.checkpoint.name, ""
    if any(type(module).__name__ == "Conv1D" for module in skeleton.model.modules()):
        reason = "linears stored transposed (Conv1D) are not quantised yet"
    for number, ffns in enumerate(skeleton.ffns):
        for ffn in ffns:
            target = f"{skeleton.layers_path}.{number}.{ffn.site.down}"
            if ffn.stacked and any(
                target in a.targets and len(a.stored) == 1 for a in skeleton.inside[number]
            ):
                reason = "experts stored as one tensor are not quantised yet"
    if type(skeleton.checkpoint).__name__ == "GgufCheckpoint":
        reason = "GGUF files are quantised already: write one out first, with `surgeon prune`"
    if reason:
        raise UnsupportedModelError(reason, where=name)


def stored_name(skeleton: Skeleton, weight: dict[str, Any]) -> str:
    """Name on disk of the down projection a super weight is in."""
    layer, unit = weight["layer"], weight.get("ffn", "dense")
    ffn = next(ffn for ffn in skeleton.ffns[layer] if unit in ffn.units)
    target = f"{skeleton.layers_path}.{layer}.{ffn.site.down}" + ("" if ffn.stacked else ".weight")
    assembly = next(a for a in skeleton.inside[layer] if target in a.targets)
    stored: str = assembly.stored[ffn.units.index(unit) if len(assembly.stored) > 1 else 0]
    return stored


@torch.no_grad()
def input_power(
    checkpoint: Checkpoint,
    blocks: TokenBlocks,
    options: RunOptions,
    track: Track[Any] = untracked,
    *,
    largest: bool = False,
) -> dict[str, torch.Tensor]:
    """Sum of squares of every linear's inputs over calibration tokens, [C] by module path.

    Tokens count as they are: the one that bears a super activation meets the same few columns with thousands, and a
    clip that moves what it gets there destroys the model, however little all other tokens mind. With `largest`, the largest |input| instead. One forward pass, one layer resident.
    """
    model = StreamedModel(checkpoint, options.device, options.dtype, memory=options.memory)
    step = micro_batch(blocks.ids.shape[1], options.device)
    stream = TokenStream(model, blocks.ids.long(), micro_batch=step, host_bytes=options.memory // 2)
    found: dict[str, torch.Tensor] = {}
    count = len(model.layers)
    for number, layer in track(model.walk(range(count)), "inputs", count):
        handles = []
        for name, module in layer.named_modules():
            if type(module).__name__ == "Linear":
                key = f"{model.skeleton.layers_path}.{number}.{name}"

                def keep(_: object, inputs: tuple[torch.Tensor, ...], key: str = key) -> None:
                    x = inputs[0].float().flatten(0, -2)
                    if largest:
                        most = x.abs().amax(0).cpu()
                        found[key] = torch.maximum(found.get(key, most), most)
                        return
                    power = x.square().sum(0).cpu()
                    found[key] = found.get(key, torch.zeros_like(power)) + power

                handles.append(module.register_forward_pre_hook(keep))
        run_observed(stream, number, layer, lambda part, output, _: stream.store.put(0, part, output))
        for handle in handles:
            handle.remove()
    return found


def rounded_tensor(
    plan: QuantizePlan, name: str, tensor: torch.Tensor, power: dict[str, torch.Tensor]
) -> tuple[Scheme, torch.Tensor]:
    """The scheme a tensor was rounded with and its values afterwards."""
    places = plan.places.get(name, [])
    scheme = plan.scheme
    if plan.clipping:
        scheme = choose_clip(tensor, scheme, places, power.get(plan.modules.get(name, "")))
    return scheme, held_out(tensor, scheme, places)[1]


def write_quantized(
    checkpoint: Checkpoint,
    plan: QuantizePlan,
    power: dict[str, torch.Tensor],
    destination: Path,
    *,
    packed: bool,
    weights: list[dict[str, Any]],
    command: str | None = None,
    track: Track[Any] = untracked,
) -> dict[str, Any]:
    """Write the quantised checkpoint, put it through the load gate, and return its manifest.

    Raises UsageError for a plan that can't be packed, CheckpointError when the gate fails; nothing stays then.
    """
    if packed:
        check_packable(plan)
    chosen = set(plan.tensors)
    specs = quantized_specs(checkpoint, plan, packed)
    clips: dict[str, float | None] = {}
    with complete_folder(destination) as folder:
        with ShardWriter(folder, specs) as writer:
            for entry in track(list(checkpoint.tensors.values()), "tensors", len(checkpoint.tensors)):
                if entry.name not in chosen:
                    for start in range(entry.start, entry.stop, COPY_BYTES):
                        stop = min(start + COPY_BYTES, entry.stop)
                        data = checkpoint.source.read(entry.file, start, stop)
                        writer.write_bytes(entry.name, data, start - entry.start)
                    continue
                tensor = checkpoint.read(entry.name)
                scheme, values = rounded_tensor(plan, entry.name, tensor, power)
                clips[entry.name] = scheme.clip
                if packed:
                    parts = packed_tensors(tensor, scheme)
                    check_unpacks(parts, scheme, values, entry.name)
                    for suffix, part in parts.items():
                        writer.write(entry.name.removesuffix("weight") + suffix, part)
                else:
                    writer.write(entry.name, values.to(tensor.dtype))
        manifest = {
            "schema_version": 1,
            "source": source_json(checkpoint),
            "result": {"bytes": sum(spec.nbytes for spec in specs.values())},
            "quantization": {
                **asdict(plan.scheme),
                "name": plan.scheme.name,
                "packed": packed,
                "matrices": len(plan.tensors),
                "super_weights": plan.handling,
                "modules_kept": list(plan.whole),
                "clip_chosen": clips if plan.clipping else None,
            },
            "super_weights": weights,
            "measurements": {},
            "repo": None,
            "versions": versions(),
            "command": command,
        }
        from cards import render_card

        _carry_files(checkpoint, plan, folder, packed)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(render_card(manifest), encoding="utf-8")
        if packed:
            check_packed_loads(folder)
        else:
            check_loads(folder)
    return manifest


@dataclass(frozen=True)
class RoundMatrices:
    """An edit for `ablation`: the resident layer's matrices rounded as `plan` says; `names` path in the layer -> on disk."""

    plan: QuantizePlan
    names: dict[str, str]
    power: dict[str, torch.Tensor]
    dtype: torch.dtype

    def apply(self, _: list[Ffn], layer: nn.Module) -> int:
        """Change the resident layer; returns how many matrices that is."""
        for path, stored in self.names.items():
            parameter = layer.get_parameter(path)
            rounded = rounded_tensor(self.plan, stored, parameter.data.to(self.dtype), self.power)
            parameter.data.copy_(rounded[1])
        return len(self.names)


def rounding_edits(
    skeleton: Skeleton, plan: QuantizePlan, power: dict[str, torch.Tensor]
) -> dict[int, list[Any]]:
    """Edits that round every layer. Raises UnsupportedModelError where matrices are joined in memory (experts)."""
    chosen, edits = set(plan.tensors), {}
    for number, assemblies in enumerate(skeleton.inside):
        prefix = f"{skeleton.layers_path}.{number}."
        mine = [a for a in assemblies if chosen.intersection(a.stored)]
        if any(len(a.stored) > 1 or len(a.targets) > 1 for a in mine):
            raise UnsupportedModelError(
                "experts joined in memory can't be compared without writing them",
                where=skeleton.checkpoint.name,
                next_step="quantise with --simulate, then `surgeon eval`",
            )
        names = {a.targets[0].removeprefix(prefix): a.stored[0] for a in mine}
        dtype = skeleton.checkpoint.tensors[mine[0].stored[0]].dtype if mine else torch.float32
        edits[number] = [RoundMatrices(plan, names, power, dtype)]
    return edits


def quantized_specs(checkpoint: Checkpoint, plan: QuantizePlan, packed: bool) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor that will be written."""
    chosen = set(plan.tensors)
    specs = {}
    for entry in checkpoint.tensors.values():
        if not packed or entry.name not in chosen:
            specs[entry.name] = TensorSpec(entry.dtype, tuple(entry.shape))
            continue
        example = packed_tensors(torch.zeros(entry.shape, dtype=entry.dtype), plan.scheme)
        for suffix, part in example.items():
            specs[entry.name.removesuffix("weight") + suffix] = TensorSpec(part.dtype, tuple(part.shape))
    return specs


def _carry_files(checkpoint: Checkpoint, plan: QuantizePlan, folder: Path, packed: bool) -> None:
    """Copy every file that holds no weights; config.json says how they are packed."""
    for file in checkpoint.other_files:
        if file in ("README.md", MANIFEST) or file.endswith(".png"):
            continue
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        data = bytes(checkpoint.source.read(file, 0, checkpoint.source.size(file)))
        if file == "config.json" and packed:
            config = {**checkpoint.config, "quantization_config": quantization_config(plan)}
            data = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        target.write_bytes(data)
