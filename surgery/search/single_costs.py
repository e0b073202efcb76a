"""What single cuts cost: KL to the dense model without one layer or one attention, in one streamed pass."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from surgery.engine.hooks import module_outputs
from surgery.engine.loss import measure_divergence
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.model.attention import attention_site
from surgery.progress import Progress, no_progress

Item = tuple[str, int]  # (kind, layer): ("layers", 3), ("attention", 3)


@torch.no_grad()
def measure_single_costs(
    model: StreamedModel,
    ids: torch.Tensor,
    kinds: Collection[str],
    micro_batch: int,
    place: str = "device",
    progress: Progress[Any] = no_progress,
) -> dict[Item, float]:
    """KL(dense || without it), in nats a token, of every whole layer ("layers" in `kinds`) and of every
    attention ("attention") by itself, on blocks `ids` [N, T]; nothing is repaired.

    A copy of the hidden states leaves out what is measured and runs on beside the others, so that each layer
    is read once. `place` is where the copies are stored, as for `HiddenStore`.
    """
    count = len(model.layers)
    base = TokenStream(model, ids, micro_batch=micro_batch)
    without: dict[Item, TokenStream] = {}
    for number, layer in progress(model.stream_layers(range(count)), "single cuts", count):
        for stream in without.values():
            stream.forward(number, layer)
        if "layers" in kinds:
            without["layers", number] = base.fork(len(ids), number, place)
        if "attention" in kinds and attention_site(layer) is not None:
            without["attention", number] = branch = base.fork(len(ids), number, place)
            with _silenced(layer):
                branch.forward(number, layer)
        base.forward(number, layer)
    found = measure_divergence(model, base, list(without.values()))
    return {item: one.kl for item, one in zip(without, found, strict=True)}


def _silenced(layer: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within the block, the layer's attention adds nothing."""
    site = attention_site(layer)
    assert site is not None
    output = layer.get_submodule(site.output)
    return module_outputs({"attention": output}, lambda _, found: torch.zeros_like(found))
