"""Dequantising the GGUF types whose integers are numbers of table rows: i-quants, MXFP4 and NVFP4.

A row of a table is 4 or 8 weights as signed bytes, held as one int32 or int64. A piece of weights is then one
gather, an exchange of signs on bytes, and one multiplication in float32. The tables are the gguf package's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def halves(blocks: Array, start: int, count: int = 1) -> Array:
    """`count` float16 numbers from byte `start` of each block, [n, count] float32."""
    return blocks[:, start : start + 2 * count].copy().view(np.float16).astype(np.float32)


@cache
def spread(value: int) -> Array:
    """Table [256] int64: the eight bits of a byte as eight bytes of 0 or `value`, lowest bit first."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    return (bits * value).astype(np.uint8).view(np.int64).reshape(-1)


def _quants(kind: str) -> Any:
    from gguf import quants

    return getattr(quants, kind)


@cache
def _grid(kind: str) -> Array:
    """Rows of the grid of `kind` as integers: int64 for rows of 8 weights, int32 for rows of 4."""
    holder = _quants(kind)
    holder.init_grid()
    width = holder.grid_shape[1]
    rows = holder.grid.reshape(-1, width).astype(np.int8)
    return np.ascontiguousarray(rows).view(np.int64 if width == 8 else np.int32).reshape(-1)


@cache
def _short_signs() -> Array:
    """`spread(255)` of seven bits, [128]: the eighth makes the number of minus signs even."""
    return spread(255)[np.frombuffer(_quants("IQ2_XXS").ksigns, np.uint8)]


@cache
def _levels(kind: str) -> Array:
    """Table [65536] int32: two packed bytes as four levels: of the low nibbles, then of the high ones."""
    pair = np.arange(65536)
    nibbles = np.stack([pair & 15, (pair >> 8) & 15, (pair >> 4) & 15, pair >> 12], 1)
    return np.array(_quants(kind).kvalues, np.int8)[nibbles].view(np.int32).reshape(-1)


def _wide(blocks: Array, start: int, stop: int, dtype: type[np.integer[Any]]) -> Array:
    """Bytes [start, stop) of each block as unsigned numbers of `dtype`."""
    return blocks[:, start:stop].copy().view(dtype)


def _fields(packed: Array, shifts: tuple[int, ...], mask: int) -> Array:
    """[n, k] integers -> [n, k * len(shifts)]: the fields of each at `shifts`."""
    fields = np.empty((*packed.shape, len(shifts)), packed.dtype)
    for i, shift in enumerate(shifts):
        fields[..., i] = (packed >> shift) & mask
    return fields.reshape(len(packed), -1)


def _rows(blocks: Array, start: int, stop: int, high: Array) -> Array:
    """Bytes [start, stop) of each block with their high bits from `high`, of the same shape."""
    rows: Array = blocks[:, start:stop] | (high.astype(np.uint16) << 8)
    return rows


def _signed(grid: Array, rows: Array, signs: Array) -> Array:
    """The grid's weights [n, N] int8 at `rows`, negated where `signs` (int64, 8 weights each) has 255."""
    weights = np.take(grid, rows).view(np.int8)
    minus = signs.view(np.int8).reshape(weights.shape)
    weights ^= minus
    weights -= minus  # (x ^ -1) + 1 = -x
    return weights


def _scaled(out: Array, weights: Array, scale: Array) -> None:
    """out [n, N] = weights * scale, where scale [n, k] is per N / k weights."""
    out[:] = weights.reshape(out.shape)
    groups = out.reshape(*scale.shape, -1)
    groups *= scale[..., None]


def _iq2_xxs(blocks: Array, out: Array) -> None:
    words = _wide(blocks, 2, 66, np.uint32)[:, 1::2]
    rows = blocks[:, 2:66].reshape(-1, 8, 8)[..., :4].reshape(-1, 32)
    signs = np.take(_short_signs(), _fields(words, (0, 7, 14, 21), 127))
    scale = halves(blocks, 0) * ((words >> 28).astype(np.float32) + np.float32(0.5)) * np.float32(0.25)
    _scaled(out, _signed(_grid("IQ2_XXS"), rows, signs), scale)


def _half_scales(blocks: Array, start: int) -> Array:
    """The scales of IQ2_XS and IQ2_S: (nibble + 1/2) / 4 times the block's factor."""
    nibbles = _fields(blocks[:, start:], (0, 4), 15)
    scale: Array = halves(blocks, 0) * (nibbles.astype(np.float32) + np.float32(0.5)) * np.float32(0.25)
    return scale


def _iq2_xs(blocks: Array, out: Array) -> None:
    packed = _wide(blocks, 2, 66, np.uint16)
    weights = _signed(_grid("IQ2_XS"), packed & 511, np.take(_short_signs(), packed >> 9))
    _scaled(out, weights, _half_scales(blocks, 66))


def _iq2_s(blocks: Array, out: Array) -> None:
    rows = _rows(blocks, 2, 34, _fields(blocks[:, 66:74], (0, 2, 4, 6), 3))
    weights = _signed(_grid("IQ2_S"), rows, np.take(spread(255), blocks[:, 34:66]))
    _scaled(out, weights, _half_scales(blocks, 74))


def _iq3_xxs(blocks: Array, out: Array) -> None:
    words = _wide(blocks, 66, 98, np.uint32)
    signs = np.take(_short_signs(), _fields(words, (0, 7, 14, 21), 127))
    scale = halves(blocks, 0) * ((words >> 28).astype(np.float32) + np.float32(0.5)) * np.float32(0.5)
    _scaled(out, _signed(_grid("IQ3_XXS"), blocks[:, 2:66], signs), scale)


