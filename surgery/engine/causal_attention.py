"""The gradient of causal attention on a CPU, at the machine's rate.

PyTorch's fused kernel for CPUs is fast forward, but its backward pass runs at a tenth of the rate of the
machine's bfloat16 products. Here the fused kernel computes the output, bit for bit as before, and the
gradient comes from plain matrix products, a few rows and heads at a time so that the scores stay in the
processor's cache. Measured with `tests/benchmarks/attention.py`.

With scores S = s Q K' (s the scale), P = softmax(S) row by row and the output's gradient G:

    dV = P' G,   dP = G V',   dS = P * (dP - rowsum(dP * P)),   dQ = s dS K,   dK = s dS' Q

Shape letters: B batch, H heads, T tokens, d head dimension.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

LONGEST = 1023  # tokens; for longer blocks the fused kernel is as fast, as scores don't fit in the cache
ROWS = 256  # of the scores that are computed together
SCORES = 1 << 20  # elements of them


class CausalAttention(torch.autograd.Function):
    """Attention of bfloat16 queries [B, H, T, d], keys and values [B, H / g, T, d] of g heads each."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """The output [B, H, T, d] of PyTorch's fused kernel."""
        output: torch.Tensor = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        query, key, value = ctx.saved_tensors
        return (*attention_gradients(query, key, value, gradients[0], ctx.scale), None)


def attention_gradients(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK and dV, shaped as query, key and value, from dL/d(output) [B, H, T, d]."""
    batch, heads, tokens, width = query.shape
    groups = heads // key.shape[1]
    q, g = (tensor.reshape(batch * heads, tokens, width) for tensor in (query, gradient))
    k, v = (
        tensor.repeat_interleave(groups, 1).reshape(batch * heads, tokens, width) for tensor in (key, value)
    )
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    step = max(1, SCORES // (min(ROWS, tokens) * tokens))
    for start in range(0, tokens, ROWS):
        rows, seen = slice(start, min(start + ROWS, tokens)), min(start + ROWS, tokens)
        mask = torch.full((seen - start, seen), -math.inf, dtype=q.dtype).triu_(start + 1)
        for first in range(0, len(q), step):
            part = slice(first, first + step)
            rows_q, rows_g, keys, values = q[part, rows], g[part, rows], k[part, :seen], v[part, :seen]
            scores = torch.baddbmm(mask, rows_q, keys.transpose(1, 2), alpha=scale)
            p = torch.softmax(scores, -1)
            d_p = torch.bmm(rows_g, values.transpose(1, 2), out=scores)
            d_scores = torch._softmax_backward_data(d_p, p, -1, p.dtype)
            d_v[part, :seen].baddbmm_(p.transpose(1, 2), rows_g)
            d_q[part, rows].baddbmm_(d_scores, keys, beta=0, alpha=scale)
            d_k[part, :seen].baddbmm_(d_scores.transpose(1, 2), rows_q, alpha=scale)
    shared = [one.view(batch, -1, groups, tokens, width).sum(2) if groups > 1 else one for one in (d_k, d_v)]
    return d_q.view_as(query), shared[0].view_as(key), shared[1].view_as(value)


def fast_gradients(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """FastGradients where a layer on this device, in this dtype, is about to take gradients; else nothing."""
    useful = device.type == "cpu" and dtype == torch.bfloat16 and torch.is_grad_enabled()
    return FastGradients() if useful else nullcontext()


class FastGradients(TorchFunctionMode):
    """Within the block, attention that takes gradients has those of `CausalAttention`, where it can.

    That is: bfloat16 on a CPU, causal without another mask, no dropout, blocks of LONGEST tokens at most.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and _fits(*args, **kwargs):
            query, key, value = args
            scale = kwargs.get("scale")
            return CausalAttention.apply(  # type: ignore[no-untyped-call]
                query, key, value, query.shape[-1] ** -0.5 if scale is None else scale
            )
        return func(*args, **kwargs)


def _fits(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> bool:
    return (
        torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
        and query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and attn_mask is None
        and bool(is_causal)
        and dropout_p == 0
        and query.dim() == 4
        and query.shape[2] == key.shape[2] <= LONGEST
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and query.shape[1] % key.shape[1] == 0
    )
