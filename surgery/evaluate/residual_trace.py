"""Largest entries of the residual stream after each layer, with and without super weights."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass

import torch

from surgery.budget.pass_cost import PassCost, PassJob, StreamShape, pass_cost
from surgery.engine.open_model import Model
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.evaluate.ablation import Edit
from surgery.index.super_weights import SuperWeight


@dataclass(frozen=True)
class TracePoint:
    """Hidden states of one prompt after one layer, with and without super weights.

    `peak` and `peak_without` are the largest |hidden state|; `token` and `channel` are the place of `peak`.
    `followed` and `followed_without` are the hidden state at the token and row where the super weight makes
    its spike.
    """

    prompt: int
    layer: int
    peak: float
    token: int
    channel: int
    peak_without: float
    followed: float
    followed_without: float


def prompt_cost(opened: Model, prompts: Iterable[Sized], last_tokens: int = 0) -> PassCost:
    """Cost of running prompts with and without edits, and of `last_tokens` next-token distributions.

    Raises MemoryBudgetError.
    """
    shapes = tuple(StreamShape(1, len(ids), copies=2) for ids in prompts)
    job = PassJob(shapes, last_tokens=last_tokens)
    return pass_cost(opened.meta_model, job, opened.run)


@torch.no_grad()
def trace(
    opened: Model,
    prompts: list[torch.Tensor],
    weight: SuperWeight,
    removed: dict[int, list[Edit]],
) -> list[TracePoint]:
    """Trace every prompt (token ids [P]) through all layers, with and without the edits `removed`.

    `weight` is the super weight whose spike is followed; `removed` are edits by layer, as from `scaled`.
    Raises MemoryBudgetError.
    """
    place = prompt_cost(opened, prompts).hidden_on
    model = StreamedModel(opened)
    pairs = []
    for ids in prompts:
        dense = TokenStream(model, ids[None].long(), micro_batch=1, place=place)
        pairs.append((dense, dense.fork(1, 0, place)))
    spikes = [0 for _ in pairs]
    points = []
    for number, layer in model.stream_layers(range(len(model.layers))):
        for dense, _ in pairs:
            dense.forward(number, layer)
        for edit in removed.get(number, []):
            edit.apply(model.ffns(number), layer)
        for i, (dense, without) in enumerate(pairs):
            without.forward(number, layer)
            intact, edited = (s.store.get(0, slice(0, 1), model.device)[0].float() for s in (dense, without))
            if number == weight.layer:
                spikes[i] = int(intact[:, weight.row].abs().argmax())
            token, channel = divmod(int(intact.abs().argmax()), intact.shape[1])
            at = (spikes[i], weight.row)
            points.append(
                TracePoint(
                    i,
                    number,
                    float(intact.abs().max()),
                    token,
                    channel,
                    float(edited.abs().max()),
                    float(intact[at]) if number >= weight.layer else 0.0,
                    float(edited[at]) if number >= weight.layer else 0.0,
                )
            )
    return points
