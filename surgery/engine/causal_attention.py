"""Causal attention on a CPU, forward and backward, at the machine's rate.

PyTorch's fused kernel for CPUs runs at a tenth of the rate of the machine's bfloat16 products. Here the
output and the gradient come from plain matrix products, a few rows and heads at a time so that the scores
stay in the processor's cache. Measured with `tests/benchmarks/attention.py`.

With queries Q, keys K, values V [T, d] of a head, s the scale, and j <= i for every row i:

    S = s Q K',   P = softmax(S) row by row,   output = P V

S and P are float32, of bfloat16 factors; P is rounded to bfloat16 as a factor. With the output's gradient G:

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

from surgery.engine.fast_products import fast_products

LONGEST = 2048  # tokens; the gradient of longer blocks is the fused kernel's
ROWS = 256  # of the scores that are computed together
SCORES = 1 << 20  # elements of them, bfloat16 for the gradient
OUTPUT_SCORES = 3 << 17  # the same for the output, where they are float32


@torch.library.custom_op(
    "surgery::causal_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, float scale) -> Tensor",
)
def attention_output(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention [B, H, T, d] of bfloat16 queries [B, H, T, d], keys and values [B, H / g, T, d].

    One operation to PyTorch, so that its output can be cached for the backward pass as the fused kernel's.
    """
    batch, heads, tokens, width = query.shape
    q, k, v = _by_head(query, key, value)
    output = torch.empty_like(q)
    rows = min(ROWS, tokens)
    step = max(1, OUTPUT_SCORES // (rows * tokens))
    later = torch.full((rows, rows), -math.inf).triu_(1)  # what a row of the diagonal part must not see
    with fast_products(query, key, value):
        for first in range(0, len(q), step):
            part = slice(first, first + step)
            rows_q, keys, values = q[part].float(), k[part].float().transpose(1, 2), v[part].float()
            for start in range(0, tokens, rows):
                end = min(start + rows, tokens)
                scores = torch.bmm(rows_q[:, start:end], keys[:, :, :end]).mul_(scale)
                scores[:, :, start:] += later[: end - start, : end - start]
                output[part, start:end] = torch.bmm(torch.softmax(scores, -1), values[:, :end])
    return output.view(batch, heads, tokens, width)


@attention_output.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:  # noqa: ARG001
    return query.new_empty(query.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:3])
    ctx.scale = inputs[3]


def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of queries, keys and values."""
    query, key, value = ctx.saved_tensors
    return (*attention_gradients(query, key, value, gradient, ctx.scale), None)


attention_output.register_autograd(_gradients, setup_context=_save_inputs)


def _by_head(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values as [B H, T, d]; a key's or value's head is repeated for its g heads."""
    batch, heads, tokens, width = tensors[0].shape
    return [
        (one if one.shape[1] == heads else one.repeat_interleave(heads // one.shape[1], 1)).reshape(
            batch * heads, tokens, width
        )
        for one in tensors
    ]


def attention_gradients(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK and dV, shaped as query, key and value, from dL/d(output) [B, H, T, d]."""
    batch, heads, tokens, width = query.shape
    groups = heads // key.shape[1]
    q, k, v, g = _by_head(query, key, value, gradient)
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


def fast_attention(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """FastAttention where a layer is about to run on this device, in this dtype, and gains by it."""
    useful = device.type == "cpu" and dtype == torch.bfloat16
    return FastAttention() if useful else nullcontext()


class FastAttention(TorchFunctionMode):
    """Within the block, attention is computed by plain products, where it can be.

    That is: bfloat16 on a CPU, causal without another mask, no dropout; with gradients, LONGEST tokens at
    most.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or not _fits(*args, **kwargs):
            return func(*args, **kwargs)
        query, key, value = args
        scale = kwargs.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if _takes_gradients(*args) and query.shape[2] > LONGEST:
            return func(*args, **kwargs)
        return attention_output(query, key, value, scale)


def _takes_gradients(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


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
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and attn_mask is None
        and bool(is_causal)
        and dropout_p == 0
        and query.dim() == 4
        and query.shape[2] == key.shape[2]
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and query.shape[1] % key.shape[1] == 0
    )
