"""Which key/value heads to keep: by the power of what each adds to the residual stream."""

from __future__ import annotations

from typing import Any

import torch

from surgery.budget.model_size import ModelSize
from surgery.budget.sensitivity_cost import FIT_BLOCKS, sensitivity_cost
from surgery.cut.groups import Group, GroupKey
from surgery.cut.kv_heads import KvHeads
from surgery.engine.hooks import module_inputs
from surgery.engine.open_model import Model
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.index.channel_index import ChannelIndex
from surgery.model.sublayers import attention_site
from surgery.plan.kind_plan import KindPlan, kv_plan
from surgery.progress import Progress, no_progress
from surgery.repair.least_squares import inverse_power

Scores = dict[GroupKey, torch.Tensor]


def head_scores(model: Model, index: ChannelIndex, progress: Progress[Any] = no_progress) -> Scores:
    """Score [G] of every group of key/value heads in every layer, on calibration blocks of the index.

    The score of group g is sum_t w_t ||W_g a_tg||^2: W_g [D, H] are the output projection's columns of its
    query heads, a_tg [H] what these put out for token t, and w_t is one over the token's power in the
    residual stream, as in repair.
    """
    ids = index.input_ids[:FIT_BLOCKS].long()
    size = ModelSize.of(model.meta_model, model.run.dtype, ids.shape[1])
    blocks, block_size = index.input_ids.shape
    cost = sensitivity_cost(size, blocks, block_size, model.run)
    groups = {group.layer: group for group in KvHeads().groups(model.meta_model)}
    streamed = StreamedModel(model)
    stream = TokenStream(streamed, ids, micro_batch=cost.micro_batch, place=cost.branches_on)
    scores: Scores = {}
    count = len(streamed.layers)
    for number, layer in progress(streamed.stream_layers(range(count)), "heads", count):
        if number in groups:
            group = groups[number]
            scores[group.key] = _layer_scores(stream, number, layer, group)
        stream.forward(number, layer)
    return scores


def heads_plan(scores: Scores, kept: int) -> KindPlan:
    """The plan that keeps the `kept` groups of highest score in every layer."""
    chosen = {
        key: score.argsort(descending=True, stable=True)[:kept].tolist() for key, score in scores.items()
    }
    return kv_plan(chosen)


@torch.no_grad()
def _layer_scores(stream: TokenStream, number: int, layer: Any, group: Group) -> torch.Tensor:
    """Score [G] of the groups of the resident layer, on the CPU."""
    site = attention_site(layer)
    assert site is not None
    output = layer.get_submodule(site.output)
    weight = output.weight.float().view(len(output.weight), group.size, -1)
    total = torch.zeros(group.size, dtype=torch.float64, device="cpu")
    seen: list[torch.Tensor] = []
    with module_inputs({"output": output}, lambda _, entered: seen.append(entered)):
        for part, calls in zip(stream.slices, stream.calls, strict=True):
            entering = stream.store.get(0, part, stream.model.device)
            leaving = stream.model.run_layer(layer, entering, calls[number])
            heads = seen.pop().float().flatten(0, -2).view(-1, group.size, weight.shape[-1])
            added = torch.einsum("tgh,dgh->tgd", heads, weight).square().sum(-1)
            total += (inverse_power(leaving).flatten()[:, None] * added).sum(0).double().cpu()
    return total
