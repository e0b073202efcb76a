"""Causal attention on a CPU and its gradient against float64, and where they are used."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attention

from surgery.engine import causal_attention
from surgery.engine.causal_attention import FastAttention, attention_output


def inputs(
    tokens: int, heads: int = 4, keys: int = 4, dtype: torch.dtype = torch.bfloat16
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, tokens, 16), (2, keys, tokens, 16), (2, keys, tokens, 16)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(True) for shape in shapes]


@pytest.mark.parametrize(("tokens", "keys", "scale"), [(70, 4, None), (300, 2, 0.3), (1, 1, None)])
def test_gradients_are_those_of_float64(tokens: int, keys: int, scale: float | None) -> None:
    found = inputs(tokens, keys=keys)
    wanted = [tensor.detach().double().requires_grad_(True) for tensor in found]
    gqa = keys != 4
    with FastAttention():
        output = attention(*found, is_causal=True, scale=scale, enable_gqa=gqa)
    assert "causal_attention" in output.grad_fn.name()
    plain = attention(*found, is_causal=True, scale=scale, enable_gqa=gqa)
    up = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    right = attention(*wanted, is_causal=True, scale=scale, enable_gqa=gqa)
    exact = torch.autograd.grad(right, wanted, up.double())
    fused = torch.autograd.grad(plain, found, up.bfloat16())
    for mine, theirs, truth in zip(
        torch.autograd.grad(output, found, up.bfloat16()), fused, exact, strict=True
    ):
        error, least = ((one.double() - truth).norm() for one in (mine, theirs))
        assert float(error) <= max(0.01 * float(truth.norm()), 2 * float(least))


@pytest.mark.parametrize(("tokens", "keys", "scale"), [(70, 4, None), (1100, 2, 3.0), (1, 1, None)])
def test_output_is_that_of_float64_up_to_little_more_than_its_rounding(
    tokens: int, keys: int, scale: float | None
) -> None:
    """P is rounded to bfloat16 as a factor. The fused kernel's error depends on the processor."""
    found = inputs(tokens, keys=keys)
    options = {"is_causal": True, "scale": scale, "enable_gqa": keys != 4}
    with torch.no_grad():
        right = attention(*(tensor.double() for tensor in found), **options)
        with FastAttention():
            output = attention(*found, **options)
    error, rounding = (float((one.double() - right).norm()) for one in (output, right.bfloat16()))
    assert output.dtype == torch.bfloat16 and output.shape == right.shape
    assert error <= 1.6 * rounding
    precision = torch.get_float32_matmul_precision()
    assert precision == "highest"  # as it was


def test_rows_and_heads_of_the_output_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = inputs(50, keys=2)
    whole = attention_output(*found, 0.25)
    monkeypatch.setattr(causal_attention, "ROWS", 16)
    monkeypatch.setattr(causal_attention, "OUTPUT_SCORES", 16 * 50 * 3)
    torch.testing.assert_close(attention_output(*found, 0.25), whole, atol=0.02, rtol=0.01)


def test_rows_and_heads_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = inputs(50, keys=2)
    up = torch.ones(2, 4, 50, 16, dtype=torch.bfloat16)
    whole = torch.autograd.grad(attention_output(*found, 0.25), found, up)
    monkeypatch.setattr(causal_attention, "ROWS", 16)
    monkeypatch.setattr(causal_attention, "SCORES", 16 * 50 * 3)
    parts = torch.autograd.grad(attention_output(*found, 0.25), found, up)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("case", ["float32", "mask", "not causal", "long"])
def test_other_attention_is_left_to_pytorch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("not for this attention")

    monkeypatch.setattr(causal_attention, "attention_output", fail)
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    found = inputs(causal_attention.LONGEST + 1 if case == "long" else 8, dtype=dtype)
    options: dict[str, object] = {"is_causal": case not in ("mask", "not causal")}
    if case == "mask":
        options["attn_mask"] = torch.ones(8, 8, dtype=torch.bool).tril()
    with FastAttention():
        output = attention(*found, **options)
        assert "causal_attention" not in output.grad_fn.name()
        with torch.no_grad():
            if case == "long":  # only its gradient is left to PyTorch
                with pytest.raises(AssertionError, match="not for this"):
                    attention(*found, **options)
            else:
                attention(*found, **options)
