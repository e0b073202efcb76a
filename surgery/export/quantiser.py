"""Rounding a tensor to a GGUF type: by llama.cpp's own quantiser, or by the gguf package.

llama.cpp's is `ggml_quantize_chunk`, which the shared library of the package xllamacpp exports; it writes
every type. Without xllamacpp, the gguf package rounds to Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from surgery.errors import CheckpointError, UnsupportedModelError
from surgery.export.file_types import PLAIN, FileType, block_weights, tensor_bytes

PIECE = 1 << 22  # weights rounded at once: 16 MiB of float32
GGUF_TYPES = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}  # that the gguf package rounds to
Quantise = Callable[[np.ndarray, str], np.ndarray]  # (rows [n, c] float32, type) -> their bytes, 1-D uint8


@dataclass(frozen=True)
class Quantiser:
    """Who rounds: a name with its version, for cards, and the types it writes (None: all)."""

    name: str
    quantise: Quantise
    types: set[str] | None = None

    def encode(self, tensor: torch.Tensor, kind: str, where: str) -> np.ndarray:
        """The bytes of `tensor`, of any float dtype, in the GGUF type `kind`.

        Raises CheckpointError for values that are not finite or that do not fit into F16.
        """
        rows = tensor.reshape(-1, tensor.shape[-1])
        out = np.empty(tensor_bytes(kind, tuple(tensor.shape)), np.uint8)
        step, done = max(1, PIECE // rows.shape[1]), 0

        def encoded(start: int) -> np.ndarray:
            part = rows[start : start + step]
            _check_finite(part, where)
            return _plain(part, kind, where) if kind in PLAIN else self._rounded(part, kind)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # llama.cpp's function runs without the GIL
            for piece in pool.map(encoded, range(0, rows.shape[0], step)):
                out[done : done + piece.size] = piece
                done += piece.size
        assert done == out.size
        return out

    def _rounded(self, rows: torch.Tensor, kind: str) -> np.ndarray:
        return self.quantise(np.ascontiguousarray(rows.float().numpy()), kind)


def _check_finite(rows: torch.Tensor, where: str) -> None:
    if not bool(torch.isfinite(rows).all()):
        raise CheckpointError(
            "a weight is not a finite number", where=where, next_step="look for where it comes from"
        )


def _plain(rows: torch.Tensor, kind: str, where: str) -> np.ndarray:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    cast = rows.to(dtype).contiguous()
    if not bool(torch.isfinite(cast).all()):
        raise CheckpointError(
            f"a weight is too large for {kind}",
            where=where,
            found=f"{float(rows.abs().max()):.4g}",
            next_step="give --type bf16 or f32",
        )
    return cast.view(torch.uint8).numpy().reshape(-1)


def quantiser() -> Quantiser:
    """llama.cpp's quantiser where the package xllamacpp is installed, else that of the gguf package."""
    return _from_llama_cpp() or _from_gguf()


def check_type(chosen: FileType, who: Quantiser) -> None:
    """Raise UnsupportedModelError for a type that the installed quantiser can't write."""
    if who.types is not None and chosen.base not in {*PLAIN, *who.types}:
        raise UnsupportedModelError(
            f"the {who.name} can't round to this type",
            where=f"--type {chosen.name}",
            expected=", ".join(sorted(kind.lower() for kind in {*PLAIN, *who.types})),
            next_step="pip install xllamacpp, which carries llama.cpp's own quantiser",
        )


def _from_gguf() -> Quantiser:
    from importlib.metadata import version

    def quantise(rows: np.ndarray, kind: str) -> np.ndarray:
        from gguf import GGMLQuantizationType, quantize

        found: np.ndarray = quantize(rows, GGMLQuantizationType[kind]).reshape(-1)
        return found

    return Quantiser(f"gguf package {version('gguf')}", quantise, GGUF_TYPES)


@cache
def _from_llama_cpp() -> Quantiser | None:
    try:
        import xllamacpp

        library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
        function = library.ggml_quantize_chunk
    except (ImportError, OSError, AttributeError):
        return None
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    function.restype = ctypes.c_size_t

    def quantise(rows: np.ndarray, kind: str) -> np.ndarray:
        from gguf import GGMLQuantizationType

        assert rows.shape[1] % block_weights(kind) == 0
        out = np.empty(tensor_bytes(kind, rows.shape), np.uint8)
        number = int(GGMLQuantizationType[kind])
        written = function(number, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None)
        assert written == out.size, f"{kind}: {written} bytes in place of {out.size}"
        return out

    return Quantiser(f"llama.cpp of xllamacpp {xllamacpp.__version__}", quantise)
