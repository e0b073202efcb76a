"""Joint repair of a mixture's routed experts, so that together they make up for experts and channels that
are gone, and for what earlier layers lost.

With r_t what must be added to the pruned residual stream to arrive at the dense one, g_te the router's weight
of expert e at token t and W_e u_te its output, the changes dW_e minimise

    sum_t w_t || r_t - sum_e g_te dW_e u_te ||^2.

All experts are changed at once, each by least squares on its own tokens against its share of r:

    minimise over dW_e   sum_t w_t s_t || g_te r_t / s_t - dW_e u_te ||^2,   s_t = sum_e g_te^2.

The sum of these is never below the error of all experts together (Jensen's inequality, with weights
g_te^2 / s_t), and equals it before the change: no pass makes the error larger on the tokens it is fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from surgery.engine.hooks import FfnCall, expert_outputs, module_outputs, observed
from surgery.model.ffn import Ffn
from surgery.repair.least_squares import adds


@dataclass(frozen=True)
class Routed:
    """One `call` of a routed expert, for `tokens` [routed], and the router's `weight` [routed, 1] of its
    output.
    """

    call: FfnCall
    tokens: torch.Tensor
    weight: torch.Tensor


def run_routed(ffns: list[Ffn], run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[Routed]]:
    """(What `run()` returns, the calls of routed experts in it, with the router's weights).

    The weight is the factor between an expert's output and what it adds to the layer's.
    """
    calls: list[FfnCall] = []
    found: list[Routed] = []

    def weigh(_: int, added: torch.Tensor) -> None:
        call = calls.pop()
        assert call.tokens is not None
        y = call.y.float()
        power = y.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        found.append(Routed(call, call.tokens, (added.float() * y).sum(-1, keepdim=True) / power))

    stacked = [ffn for ffn in ffns if ffn.stacked]
    with observed(stacked, calls.append), expert_outputs(stacked, weigh):
        return run(), found


def adds_experts(ffns: list[Ffn], run: Callable[[], torch.Tensor]) -> bool:
    """Whether the layer that `run()` runs adds its routed experts' outputs, times the router's weights."""
    stacked = [ffn for ffn in ffns if ffn.stacked]
    if not stacked:
        return False
    output, routed = run_routed(ffns, run)
    if not routed or any(one.call.y.shape[-1] != output.shape[-1] for one in routed):
        return False  # some families' experts put out fewer numbers, which another matrix widens
    flat = output.reshape(-1, output.shape[-1])
    added = torch.zeros_like(flat, dtype=torch.float32)
    for one in routed:
        added.index_add_(0, one.tokens, one.weight * one.call.y.float())
    modules: dict[str, nn.Module] = {"experts": stacked[0].module}
    with module_outputs(modules, lambda _, out: torch.zeros_like(out)):
        without = run()
    return adds(output - without, added.view_as(output), output)


def shares(
    routed: list[Routed], missing: torch.Tensor
) -> Iterator[tuple[Routed, torch.Tensor, torch.Tensor]]:
    """For `missing` r [T, D], of every call: itself, its share g_te r_t / s_t [routed, D], s_t [routed]."""
    power = torch.zeros(len(missing), 1, device=missing.device)
    for one in routed:
        power.index_add_(0, one.tokens, one.weight.square())
    for one in routed:
        s = power[one.tokens].clamp_min(torch.finfo(torch.float32).tiny)
        yield one, one.weight * missing[one.tokens].float() / s, s[:, 0]