def _iq3_s(blocks: Array, out: Array) -> None:
    rows = _rows(blocks, 2, 66, _fields(blocks[:, 66:74], tuple(range(8)), 1))
    scale = halves(blocks, 0) * (2 * _fields(blocks[:, 106:], (0, 4), 15) + 1).astype(np.float32)
    _scaled(out, _signed(_grid("IQ3_S"), rows, np.take(spread(255), blocks[:, 74:106])), scale)


def _shifted(out: Array, rows: Array, minus: Array, scale: Array, delta: np.float32) -> None:
    """out = (grid row + delta) * scale, the form of IQ1, with -delta where `minus` [n, j] is 1.

    `minus` and `scale` [n, k] are per 256 / j and 256 / k weights.
    """
    out[:] = np.take(_grid("IQ1_S"), rows).view(np.int8).reshape(out.shape)
    groups = out.reshape(*minus.shape, -1)
    groups += (delta - minus.astype(np.float32) * (2 * delta))[..., None]
    groups = out.reshape(*scale.shape, -1)
    groups *= scale[..., None]


def _iq1_s(blocks: Array, out: Array) -> None:
    high = _wide(blocks, 34, 50, np.uint16)
    rows = _rows(blocks, 2, 34, _fields(high, (0, 3, 6, 9), 7))
    scale = halves(blocks, 0) * (2 * ((high >> 12) & 7) + 1).astype(np.float32)
    _shifted(out, rows, high >> 15, scale, np.float32(_quants("IQ1_S").delta))


def _iq1_m(blocks: Array, out: Array) -> None:
    packed = _wide(blocks, 48, 56, np.uint16)
    top = packed >> 12  # the four parts of one float16
    bits = top[:, :1] | top[:, 1:2] << 4 | top[:, 2:3] << 8 | top[:, 3:] << 12
    scale = bits.view(np.float16).astype(np.float32) * (2 * _fields(packed, (0, 3, 6, 9), 7) + 1)
    high = _fields(blocks[:, 32:48], (0, 4), 15)
    rows = _rows(blocks, 0, 32, high & 7)
    _shifted(out, rows, high >> 3, scale.astype(np.float32), np.float32(_quants("IQ1_M").delta))


def _leveled(blocks: Array, kind: str, start: int, out: Array, run: int) -> None:
    """Levels of the nibbles from byte `start` on: of every `run` bytes the low ones, then the high ones."""
    pairs = _wide(blocks, start, blocks.shape[1], np.uint16)
    four = np.take(_levels(kind), pairs).view(np.int16).reshape(len(blocks), -1, run // 2, 2)
    parts = out.reshape(len(blocks), -1, 2, run)
    for i in range(2):
        parts[:, :, i] = np.ascontiguousarray(four[..., i]).view(np.int8)


def _iq4_nl(blocks: Array, out: Array) -> None:
    _leveled(blocks, "IQ4_NL", 2, out, 16)
    out *= halves(blocks, 0)


def _iq4_xs(blocks: Array, out: Array) -> None:
    _leveled(blocks, "IQ4_NL", 8, out, 16)
    high = _fields(_wide(blocks, 2, 4, np.uint16), tuple(range(0, 16, 2)), 3).astype(np.uint8)
    scale = (_fields(blocks[:, 4:8], (0, 4), 15) | high << 4).view(np.int8) - np.int8(32)
    groups = out.reshape(-1, 8, 32)
    groups *= (halves(blocks, 0) * scale)[..., None]


def _mxfp4(blocks: Array, out: Array) -> None:
    # the levels are twice those of E2M1, so the scale is 2^(e - 128): a subnormal number for e of 0 and 1
    exponent = blocks[:, :1].astype(np.uint32)
    bits = np.where(exponent < 2, 0x200000 << np.minimum(exponent, 1), (exponent - 1) << 23)
    _leveled(blocks, "MXFP4", 1, out, 16)
    out *= bits.astype(np.uint32).view(np.float32)


@cache
def _e4m3() -> Array:
    """Table [256] float32: half of an unsigned E4M3 number. 127, NaN, counts as 0."""
    number = np.arange(256)
    exponent, mantissa = (number >> 3) & 15, number & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)) * 0.5
    value[[0, 127]] = 0.0
    return value.astype(np.float32)


def _nvfp4(blocks: Array, out: Array) -> None:
    _leveled(blocks, "NVFP4", 4, out, 8)
    groups = out.reshape(-1, 4, 16)
    groups *= _e4m3()[blocks[:, :4]][..., None]


# type -> (weights per block, bytes per block, decoder)
GRID_DECODERS: dict[str, tuple[int, int, Callable[[Array, Array], None]]] = {
    "IQ1_S": (256, 50, _iq1_s),
    "IQ1_M": (256, 56, _iq1_m),
    "IQ2_XXS": (256, 66, _iq2_xxs),
    "IQ2_XS": (256, 74, _iq2_xs),
    "IQ2_S": (256, 82, _iq2_s),
    "IQ3_XXS": (256, 98, _iq3_xxs),
    "IQ3_S": (256, 110, _iq3_s),
    "IQ4_NL": (32, 18, _iq4_nl),
    "IQ4_XS": (256, 136, _iq4_xs),
    "MXFP4": (32, 17, _mxfp4),
    "NVFP4": (64, 36, _nvfp4),
}
