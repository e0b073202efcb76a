"""Dequantising GGUF blocks with numpy: every type but the i-quants, which gguf_grids.py has.

A GGUF tensor is a row of blocks of B bytes that hold N weights each: a scale or several, and integers of 1 to
8 bits. A decoder turns n blocks into float32 weights; `dequantize` calls it on pieces that fit in a core's
cache. Integers are unpacked as bytes and become float32 only when they are multiplied.

numpy and not torch: its operations stay on the calling thread. torch spreads each over all threads and waits
for the slowest, hundreds of times a tensor, which takes several times as long where cores are shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from surgery.checkpoint.gguf_grids import GRID_DECODERS, Array, halves, spread
from surgery.errors import CheckpointError

PIECE = 1 << 18  # weights decoded at once: 1 MiB of float32
ONE_THREAD = 32_000  # torch casts fewer numbers than 32,768 on the calling thread

Decoder = Callable[[Array, Array], None]  # (blocks [n, B] uint8, weights [n, N] float32 to fill)


@dataclass(frozen=True)
class BlockType:
    """A type of GGUF: `weights` N per block of `nbytes` B; `decode` is None where a block is one number."""

    weights: int
    nbytes: int
    decode: Decoder | None = None
    number: torch.dtype | None = None


def dequantize(raw: torch.Tensor, kind: str, out: torch.Tensor) -> None:
    """Fill `out`, 1-D and of any float dtype, from the bytes `raw`, uint8 and 1-D, of whole blocks of `kind`.

    Computed in float32 and rounded once. Raises CheckpointError for a type that is not in BLOCK_TYPES.
    """
    block = block_type(kind)
    if block.number is not None:
        _cast(raw.view(block.number), out)
        return
    assert block.decode is not None
    blocks = raw.numpy().reshape(-1, block.nbytes)
    step = max(1, PIECE // block.weights)
    buffer = np.empty((min(step, len(blocks)), block.weights), np.float32)
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step]
        weights = buffer[: len(part)]
        with np.errstate(all="ignore"):  # a damaged scale may be infinite
            block.decode(part, weights)
        first = start * block.weights
        _cast(torch.from_numpy(weights.reshape(-1)), out[first : first + weights.size])


def _cast(numbers: torch.Tensor, out: torch.Tensor) -> None:
    for start in range(0, numbers.numel(), ONE_THREAD):
        out[start : start + ONE_THREAD] = numbers[start : start + ONE_THREAD]


def block_type(kind: str) -> BlockType:
    """The BlockType of a type's name, as Q4_K. Raises CheckpointError for one that can't be dequantised."""
    try:
        return BLOCK_TYPES[kind]
    except KeyError as error:
        raise CheckpointError(
            "surgeon can't dequantise this GGUF type",
            expected=", ".join(BLOCK_TYPES),
            found=kind,
            next_step="use the safetensors checkpoint it was converted from",
        ) from error


def _minus(numbers: Array, value: int) -> Array:
    """numbers - value as int8; `numbers`, uint8, is overwritten."""
    numbers -= np.uint8(value)
    return numbers.view(np.int8)


def _multiply(out: Array, scale: Array) -> None:
    """out [n, N] *= scale [n, k], each for N / k weights."""
    groups = out.reshape(*scale.shape, -1)
    groups *= scale[..., None]


def _q4_0(blocks: Array, out: Array) -> None:
    packed = blocks[:, 2:].copy()
    out[:, :16] = _minus(packed & 15, 8)
    out[:, 16:] = _minus(packed >> 4, 8)
    out *= halves(blocks, 0)


def _q4_1(blocks: Array, out: Array) -> None:
    packed = blocks[:, 4:].copy()
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4
    scale = halves(blocks, 0, 2)
    out *= scale[:, :1]
    out += scale[:, 1:]


def _five_bits(high: Array, packed: Array) -> Array:
    """[n, 32] uint8 from the fifth bits [n, 4] bytes and the low ones [n, 16]."""
    bits = spread(16)[high].view(np.uint8).reshape(-1, 2, 16)
    packed = packed.copy()
    bits[:, 0] |= packed & 15
    bits[:, 1] |= packed >> 4
    return bits.reshape(-1, 32)


def _q5_0(blocks: Array, out: Array) -> None:
    out[:] = _minus(_five_bits(blocks[:, 2:6], blocks[:, 6:]), 16)
    out *= halves(blocks, 0)


def _q5_1(blocks: Array, out: Array) -> None:
    out[:] = _five_bits(blocks[:, 4:8], blocks[:, 8:])
    scale = halves(blocks, 0, 2)
    out *= scale[:, :1]
    out += scale[:, 1:]


def _q8_0(blocks: Array, out: Array) -> None:
    out[:] = blocks[:, 2:].view(np.int8)
    out *= halves(blocks, 0)


def _q2_k(blocks: Array, out: Array) -> None:
    packed, parts = blocks[:, 16:80].copy().reshape(-1, 2, 32), out.reshape(-1, 2, 4, 32)
    for j in range(4):
        parts[:, :, j] = (packed >> 2 * j) & 3
    scale = halves(blocks, 80, 2)
    _multiply(out, scale[:, :1] * (blocks[:, :16] & 15))
    groups = out.reshape(-1, 16, 16)
    groups -= (scale[:, 1:] * (blocks[:, :16] >> 4))[..., None]


def _q3_k(blocks: Array, out: Array) -> None:
    mask, packed, parts = blocks[:, :32].copy(), blocks[:, 32:96], out.reshape(-1, 8, 32)
    for half in range(2):
        pairs = packed[:, 32 * half : 32 * half + 32].copy()
        for j in range(4):
            bit = 4 * half + j
            number = (mask >> (bit - 2) if bit > 2 else mask << (2 - bit)) & 4
            number |= (pairs >> 2 * j) & 3
            parts[:, bit] = _minus(number, 4)
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    scale = np.concatenate([low & 15, low >> 4], 1)
    for j in range(4):
        scale[:, 4 * j : 4 * j + 4] |= ((high >> 2 * j) & 3) << 4
    _multiply(out, halves(blocks, 108) * _minus(scale, 32))


def _scale_and_minimum(blocks: Array) -> tuple[Array, Array]:
    """The eight scales and minima of Q4_K and Q5_K, [n, 8] each: six bits times a float16."""
    factors, packed = halves(blocks, 0, 2), blocks[:, 4:16]
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.concatenate([first & 63, (rest & 15) | ((first >> 6) << 4)], 1)
    minimum = np.concatenate([second & 63, (rest >> 4) | ((second >> 6) << 4)], 1)
    return factors[:, :1] * scale, factors[:, 1:] * minimum


def _q4_k(blocks: Array, out: Array) -> None:
    packed, parts = blocks[:, 16:].copy().reshape(-1, 4, 32), out.reshape(-1, 4, 2, 32)
    parts[:, :, 0] = packed & 15
    parts[:, :, 1] = packed >> 4
    scale, minimum = _scale_and_minimum(blocks)
    _multiply(out, scale)
    groups = out.reshape(-1, 8, 32)
    groups -= minimum[..., None]


def _q5_k(blocks: Array, out: Array) -> None:
    high, parts = blocks[:, 16:48].copy(), out.reshape(-1, 8, 32)
    for j in range(8):
        packed = blocks[:, 48 + 32 * (j // 2) : 80 + 32 * (j // 2)]
        number = (high >> (j - 4) if j > 4 else high << (4 - j)) & 16
        number |= packed >> 4 if j % 2 else packed & 15
        parts[:, j] = number
    scale, minimum = _scale_and_minimum(blocks)
    _multiply(out, scale)
    parts -= minimum[..., None]


def _q6_k(blocks: Array, out: Array) -> None:
    packed, parts = blocks[:, :128].reshape(-1, 2, 2, 32), out.reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].copy().reshape(-1, 2, 32)
    for k in range(2):
        nibbles = packed[:, :, k].copy()
        for j in (k, k + 2):
            number = (high >> 2 if j == 3 else high << (4 - 2 * j)) & 48
            number |= nibbles >> 4 if j > 1 else nibbles & 15
            parts[:, :, j] = _minus(number, 32)
    _multiply(out, halves(blocks, 208) * blocks[:, 192:208].view(np.int8))


def _tq1_0(blocks: Array, out: Array) -> None:
    # a byte is a fixed-point fraction of five trits (the last ones of four): times 3^k, it begins with trit k
    start = 0
    for first, width, trits in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        value = blocks[:, first : first + width].copy()
        for _ in range(trits):
            trit = (value > 85).view(np.uint8) + (value > 170).view(np.uint8)
            out[:, start : start + width] = _minus(trit, 1)
            value *= np.uint8(3)  # modulo 256
            start += width
    out *= halves(blocks, 52)


def _tq2_0(blocks: Array, out: Array) -> None:
    packed, parts = blocks[:, :64].copy().reshape(-1, 2, 32), out.reshape(-1, 2, 4, 32)
    for j in range(4):
        parts[:, :, j] = _minus((packed >> 2 * j) & 3, 1)
    out *= halves(blocks, 64)


BLOCK_TYPES: dict[str, BlockType] = {
    "F64": BlockType(1, 8, number=torch.float64),
    "F32": BlockType(1, 4, number=torch.float32),
    "F16": BlockType(1, 2, number=torch.float16),
    "BF16": BlockType(1, 2, number=torch.bfloat16),
    "Q4_0": BlockType(32, 18, _q4_0),
    "Q4_1": BlockType(32, 20, _q4_1),
    "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_1": BlockType(32, 24, _q5_1),
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q2_K": BlockType(256, 84, _q2_k),
    "Q3_K": BlockType(256, 110, _q3_k),
    "Q4_K": BlockType(256, 144, _q4_k),
    "Q5_K": BlockType(256, 176, _q5_k),
    "Q6_K": BlockType(256, 210, _q6_k),
    "TQ1_0": BlockType(256, 54, _tq1_0),
    "TQ2_0": BlockType(256, 66, _tq2_0),
    **{kind: BlockType(*entry) for kind, entry in GRID_DECODERS.items()},
}
