"""Checkpoint: a safetensors checkpoint whose headers are read on opening and whose tensors on request.

Headers are parsed here and not by the safetensors package, because streaming needs the byte range of every
tensor. With it, one tensor at a time is read into memory that can be freed (a memory map counts as resident
while it is open), and the same code can request a range from a server.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from surgery.checkpoint.file_roles import INDEX_FILE, SINGLE_FILE, left_behind
from surgery.checkpoint.quantised_forms import (
    FP8_DTYPES,
    fp8_scheme,
    packed_bits,
    refused_tensors,
    stated_form,
)
from surgery.checkpoint.refusals import no_config, no_folder, no_weights, parse_json, quantised_weights
from surgery.checkpoint.safetensors_header import DTYPE_NAMES, TensorEntry, read_header
from surgery.checkpoint.source import ByteSource, LocalFolder
from surgery.errors import CheckpointError

COPY_BYTES = 64 << 20
SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$")  # a folder of the Hub's cache


def config_digest(config: dict[str, Any]) -> str:
    """sha256 of a config.json in canonical form."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Checkpoint:
    """The tensors and the config of one safetensors checkpoint, read-only.

    `name` identifies the source in manifests: a folder's name or a Hub id, never a full path. `revision` is
    the commit of a Hub checkpoint. With `quantised`, the forms that surgeon dequantises are let through as
    they are stored, for `as_plain` to present. `trust_remote_code` permits to run the code of its tokenizer.
    Raises CheckpointError for anything missing, damaged or refused.
    """

    trust_remote_code = False

    def __init__(
        self, source: ByteSource, name: str, revision: str | None = None, *, quantised: bool = False
    ) -> None:
        self.source = source
        self.name = name
        self.revision = revision
        self.file_names = source.files()
        self.config = self._read_config()
        stated = stated_form(self.config)
        self.packed_bits = packed_bits(self.config)
        readable = fp8_scheme(self.config) is not None or self.packed_bits is not None
        if stated is not None and not (quantised and readable):
            raise self._quantised(stated)
        self.weight_files, self.weight_map = self._find_weights()
        self.tensors = self._read_tensors()
        found = [entry for entry in self.tensors.values() if entry.dtype in FP8_DTYPES]
        self.in_fp8 = self.packed_bits is None and (stated is not None or bool(found))
        refused = refused_tensors(self.tensors, packed=self.packed_bits is not None)
        if refused is None and found and not (quantised and self.in_fp8):
            refused = f"{DTYPE_NAMES[found[0].dtype]} weights, as {found[0].name}"
        if refused is not None:
            raise self._quantised(refused)

    @classmethod
    def open(cls, folder: str | Path, *, quantised: bool = False) -> Checkpoint:
        """Open a local folder. Raises CheckpointError when it is not a safetensors checkpoint."""
        path = Path(folder)
        if not path.is_dir():
            raise no_folder(str(folder))
        snapshot = SNAPSHOT.search(path.absolute().as_posix())
        if snapshot:
            return cls(LocalFolder(path), snapshot[1].replace("--", "/"), snapshot[2], quantised=quantised)
        return cls(LocalFolder(path), path.resolve().name, quantised=quantised)

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` on the CPU with its stored dtype and shape, in memory that the caller owns."""
        entry = self.tensors[name]
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        buffer = self.source.read(entry.file, entry.start, entry.stop)
        return torch.frombuffer(buffer, dtype=torch.uint8).view(entry.dtype).view(entry.shape)

    def pieces(self, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of a tensor as `read` returns it, COPY_BYTES at a time."""
        entry = self.tensors[name]
        for start in range(entry.start, entry.stop, COPY_BYTES):
            yield self.source.read(entry.file, start, min(start + COPY_BYTES, entry.stop))

    def read_json(self, file: str) -> Any:
        """Parse a JSON file of the checkpoint. Raises CheckpointError when it is not JSON."""
        return parse_json(file, bytes(self.source.read(file, 0, self.source.size(file))))

    @property
    def own_files(self) -> set[str]:
        """The weight files that transformers loads, and the weight map where it reads that."""
        return {*self.weight_files, *([self.weight_map] if self.weight_map else [])}

    @property
    def other_files(self) -> list[str]:
        """Files beside the weights that belong to the model; a result carries them."""
        skipped = {*self.own_files, *self.left_behind}
        return [f for f in self.file_names if f not in skipped]

    @cached_property
    def left_behind(self) -> list[str]:
        """Files that no result carries: weights that transformers does not load, and what belongs to them.

        A generation_config.json that can't be read is left behind too: nothing would load beside it.
        """
        behind = left_behind({f: self.source.size(f) for f in self.file_names}, self.own_files)
        return sorted([*behind, *(["generation_config.json"] if self._bad_generation_config() else [])])

    def _bad_generation_config(self) -> bool:
        from surgery.checkpoint.generation_config import generation_config_loads

        file = "generation_config.json"
        if file not in self.file_names:
            return False
        try:
            return not generation_config_loads(self.read_json(file))
        except CheckpointError:
            return True

    def file_fingerprints(self) -> dict[str, list[int]]:
        """Weight file -> [size in bytes, modification time in ns, 0 for remote files], to detect changes."""
        found = {}
        for file in self.weight_files:
            local = self.source.path / file
            found[file] = [self.source.size(file), local.stat().st_mtime_ns if local.is_file() else 0]
        return found

    @property
    def stored_form(self) -> str | None:
        """The form the weights are stored in when they are dequantised on reading, else None."""
        return None

    @property
    def reading_bytes(self) -> int:
        """Bytes that reading a tensor takes beside the tensor itself, at most."""
        return 0

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
        return config_digest(self.config)

    @cached_property
    def shape_digest(self) -> str:
        """sha256 over every tensor's name, dtype and shape; identifies the checkpoint in an index."""
        lines = (f"{e.name} {DTYPE_NAMES[e.dtype]} {list(e.shape)}\n" for e in self.tensors.values())
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()

    def _read_config(self) -> dict[str, Any]:
        if "config.json" not in self.file_names:
            raise no_config(self.name, self.file_names, self.read_json)
        config = self.read_json("config.json")
        if not isinstance(config, dict):
            raise CheckpointError(
                "config.json is not an object",
                where=self.name,
                found=type(config).__name__,
                next_step="fetch the file again",
            )
        return config

    def _quantised(self, form: str) -> CheckpointError:
        """The error for quantised weights, with the card's base model if it names one."""
        card = ""
        if "README.md" in self.file_names:
            content = bytes(self.source.read("README.md", 0, self.source.size("README.md")))
            card = content.decode("utf-8", "replace")
        return quantised_weights(self.name, form, card)

    def _find_weights(self) -> tuple[list[str], str | None]:
        """(Weight files, weight map that lists them or None), chosen as transformers chooses them."""
        named = self.config.pop("transformers_weights", None)  # results have the usual names
        for file in [named] if isinstance(named, str) else [SINGLE_FILE, INDEX_FILE]:
            self._check_inside(file, "config.json")
            if file not in self.file_names:
                continue
            if not file.endswith(".index.json"):
                return [file], None
            shards = sorted(set(self._shard_of(file).values()))
            for shard in shards:
                self._check_inside(shard, file)
                if shard not in self.file_names:
                    raise CheckpointError(
                        "a weight file is missing", where=self.name, expected=shard, next_step="download it"
                    )
            return shards, file
        raise no_weights(self.name, self.file_names)

    def _check_inside(self, file: str, where: str) -> None:
        path = PurePosixPath(file)
        safe = file.endswith((".safetensors", ".safetensors.index.json")) and "\\" not in file
        if path.is_absolute() or ".." in path.parts or not safe:
            raise CheckpointError(
                "the weight map points outside the checkpoint's own safetensors files",
                where=where,
                found=repr(file),
                next_step="do not use this checkpoint: fetch it again from its publisher",
            )

    def _shard_of(self, file: str) -> dict[str, str]:
        """Tensor name -> shard, of the weight map `file`."""
        index = self.read_json(file)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise CheckpointError("the index has no weight_map of names to files", where=file)
        if not weight_map:
            raise CheckpointError("the index names no weight file", where=file)
        return weight_map

    def _read_tensors(self) -> dict[str, TensorEntry]:
        """Every tensor of the weight files; like transformers, all of a shard, mapped or not."""
        tensors: dict[str, TensorEntry] = {}
        for file in self.weight_files:
            for name, entry in read_header(self.source, file).items():
                if name in tensors:
                    raise CheckpointError(
                        "a tensor is stored in two shards",
                        where=f"{tensors[name].file} and {file}",
                        found=name,
                        next_step="fetch the checkpoint again into an empty folder",
                    )
                tensors[name] = entry
        if self.weight_map is not None:
            lost = [name for name in self._shard_of(self.weight_map) if name not in tensors]
            if lost:
                raise CheckpointError(
                    "a tensor that the weight map lists is in none of its files",
                    where=self.weight_map,
                    expected=lost[0],
                    next_step="fetch the checkpoint again",
                )
        return tensors
