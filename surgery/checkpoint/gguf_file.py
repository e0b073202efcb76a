"""GgufFile: the header of a GGUF file, its metadata and where its tensors lie; and reading one as weights.

The header is parsed here, because the gguf package maps the file into memory and takes many seconds for a
large vocabulary. Tensors are read in pieces, on as many threads as torch computes with: beside the result,
only a few megabytes of blocks and weights are in memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from surgery.checkpoint.gguf_blocks import block_type, dequantize
from surgery.errors import CheckpointError, one_line

VERSIONS = (2, 3)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4
READ_WEIGHTS = 1 << 20  # weights read and dequantised by a thread at once


@dataclass(frozen=True)
class GgufTensor:
    """A stored tensor: `shape` in torch's order, `kind` its type's name, bytes [start, stop) of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


class GgufFile:
    """`metadata` (key -> number, string or list) and `tensors` (name -> GgufTensor) of a GGUF file.

    Raises CheckpointError for a file that is not GGUF, is cut off or damaged, or has a type of weights that
    surgeon can't dequantise.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        with path.open("rb") as file:
            try:
                header = _Header(file, self.size)
                self.metadata, entries = header.metadata, header.tensors
            except (struct.error, EOFError, ValueError, KeyError, OverflowError, RecursionError) as error:
                raise self._damaged(one_line(error)) from error
            alignment = self.metadata.get("general.alignment", 32)
            if not isinstance(alignment, int) or alignment < 1:
                raise self._damaged(f"general.alignment {alignment}")
            start = -(-file.tell() // alignment) * alignment
        self.tensors = {name: self._tensor(name, *entry, start) for name, entry in entries.items()}
        end = start
        for tensor in sorted(self.tensors.values(), key=lambda t: t.start):
            if tensor.start < end:
                raise self._damaged(f"{tensor.name} overlaps another tensor")
            end = tensor.stop
        if end > self.size:
            raise CheckpointError(
                "the GGUF file is cut off",
                where=path.name,
                expected=f"at least {end} bytes",
                found=f"{self.size}",
                next_step="download it again",
            )

    @property
    def architecture(self) -> str:
        """The architecture's name in llama.cpp, as llama or qwen2moe."""
        return str(self.metadata.get("general.architecture", ""))

    def read(
        self, tensor: GgufTensor, dtype: torch.dtype, rows: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """`tensor`, or its rows [first, last) of the first dimension, dequantised to `dtype`."""
        block = block_type(tensor.kind)
        first, last = rows or (0, tensor.shape[0] if tensor.shape else 1)
        shape = (last - first, *tensor.shape[1:]) if tensor.shape else ()
        row = prod(tensor.shape[1:])
        position = tensor.start + first * row // block.weights * block.nbytes
        out = torch.empty(shape, dtype=dtype)
        flat = out.view(-1)
        step = READ_WEIGHTS // block.weights * block.weights

        def fill(start: int) -> None:
            part = flat[start : start + step]
            raw = bytearray(part.numel() // block.weights * block.nbytes)
            if self._read_into(raw, position + start // block.weights * block.nbytes) < len(raw):
                raise CheckpointError(
                    "the GGUF file became shorter while it was read", where=self.path.name, found=tensor.name
                )
            dequantize(torch.frombuffer(raw, dtype=torch.uint8), tensor.kind, part)

        starts = range(0, flat.numel(), step)
        workers = min(torch.get_num_threads(), len(starts))
        if workers > 1:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(fill, starts))
        else:
            for start in starts:
                fill(start)
        return out

    def _read_into(self, buffer: bytearray, position: int) -> int:
        """Fill `buffer` from byte `position` of the file; the number of bytes that there were."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(position)
            view, done = memoryview(buffer), 0
            while done < len(buffer):
                count = file.readinto(view[done:])
                if not count:
                    break
                done += count
        return done

    def _tensor(self, name: str, kind: int, shape: tuple[int, ...], offset: int, data: int) -> GgufTensor:
        from gguf import GGMLQuantizationType

        try:
            kind_name = GGMLQuantizationType(kind).name
        except ValueError:
            kind_name = f"type {kind}"
        try:
            block = block_type(kind_name)
        except CheckpointError as error:
            error.where = f"{self.path.name}: {name}"
            raise
        count = prod(shape)
        if min(shape, default=1) < 1 or (shape and shape[-1] % block.weights):
            raise self._damaged(f"{name}: shape {list(shape)} in blocks of {block.weights}")
        start = data + offset
        return GgufTensor(name, kind_name, shape, start, start + count // block.weights * block.nbytes)

    def _damaged(self, found: str) -> CheckpointError:
        return CheckpointError(
            "this GGUF file can't be read",
            where=self.path.name,
            found=found,
            next_step="download it again, or use the safetensors checkpoint it was converted from",
        )


class _Header:
    """Parses a header from the start of `file`, and leaves the file's position at its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        if self._bytes(4) != b"GGUF":
            raise ValueError("no GGUF magic bytes")
        version = self._number("I")
        if version not in VERSIONS:
            big_endian = version & 0xFFFF == 0
            raise ValueError("big-endian numbers" if big_endian else f"version {version}, not 2 or 3")
        tensors, keys = self._number("Q"), self._number("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._name()
            self.metadata[key] = self._value(self._number("I"))
        self.tensors: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = self._name()
            dimensions = self._number("I")
            if dimensions > MAX_DIMENSIONS or name in self.tensors:
                raise ValueError(f"tensor {name} twice, or with {dimensions} dimensions")
            shape = tuple(reversed(self._numbers("Q", dimensions)))
            kind, offset = self._number("I"), self._number("Q")
            self.tensors[name] = (kind, shape, offset)

    def _bytes(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise EOFError("the file ends inside its header")
        return self.file.read(count)

    def _numbers(self, code: str, count: int) -> tuple[Any, ...]:
        form = struct.Struct(f"<{count}{code}")
        return form.unpack(self._bytes(form.size))

    def _number(self, code: str) -> Any:
        return self._numbers(code, 1)[0]

    def _string(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8", "replace")

    def _name(self) -> str:
        name = self._string()
        if not name.isprintable():
            raise ValueError("a name with characters that can't be printed")
        return name

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            element, count = self._number("I"), self._number("Q")
            if element in NUMBERS:
                return list(self._numbers(NUMBERS[element], count))
            return [self._value(element) for _ in range(count)]
        return self._number(NUMBERS[kind])


def kinds(tensors: Iterable[GgufTensor]) -> list[str]:
    """The names of the types of `tensors`, sorted, each once."""
    return sorted({tensor.kind for tensor in tensors})
