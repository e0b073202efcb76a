"""GgufCheckpoint: a GGUF file as a checkpoint, whose tensors are dequantised one at a time on request.

The file's whole meaning goes into the config, or the file is refused by the name of what can't: every key of
its architecture is read (gguf_metadata.py) and every tensor has a place in the model or in the config.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.checkpoint.gguf_config import ROPE_TENSORS, read_config
from surgery.checkpoint.gguf_families import GgufFamily
from surgery.checkpoint.gguf_file import GgufFile, GgufTensor, kinds
from surgery.checkpoint.gguf_layouts import Change
from surgery.checkpoint.gguf_tokenizer import save_tokenizer
from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.safetensors_header import TensorEntry
from surgery.checkpoint.source import LocalFolder
from surgery.checkpoint.transformers_model import auto_class, build_config, build_model
from surgery.errors import CheckpointError


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of the model is: a GGUF tensor or one expert's slab; and what changes its layout."""

    tensor: GgufTensor
    expert: int | None = None
    change: Change | None = None
    less_one: bool = False


class GgufCheckpoint(Checkpoint):
    """A GGUF file as a checkpoint: tensors have transformers' names and shapes, dequantised to `dtype`.

    Experts, which GGUF stacks, are tensors of their own under the names that `save_pretrained` writes.
    config.json and the tokenizer are made from the file's metadata, in a temporary folder. Raises
    CheckpointError for a file that is not GGUF or damaged, and for one whose meaning transformers can't hold.
    """

    def __init__(self, file: Path, dtype: torch.dtype) -> None:
        require_gguf(file.name)
        self.dtype = dtype
        self.gguf = GgufFile(file)
        family, self._fields = read_config(self.gguf)
        config = build_config(self._fields, file.name)
        self._stored = _name_tensors(self.gguf, family, self._fields)
        self.tensors = {
            name: TensorEntry(name, file.name, dtype, shape, 0, torch.Size(shape).numel() * dtype.itemsize)
            for name, shape in ((name, self._shape(stored)) for name, stored in self._stored.items())
        }
        _check_places(config, dtype, self.tensors, {n: s.tensor.name for n, s in self._stored.items()}, file)
        folder = Path(tempfile.mkdtemp(prefix="surgeon-gguf-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        class_name = auto_class(config)._model_mapping[type(config)].__name__
        written = config.to_dict() | {
            "architectures": [class_name],
            "dtype": str(dtype).removeprefix("torch."),
        }
        (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        save_tokenizer(self.gguf, config.model_type, folder)
        self.source = LocalFolder(folder)
        self.name, self.revision = file.stem, None
        self.file_names = self.source.files()
        self.config = self._read_config()
        self.weight_files, self.weight_map = [file.name], None

    def file_fingerprints(self) -> dict[str, list[int]]:
        """File name -> [size in bytes, modification time in ns]."""
        status = self.gguf.path.stat()
        return {self.gguf.path.name: [status.st_size, status.st_mtime_ns]}

    @property
    def stored_form(self) -> str:
        """The file's quantisation types and the dtype they are dequantised to, for the model card."""
        names = ", ".join(kinds(stored.tensor for stored in self._stored.values()))
        return f"GGUF ({names}), dequantised to {str(self.dtype).removeprefix('torch.')}"

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` in `dtype`, dequantised, in transformers' layout."""
        stored = self._stored[name]
        rows = None if stored.expert is None else (stored.expert, stored.expert + 1)
        wanted = torch.float32 if stored.less_one else self.dtype
        tensor = self.gguf.read(stored.tensor, wanted, rows)
        if stored.expert is not None:
            tensor = tensor[0]
        if stored.less_one:
            tensor = (tensor - 1).to(self.dtype)
        return stored.change(tensor, self._fields) if stored.change else tensor

    def pieces(self, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of a tensor as `read` returns it."""
        yield self.read(name).view(-1).view(torch.uint8).numpy().data

    def _shape(self, stored: StoredTensor) -> tuple[int, ...]:
        shape = stored.tensor.shape if stored.expert is None else stored.tensor.shape[1:]
        if stored.change is None:
            return shape
        try:
            return tuple(stored.change(torch.empty(shape, device="meta"), self._fields).shape)
        except RuntimeError as error:
            raise CheckpointError(
                "a stored tensor does not have the shape the config asks for",
                where=f"{self.gguf.path.name}: {stored.tensor.name}",
                found=str(list(shape)),
            ) from error


def require_gguf(where: str) -> None:
    """Raise CheckpointError where the gguf package is not installed, which reads and writes `where`."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            "GGUF needs the gguf package",
            where=where,
            next_step="pip install 'ffn-surgeon[gguf]'",
        ) from error


def _name_tensors(file: GgufFile, family: GgufFamily, fields: dict[str, Any]) -> dict[str, StoredTensor]:
    """Name in transformers -> the stored tensor. Raises CheckpointError for one that has no such name."""
    stored: dict[str, StoredTensor] = {}
    for tensor in file.tensors.values():
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)\.(weight|bias)", tensor.name)
        layer, part, ending = found.groups() if found else (None, tensor.name, "")
        if ending == "weight" and layer is None and part in ROPE_TENSORS and family.rope_types:
            continue  # in the config
        key = part if layer is None else f"blk.{{}}.{part}"
        template = family.names.get(key) if ending else None
        if template is None:
            raise _no_place(file.path, tensor.name)
        name = f"{template.replace('{}', layer or '')}.{ending}"
        less_one = family.norms_less_one and name.endswith("norm.weight")
        if "{e}" not in name:
            stored[name] = StoredTensor(tensor, None, family.changes.get(key), less_one)
            continue
        experts = fields.get("num_experts") or fields.get("num_local_experts")
        if len(tensor.shape) != 3 or tensor.shape[0] != experts:
            raise CheckpointError(
                "a stored tensor of experts does not have the shape the config asks for",
                where=f"{file.path.name}: {tensor.name}",
                expected=f"{experts} matrices",
                found=str(list(tensor.shape)),
            )
        for e in range(tensor.shape[0]):
            stored[name.replace("{e}", str(e))] = StoredTensor(tensor, e, family.changes.get(key))
    return stored


def _check_places(
    config: Any, dtype: torch.dtype, tensors: dict[str, TensorEntry], origins: dict[str, str], file: Path
) -> None:
    """Raise CheckpointError for a tensor that no parameter is made from, or of which the shape is wrong."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model = build_model(config, dtype, file.name)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parameters = model.state_dict()
    for name, entry in tensors.items():
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if target not in parameters and name in parameters:
            target, pattern = name, None
        if target not in parameters:
            raise _no_place(file, origins[name])
        wanted = tuple(parameters[target].shape)
        if pattern is not None:  # one expert: gate and up are halves of a matrix in memory
            wanted = wanted[1:]
            if target.endswith("gate_up_proj"):
                wanted = (wanted[0] // 2, *wanted[1:])
        if entry.shape != wanted:
            raise CheckpointError(
                "a stored tensor does not have the shape the config asks for",
                where=f"{file.name}: {origins[name]}",
                expected=str(list(wanted)),
                found=str(list(entry.shape)),
            )


def _no_place(file: Path, name: str) -> CheckpointError:
    return CheckpointError(
        "a tensor of the GGUF file has no place in the model that transformers builds",
        where=file.name,
        found=name,
        next_step="use the safetensors checkpoint it was converted from",
    )
