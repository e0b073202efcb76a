"""Forward passes that compute routed experts one at a time, so that activations can be observed."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from surgery.model.families import EXPERT

EXPERTS_IMPLEMENTATION = "surgeon"
EXPERT_OBSERVER = "_surgeon_observe"  # attribute of an experts module, called as (FFN name, tokens, u, y)
OUTPUT_OBSERVER = (
    "_surgeon_observe_output"  # likewise, called as (expert, what it adds to the layer's output)
)


def experts_forward(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Output [T, D] of routed experts, computed one at a time so that their activations can be observed.

    transformers' fused kernels compute the same output without materialising one expert's activation. hidden
    [T, D]; `top_k_index` and `top_k_weights` [T, k].
    """
    output = torch.zeros_like(hidden)
    observe, observe_output = (getattr(module, name, None) for name in (EXPERT_OBSERVER, OUTPUT_OBSERVER))
    in_name = "gate_up_proj" if module.has_gate else "up_proj"
    in_weights, in_biases = getattr(module, in_name), getattr(module, f"{in_name}_bias", None)
    for expert in torch.unique(top_k_index).tolist():
        # transposed, so that rows are in the order of transformers' own loop: results are bit-identical
        rank, tokens = torch.where((top_k_index == expert).t())
        in_bias = None if in_biases is None else in_biases[expert]
        down_bias = module.down_proj_bias[expert] if module.has_bias else None
        projected = _linear(hidden[tokens], in_weights[expert], in_bias, module.is_transposed)
        u = module._apply_gate(projected) if module.has_gate else module.act_fn(projected)
        y = _linear(u, module.down_proj[expert], down_bias, module.is_transposed)
        if observe is not None:
            observe(f"{EXPERT}{expert}", tokens, u, y)
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        weighted = (y * top_k_weights[tokens, rank, None]).to(output.dtype)
        if observe_output is not None:
            observe_output(expert, weighted)
        output = output.index_add(0, tokens, weighted)
    return output


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    if transposed:
        return x @ weight if bias is None else x @ weight + bias
    return functional.linear(x, weight, bias)


def scaled_experts_forward(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Output [E * T, D] of Llama 4's experts, computed one at a time.

    `hidden` [E * T, D] holds all tokens for each expert, scaled by the routing score, which is zero for
    tokens not routed to it. Only nonzero rows are computed; the output of the others is zero.
    """
    stacked = hidden.view(module.num_experts, -1, module.hidden_size)
    observe, observe_output = (getattr(module, name, None) for name in (EXPERT_OBSERVER, OUTPUT_OBSERVER))
    outputs = []
    for expert, x in enumerate(stacked):
        (tokens,) = torch.where(x.detach().abs().amax(-1) > 0)
        gate, up = (x[tokens] @ module.gate_up_proj[expert]).chunk(2, dim=-1)
        u = up * module.act_fn(gate)
        y = u @ module.down_proj[expert]
        if observe is not None and len(tokens):
            observe(f"{EXPERT}{expert}", tokens, u, y)
        if observe_output is not None and len(tokens):
            observe_output(expert, y)
        outputs.append(torch.zeros_like(x).index_copy(0, tokens, y))
    return torch.stack(outputs).view(-1, module.hidden_size)


def show_experts(model: nn.Module) -> None:
    """Make every experts module of a model use `experts_forward`, or `scaled_experts_forward` for Llama 4."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
    for module in model.modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "config"):
            cast(Any, module.config)._experts_implementation = EXPERTS_IMPLEMENTATION
        elif type(module).__name__ == "Llama4TextExperts":
            experts: Any = module
            experts.is_transposed, experts.is_concatenated, experts.has_bias = True, True, False
            experts.forward = functools.partial(scaled_experts_forward, experts)
