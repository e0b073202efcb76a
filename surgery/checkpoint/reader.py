"""Checkpoint: a safetensors checkpoint whose headers are read on opening and whose tensors on request.

Headers are parsed here and not by the safetensors package, because streaming needs the byte range of every
tensor. With it, one tensor at a time is read into memory that can be freed (a memory map counts as resident
while it is open), and the same code can request a range from a server.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import torch

from surgery.checkpoint.source import ByteSource, LocalFolder
from surgery.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pkl")
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
QUANTISATIONS = {
    "fp8": "FP8 weights in blocks",
    "fbgemm_fp8": "FP8 weights (FBGEMM)",
    "mxfp4": "MXFP4 weights",
    "gptq": "GPTQ weights",
    "awq": "AWQ weights",
    "bitsandbytes": "bitsandbytes weights",
    "compressed-tensors": "compressed-tensors weights",
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Location of one stored tensor: bytes [start, stop) of `file` in the checkpoint."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


class Checkpoint:
    """The tensors and the config of one safetensors checkpoint, read-only.

    `name` identifies the source in manifests: a folder's name or a Hub id, never a full path. `revision` is
    the commit of a Hub checkpoint. Raises CheckpointError for anything missing, damaged or refused.
    """

    def __init__(self, source: ByteSource, name: str, revision: str | None = None) -> None:
        self.source = source
        self.name = name
        self.revision = revision
        self.file_names = source.files()
        self.config = self._read_config()
        self.weight_files = self._find_weight_files()
        self.tensors: dict[str, TensorEntry] = {}
        for file in self.weight_files:
            self.tensors.update(self._read_header(file))
        self._check_weight_map()
        for entry in self.tensors.values():
            if entry.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) or entry.name.endswith(".qweight"):
                self._refuse_quantised(f"{DTYPE_NAMES[entry.dtype]} weights, as {entry.name}")

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Open a local folder. Raises CheckpointError when it is not a safetensors checkpoint."""
        path = Path(folder)
        if not path.is_dir():
            raise CheckpointError(
                "no such model folder", where=str(folder), next_step="give a folder holding config.json"
            )
        return cls(LocalFolder(path), path.resolve().name)

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` on the CPU with its stored dtype and shape, in memory that the caller owns."""
        entry = self.tensors[name]
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        buffer = self.source.read(entry.file, entry.start, entry.stop)
        return torch.frombuffer(buffer, dtype=torch.uint8).view(entry.dtype).view(entry.shape)

    def read_json(self, file: str) -> Any:
        """Parse a JSON file of the checkpoint. Raises CheckpointError when it is not JSON."""
        try:
            return json.loads(bytes(self.source.read(file, 0, self.source.size(file))))
        except ValueError as error:
            raise CheckpointError(
                "a file is not valid JSON", where=file, found=str(error), next_step="fetch the file again"
            ) from error

    @property
    def other_files(self) -> list[str]:
        """Non-weight files, which are copied into a pruned checkpoint."""
        weights = {*self.weight_files, INDEX_FILE}
        return [f for f in self.file_names if f not in weights and not _is_weight_like(f)]

    def file_fingerprints(self) -> dict[str, list[int]]:
        """Weight file -> [size in bytes, modification time in ns, 0 for remote files], to detect changes."""
        found = {}
        for file in self.weight_files:
            local = self.source.path / file
            found[file] = [self.source.size(file), local.stat().st_mtime_ns if local.is_file() else 0]
        return found

    @property
    def stored_form(self) -> str | None:
        """Storage format of the weights when it is not safetensors, else None."""
        return None

    @property
    def nbytes(self) -> int:
        """Total bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of stored elements."""
        return sum(entry.numel for entry in self.tensors.values())

    @cached_property
    def config_digest(self) -> str:
        """sha256 of config.json in canonical form."""
        text = json.dumps(self.config, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def shape_digest(self) -> str:
        """sha256 over every tensor's name, dtype and shape; identifies the checkpoint in an index."""
        lines = (f"{e.name} {DTYPE_NAMES[e.dtype]} {list(e.shape)}\n" for e in self.tensors.values())
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()

    def _read_config(self) -> dict[str, Any]:
        if "config.json" not in self.file_names:
            raise CheckpointError(
                "config.json is missing",
                where=self.name,
                next_step="give a folder written by save_pretrained or downloaded from the Hub",
            )
        config = self.read_json("config.json")
        if not isinstance(config, dict):
            raise CheckpointError(
                "config.json is not an object", where=self.name, found=type(config).__name__
            )
        method = (config.get("quantization_config") or {}).get("quant_method")
        if method:
            self._refuse_quantised(QUANTISATIONS.get(str(method), str(method)))
        return config

    def _refuse_quantised(self, form: str) -> NoReturn:
        """Raise CheckpointError for quantised weights, with the card's base model if it names one."""
        base = None
        if "README.md" in self.file_names:
            card = bytes(self.source.read("README.md", 0, self.source.size("README.md")))
            found = re.search(r"^base_model:\s*(?:\n- *)?([\w./-]+)", card.decode("utf-8", "replace"), re.M)
            base = found and found[1]
        raise CheckpointError(
            "the checkpoint is quantised, and surgery needs the original weights",
            where=self.name,
            expected="float32, float16 or bfloat16 weights",
            found=form,
            next_step=f"use the unquantised checkpoint it was made from{': ' + base if base else ''}",
        )

    def _find_weight_files(self) -> list[str]:
        if INDEX_FILE in self.file_names:
            files = sorted(set(self._weight_map().values()))
            for file in files:
                path = PurePosixPath(file)
                if (
                    path.is_absolute()
                    or ".." in path.parts
                    or "\\" in file
                    or not file.endswith(".safetensors")
                ):
                    raise CheckpointError(
                        "the weight map points outside the checkpoint's own safetensors files",
                        where=INDEX_FILE,
                        found=repr(file),
                        next_step="do not use this checkpoint: fetch it again from its publisher",
                    )
                if file not in self.file_names:
                    raise CheckpointError(
                        "a weight file is missing", where=self.name, expected=file, next_step="download it"
                    )
            return files
        if SINGLE_FILE in self.file_names:
            return [SINGLE_FILE]
        pickled = [f for f in self.file_names if f.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if pickled:
            raise CheckpointError(
                "the weights are pickled, which can run code when read; surgeon reads safetensors only",
                where=self.name,
                found=pickled[0],
                next_step="load the model once with transformers and save_pretrained it to a new folder",
            )
        packed = [f for f in self.file_names if f.endswith(".gguf")]
        if packed:
            raise CheckpointError(
                "this folder holds GGUF",
                where=self.name,
                found=packed[0],
                next_step="name the .gguf file itself",
            )
        raise CheckpointError(
            "no safetensors weights", where=self.name, expected=f"{SINGLE_FILE} or {INDEX_FILE}"
        )

    def _weight_map(self) -> dict[str, str]:
        index = self.read_json(INDEX_FILE)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise CheckpointError("the index has no weight_map of names to files", where=INDEX_FILE)
        return weight_map

    def _read_header(self, file: str) -> dict[str, TensorEntry]:
        size = self.source.size(file)
        length = int.from_bytes(self.source.read(file, 0, 8), "little") if size >= 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                "not a safetensors file, or one cut off inside its header",
                where=file,
                found=f"{size} bytes",
                next_step="download it again",
            )
        try:
            header = json.loads(bytes(self.source.read(file, 8, 8 + length)))
            header.pop("__metadata__", None)
            entries = {name: _entry(name, file, fields, 8 + length) for name, fields in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                "the safetensors header is damaged", where=file, found=repr(error)
            ) from error
        end = 8 + length
        for entry in sorted(entries.values(), key=lambda e: e.start):
            if entry.start != end:
                raise CheckpointError("tensors overlap or leave holes", where=file, found=entry.name)
            end = entry.stop
        if end != size:
            raise CheckpointError(
                "a weight file has the wrong length (truncated?)",
                where=file,
                expected=f"{end} bytes",
                found=f"{size}",
                next_step="download it again",
            )
        return entries

    def _check_weight_map(self) -> None:
        if INDEX_FILE not in self.file_names:
            return
        for name, file in self._weight_map().items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise CheckpointError(
                    "a tensor is not in the file the weight map names", where=file, expected=name
                )


def _entry(name: str, file: str, fields: dict[str, Any], data_start: int) -> TensorEntry:
    dtype = DTYPES[fields["dtype"]]
    shape = tuple(int(n) for n in fields["shape"])
    start, stop = (data_start + int(offset) for offset in fields["data_offsets"])
    if min(shape, default=0) < 0 or stop - start != torch.Size(shape).numel() * dtype.itemsize:
        raise ValueError(f"{name}: {stop - start} bytes do not hold {fields['dtype']} {list(shape)}")
    return TensorEntry(name, file, dtype, shape, start, stop)


def _is_weight_like(file: str) -> bool:
    return file.endswith((*WEIGHT_ENDINGS, ".index.json"))
