"""Super activations on their way: where the residual stream spikes after each layer, with super weights and without."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from surgery.ablation import Edit
from surgery.checkpoint import Checkpoint
from surgery.indexing import RunOptions
from surgery.stream import StreamedModel
from surgery.super_weights import SuperWeight
from surgery.tokens import TokenStream


@dataclass(frozen=True)
class TracePoint:
    """After one layer, for one prompt: the largest |hidden state|, its token and channel, with the weights and without.

    `followed` and `followed_without` are the hidden state at the token and row where the super weight makes its spike.
    """

    prompt: int
    layer: int
    peak: float
    token: int
    channel: int
    peak_without: float
    followed: float
    followed_without: float


@torch.no_grad()
def trace(
    checkpoint: Checkpoint,
    prompts: Iterable[torch.Tensor],
    weight: SuperWeight,
    removed: dict[int, list[Edit]],
    options: RunOptions,
) -> list[TracePoint]:
    """Points for every prompt (ids [P]) and layer; `weight` is followed, `removed` says what goes (`experiments.scaled`)."""
    model = StreamedModel(checkpoint, options.device, options.dtype, memory=options.memory)
    pairs = []
    for ids in prompts:
        dense = TokenStream(model, ids[None].long(), micro_batch=1)
        pairs.append((dense, dense.fork(1, 0)))
    spikes = [0 for _ in pairs]
    points = []
    for number, layer in model.walk(range(len(model.layers))):
        for dense, _ in pairs:
            dense.forward(number, layer)
        _edit(model, number, layer, removed)
        for place, (dense, without) in enumerate(pairs):
            without.forward(number, layer)
            whole, less = (s.store.get(0, slice(0, 1), model.device)[0].float() for s in (dense, without))
            if number == weight.layer:
                spikes[place] = int(whole[:, weight.row].abs().argmax())
            token, channel = divmod(int(whole.abs().argmax()), whole.shape[1])
            at = (spikes[place], weight.row)
            points.append(
                TracePoint(
                    place,
                    number,
                    float(whole.abs().max()),
                    token,
                    channel,
                    float(less.abs().max()),
                    float(whole[at]) if number >= weight.layer else 0.0,
                    float(less[at]) if number >= weight.layer else 0.0,
                )
            )
    return points


def _edit(model: StreamedModel, number: int, layer: nn.Module, removed: dict[int, list[Edit]]) -> None:
    for edit in removed.get(number, []):
        edit.apply(model.ffns(number), layer)
