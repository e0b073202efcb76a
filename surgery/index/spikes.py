"""Spikes of down_proj outputs on one prompt: which weight, or which row, makes an FFN's largest output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.engine.hooks import FfnCall, observed
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.index.super_weights import SuperWeight

Activations = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x [T, F], y [T, D], positions [T]
SPIKE_RATIO = 100.0  # |output| over the median |output| of the layer
MIN_EXPLAINED = 0.5  # share of the output spike that a single product input * weight explains
MAX_PER_LAYER = 6  # the largest number in any published model


@dataclass(frozen=True)
class RowSpike:
    """An output spike in one row of down_proj that no single product input * weight explains by half.

    Fields as in SuperWeight; `explained` is the share of the largest product.
    """

    layer: int
    ffn: str
    row: int
    output: float
    ratio: float
    explained: float
    token: int
    round: int = 1
    prompt: int = 0
    prompts: int = 1
    prompts_tried: int = 1

    @property
    def place(self) -> tuple[int, str, int]:
        """(layer, FFN, row)."""
        return self.layer, self.ffn, self.row


def ffn_activations(
    model: StreamedModel, number: int, layer: nn.Module, stream: TokenStream
) -> dict[str, Activations]:
    """Run a prompt's stream through the layer; returns the `Activations` of the down projections by FFN."""
    found: dict[str, Activations] = {}

    def record(call: FfnCall) -> None:
        positions = torch.arange(len(stream.ids[0])) if call.tokens is None else call.tokens
        u, y = call.u.reshape(-1, call.u.shape[-1]).float(), call.y.reshape(-1, call.y.shape[-1]).float()
        found[call.ffn] = (u, y, positions)

    with observed(model.ffns(number), record):
        stream.forward(number, layer)
    return found


def largest_spike(
    number: int, ffn: str, activations: Activations, weight: torch.Tensor, original: torch.Tensor
) -> SuperWeight | RowSpike | None:
    """The weight behind an FFN's largest output, or the row if no product explains half; None without spike.

    `weight` [D, F] is the matrix as it is, `original` as it was stored.
    """
    x_TF, y_TD, positions = activations
    magnitude = y_TD.abs()
    at, row = divmod(int(magnitude.argmax()), y_TD.shape[1])
    output, median, token = float(y_TD[at, row]), float(magnitude.median()), int(positions[at])
    if median == 0 or abs(output) < SPIKE_RATIO * median:
        return None
    products = x_TF[at] * weight[row].float()
    column = int((products * (1 if output > 0 else -1)).argmax())
    explained = float(products[column]) / output
    if explained < MIN_EXPLAINED:
        return RowSpike(number, ffn, row, output, abs(output) / median, explained, token)
    value = original[row, column]
    return SuperWeight(
        layer=number,
        row=row,
        column=column,
        value=float(value),
        input=float(x_TF[at, column]),
        output=output,
        explained=explained,
        ratio=abs(output) / median,
        rank=1 + int((original.abs() > value.abs()).sum()),
        token=token,
        ffn=ffn,
    )


def creates_spike(spike: Any, residual: torch.Tensor) -> bool:
    """Whether a spike stands out of the residual stream [T, D] after the layer, with the sign it was given.

    Late layers also spike with the opposite sign, to cancel an earlier spike.
    """
    peak = float(residual[spike.token, spike.row])
    return abs(peak) >= SPIKE_RATIO * float(residual.abs().median()) and peak * spike.output > 0
