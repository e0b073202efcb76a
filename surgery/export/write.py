"""Writing a GGUF file, one tensor in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgery.checkpoint.gguf import require_gguf
from surgery.checkpoint.gguf_file import GgufFile
from surgery.checkpoint.manifest import MANIFEST
from surgery.checkpoint.reader import Checkpoint
from surgery.errors import CheckpointError
from surgery.export.architecture import GgufModel, gguf_model
from surgery.export.file_types import FileType, tensor_bytes, tensor_types
from surgery.export.quantiser import Quantiser, check_type, quantiser
from surgery.export.vocabulary import Vocabulary, vocabulary
from surgery.model.families import DENSE
from surgery.progress import Progress, no_progress

STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# (stored type, type in the file) of weights that are not rounded
EXACT = {("BF16", "BF16"), ("F16", "F16"), ("BF16", "F16")}


@dataclass(frozen=True)
class GgufPlan:
    """What will be written: the model, its vocabulary, and the type of every tensor.

    `kept` holds the super weights' tensors that have a type of their own, with that type.
    """

    checkpoint: Checkpoint
    model: GgufModel
    vocabulary: Vocabulary
    chosen: FileType
    types: dict[str, str]
    kept: dict[str, str]
    by: Quantiser

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the file."""
        tensors = {t.name: t.shape for t in self.model.tensors} | {
            name: tuple(tensor.shape) for name, tensor in self.model.extra.items()
        }
        return sum(tensor_bytes(self.types[name], shape) for name, shape in tensors.items())

    @property
    def notes(self) -> list[str]:
        """Sentences on what the file holds otherwise than the folder."""
        found = [*self.model.notes, *self.vocabulary.notes]
        for name, kind in self.kept.items():
            found.append(f"{name} is {kind}, not {self.chosen.base}: it holds a super weight")
        return found


def plan_gguf(
    checkpoint: Checkpoint, chosen: FileType, super_weights: list[dict[str, Any]] | None = None
) -> GgufPlan:
    """Plan the GGUF file of a checkpoint in the type `chosen`.

    `super_weights` (with `layer`, `column` and `ffn`) are kept in their stored type where `chosen` would
    round them. Raises UnsupportedModelError for what llama.cpp can't load or compute; no weight is read.
    """
    require_gguf(checkpoint.name)
    who = quantiser()
    check_type(chosen, who)
    model = gguf_model(checkpoint)
    words = vocabulary(checkpoint, model.keys["vocab_size"])
    types = tensor_types(model, chosen, writable=who.types)
    stored = {t.name: STORED[checkpoint.tensors[t.stored].dtype] for t in model.tensors}
    kept = {}
    for weight in super_weights or []:
        name = f"blk.{weight['layer']}.ffn_down.weight"
        if weight["column"] is None or weight.get("ffn", DENSE) != DENSE or name not in types:
            continue
        if types[name] != "F32" and (stored[name], types[name]) not in EXACT:
            kept[name] = stored[name]
    types = tensor_types(model, chosen, kept=kept, writable=who.types)
    return GgufPlan(checkpoint, model, words, chosen, types, kept, who)


def known_super_weights(checkpoint: Checkpoint) -> list[dict[str, Any]] | None:
    """Super weights from the folder's surgeon.json, None where there is none to say."""
    if MANIFEST not in checkpoint.other_files:
        return None
    found: list[dict[str, Any]] | None = checkpoint.read_json(MANIFEST).get("super_weights")
    return found


def write_gguf(plan: GgufPlan, file: Path, progress: Progress[Any] = no_progress) -> None:
    """Write the file and read its header back. Raises CheckpointError for weights that can't be written.

    `file` should be a temporary name: what a failure leaves is not a model.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(file, plan.model.architecture)
    for key, value in _keys(plan).items():
        _add(writer, key, value)
    shapes = {name: tuple(tensor.shape) for name, tensor in plan.model.extra.items()}
    shapes |= {tensor.name: tensor.shape for tensor in plan.model.tensors}
    for name, shape in shapes.items():
        kind = plan.types[name]
        size = tensor_bytes(kind, shape)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, GGMLQuantizationType[kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in plan.model.extra.items():
            writer.write_tensor_data(plan.by.encode(tensor, plan.types[name], name))
        for tensor in progress(plan.model.tensors, "tensors", len(plan.model.tensors)):
            stored = tensor.laid_out(plan.checkpoint.read(tensor.stored))
            writer.write_tensor_data(plan.by.encode(stored, plan.types[tensor.name], tensor.stored))
            del stored
    finally:
        writer.close()
    _check_written(plan, file, shapes)


def _check_written(plan: GgufPlan, file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    found = {name: (t.kind, t.shape) for name, t in GgufFile(file).tensors.items()}
    wanted = {name: (plan.types[name], shape) for name, shape in shapes.items()}
    if found != wanted:
        raise CheckpointError(
            "the GGUF file does not hold what was written", where=file.name, next_step="export it again"
        )


def _keys(plan: GgufPlan) -> dict[str, Any]:
    """All metadata: general, of the architecture, of the tokenizer, and surgeon's own."""
    from surgery import __version__

    checkpoint = plan.checkpoint
    name = checkpoint.name.rpartition("/")[2]
    keys: dict[str, Any] = {
        "general.name": name,
        "general.type": "model",
        "general.file_type": plan.chosen.number,
        "general.quantization_version": 2,
    }
    keys |= {f"{plan.model.architecture}.{key}": value for key, value in plan.model.keys.items()}
    keys |= {f"tokenizer.{key}": value for key, value in plan.vocabulary.keys.items()}
    keys["surgeon.version"] = __version__
    keys["surgeon.notes"] = plan.notes
    return keys


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        if value:
            writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
