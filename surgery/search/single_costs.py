"""What single cuts cost: KL to the dense model without one layer, attention or FFN, in one streamed pass."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from surgery.cut.sublayers import SUBLAYERS
from surgery.engine.hooks import module_outputs
from surgery.engine.loss import measure_divergence
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.model.sublayers import SublayerSite
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
    """KL(dense || without it), in nats a token, of every whole layer ("layers" in `kinds`), every attention
    ("attention") and every FFN ("whole-ffn") by itself, on blocks `ids` [N, T]; nothing is repaired.

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
        for kind, sublayer in SUBLAYERS.items():
            site = sublayer.site(model.meta_model, number) if kind in kinds else None
            if site is not None:
                without[kind, number] = branch = base.fork(len(ids), number, place)
                with _silenced(layer, site):
                    branch.forward(number, layer)
        base.forward(number, layer)
    found = measure_divergence(model, base, list(without.values()))
    return {item: one.kl for item, one in zip(without, found, strict=True)}


def _silenced(layer: nn.Module, site: SublayerSite) -> contextlib.AbstractContextManager[None]:
    """Within the block, a sublayer of the layer adds nothing."""
    return module_outputs(
        {"output": layer.get_submodule(site.output)}, lambda _, found: torch.zeros_like(found)
    )
