"""Changes that make transformers' layout of a tensor from llama.cpp's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Change = Callable[
    [torch.Tensor, dict[str, Any]], torch.Tensor
]  # (tensor, config fields) -> the same, changed


def unpermute(heads_key: str) -> Change:
    """llama.cpp turns neighbouring numbers of a head of `llama`, transformers those half a head apart."""

    def change(tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
        parts = tensor.view(config[heads_key], -1, 2, *tensor.shape[1:])
        return parts.transpose(1, 2).reshape(tensor.shape)

    return change


def row(tensor: torch.Tensor, _: dict[str, Any]) -> torch.Tensor:
    """A vector as a matrix of one row, where the file has dropped that dimension."""
    return tensor.view(1, -1)


def transpose(tensor: torch.Tensor, _: dict[str, Any]) -> torch.Tensor:
    return tensor.t().contiguous() if tensor.dim() == 2 else tensor


def by_group(tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Falcon's [queries; keys; values] by group, as transformers has them: its queries, key and value."""
    heads, groups = config["num_attention_heads"], config["num_kv_heads"]
    rows = tensor.shape[0] // (heads + 2 * groups)
    parts = tensor.split([heads * rows, groups * rows, groups * rows])
    return torch.cat([part.view(groups, -1, *tensor.shape[1:]) for part in parts], 1).reshape(tensor.shape)
