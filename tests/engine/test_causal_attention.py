"""The gradient of causal attention on a CPU against float64, and where it is used."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attention

from surgery.engine import causal_attention
from surgery.engine.causal_attention import CausalAttention, FastGradients


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
    with FastGradients():
        output = attention(*found, is_causal=True, scale=scale, enable_gqa=gqa)
    assert output.grad_fn.name().startswith("CausalAttention")
    plain = attention(*found, is_causal=True, scale=scale, enable_gqa=gqa)
    assert torch.equal(output, plain)
    up = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    exact = torch.autograd.grad(
        attention(*wanted, is_causal=True, scale=scale, enable_gqa=gqa), wanted, up.double()
    )
    fused = torch.autograd.grad(plain, found, up.bfloat16())
    for mine, theirs, truth in zip(
        torch.autograd.grad(output, found, up.bfloat16()), fused, exact, strict=True
    ):
        error, least = ((one.double() - truth).norm() for one in (mine, theirs))
        assert float(error) <= max(0.01 * float(truth.norm()), 2 * float(least))


def test_rows_and_heads_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = inputs(50, keys=2)
    up = torch.ones(2, 4, 50, 16, dtype=torch.bfloat16)
    whole = torch.autograd.grad(CausalAttention.apply(*found, 0.25), found, up)
    monkeypatch.setattr(causal_attention, "ROWS", 16)
    monkeypatch.setattr(causal_attention, "SCORES", 16 * 50 * 3)
    parts = torch.autograd.grad(CausalAttention.apply(*found, 0.25), found, up)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("case", ["float32", "mask", "not causal", "long", "no gradient"])
def test_other_attention_is_left_to_pytorch(case: str) -> None:
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    found = inputs(1024 if case == "long" else 8, dtype=dtype)
    options: dict[str, object] = {"is_causal": case not in ("mask", "not causal")}
    if case == "mask":
        options["attn_mask"] = torch.ones(8, 8, dtype=torch.bool).tril()
    with torch.set_grad_enabled(case != "no gradient"), FastGradients():
        output = attention(*found, **options)
    assert output.grad_fn is None or "CausalAttention" not in output.grad_fn.name()
