"""Dequantising GGUF blocks, against the gguf package's own numpy routes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import dequantize as reference
from gguf.quants import _type_traits

from surgery.checkpoint import gguf_blocks
from surgery.checkpoint.gguf_blocks import BLOCK_TYPES, dequantize
from surgery.errors import CheckpointError

QUANTISED = sorted(kind for kind, block in BLOCK_TYPES.items() if block.number is None)


def decoded(raw: np.ndarray, kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.empty(raw.size // BLOCK_TYPES[kind].nbytes * BLOCK_TYPES[kind].weights, dtype=dtype)
    dequantize(torch.from_numpy(raw.reshape(-1)), kind, out)
    return out


def test_every_type_that_gguf_dequantises_is_there() -> None:
    assert {kind.name for kind in _type_traits} | {"F32", "F16"} <= set(BLOCK_TYPES)


@pytest.mark.parametrize("kind", QUANTISED)
def test_random_blocks_equal_the_gguf_package(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind not in GGMLQuantizationType.__members__:
        pytest.skip(f"the installed gguf has no {kind}")
    block = BLOCK_TYPES[kind]
    assert GGML_QUANT_SIZES[GGMLQuantizationType[kind]] == (block.weights, block.nbytes)
    monkeypatch.setattr(gguf_blocks, "PIECE", 5 * block.weights)  # several pieces, the last one short
    raw = np.random.default_rng(0).integers(0, 256, (37, block.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(reference(raw, GGMLQuantizationType[kind])).view(-1)
    found = decoded(raw, kind)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert torch.equal(
        decoded(raw, kind, torch.bfloat16).nan_to_num(), expected.to(torch.bfloat16).nan_to_num()
    )


def test_plain_numbers_are_cast() -> None:
    values = torch.randn(64)
    for kind, dtype in (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)):
        raw = values.to(dtype).view(torch.uint8).numpy()
        assert torch.equal(decoded(raw, kind), values.to(dtype).float())


def test_an_unknown_type_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="Q9_Z"):
        dequantize(torch.zeros(8, dtype=torch.uint8), "Q9_Z", torch.zeros(8))
