"""What of a model's shape decides what an index or a cut takes.

Symbols: D hidden_size, F the FFN channels a token goes through in a layer. Estimates err upwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.ffn import Ffn, is_conv1d
from surgery.graphs import DEAR_COLUMNS
from surgery.skeleton import Skeleton
from surgery.statistics import CORRELATION_TOKENS
from surgery.tokens import HEAD_ELEMENTS

SAVED_CHANNELS = 4  # values autograd keeps for a channel and token: gate, its activation, up, their product
SAVED_HIDDEN = 6  # and for a hidden dimension: norms and sums
SAVED_ROWS = (
    2  # and for a row of any other matrix of the layer: queries, keys, values and what is made of them
)
ROUTING = 256  # bytes for a token and an expert: scores, which are float32, and indices
HEAD_COPIES = 4  # logits, in float32, their gradient, softmax
DENSE_MATRICES = 16  # F x F in double precision at the peak of second-order scores


@dataclass(frozen=True)
class Sizes:
    """What of a model's shape decides costs; bytes but for `hidden`, `layers` and numbers of weights."""

    layers: int
    hidden: int
    layer: int  # the largest layer, in the compute dtype and as stored where that differs
    merging: int  # most of what is stored apart (experts, one by one), with each step but the last to one parameter
    inside: int  # all layers, as stored
    outside: int  # embeddings, final norm, head, as stored
    outside_held: int
    head: int  # weights of the output head
    active: float  # weights of all layers that a token meets
    attention: float  # multiplications of queries with keys and of these with values; a fused kernel leaves out the masked half
    saved_token: int  # what autograd keeps for a token, in the largest layer
    kept_token: int  # what is kept of it from the forward pass to the backward pass, where memory allows
    again: float  # multiplications for a token, in all layers, that are done again even then
    widest: int  # channels of the largest FFN
    channels: int  # of all FFNs of the largest layer
    met: int  # those of them that a token goes through
    matrix: int  # weights of the largest matrix
    block_size: int

    @classmethod
    def of(cls, skeleton: Skeleton, dtype: torch.dtype, block_size: int, device: str = "cpu") -> Sizes:
        config = skeleton.config.get_text_config()
        hidden = int(config.hidden_size)
        tensors = skeleton.checkpoint.tensors
        stored = [[tensors[n] for a in assemblies for n in a.stored] for assemblies in skeleton.inside]
        outside = [tensors[n] for a in skeleton.outside for n in a.stored]
        numbers = [sum(entry.numel for entry in layer) for layer in stored]
        cast = any(entry.dtype != dtype for layer in stored for entry in layer)
        copies = [
            sum(e.nbytes for e in layer) * cast + n * dtype.itemsize
            for layer, n in zip(stored, numbers, strict=True)
        ]
        heads = int(getattr(config, "num_attention_heads", 0) or 0)
        eager = getattr(config, "_attn_implementation", None) == "eager"
        through = [_channels_met(ffns, config) for ffns in skeleton.ffns]
        unused = [_unused(ffns, config, hidden) for ffns in skeleton.ffns]
        products = [
            _products(*pair, config, hidden) for pair in zip(skeleton.layers, skeleton.ffns, strict=True)
        ]
        rows = max(sum(max(one.columns, one.outputs) for one in layer if not one.ffn) for layer in products)
        saved = SAVED_CHANNELS * max(through) + SAVED_HIDDEN * hidden + SAVED_ROWS * rows
        experts = max(sum(len(ffn.units) for ffn in ffns if ffn.stacked) for ffns in skeleton.ffns)
        saved += 3 * heads * block_size * eager
        dear = DEAR_COLUMNS.get(device, 0)
        kept = max(sum(one.outputs for one in layer if one.columns >= dear) for layer in products)
        keys, values = (getattr(config, name, 0) or 0 for name in ("qk_head_dim", "v_head_dim"))
        of_head = max(int(getattr(config, "head_dim", 0) or hidden // max(1, heads)), keys, values)
        fused = not eager and keys == values
        scores = 0 if fused else 4 * heads * block_size * (of_head >= dear)
        kept += max(hidden, heads * of_head) * (fused or block_size >= dear)
        attention = float(len(stored) * block_size * max(hidden, heads * of_head) * (1 if fused else 2))
        cheap = [one for layer in products for one in layer if one.columns < dear]
        return cls(
            layers=len(stored),
            hidden=hidden,
            layer=max(copies),
            merging=max(
                (
                    sum(tensors[n].nbytes for n in a.stored) * len(a.converter.operations)
                    for layer in skeleton.inside
                    for a in layer
                    if a.converter is not None
                ),
                default=0,
            ),
            inside=sum(entry.nbytes for layer in stored for entry in layer),
            outside=sum(entry.nbytes for entry in outside),
            outside_held=sum(entry.numel for entry in outside) * dtype.itemsize,
            head=hidden * int(config.vocab_size),
            active=sum(numbers) - sum(unused),
            attention=attention,
            saved_token=saved * dtype.itemsize + ROUTING * experts,
            kept_token=kept * dtype.itemsize + scores + 4 * (heads * fused + experts * (hidden >= dear)),
            again=sum(one.columns * one.outputs for one in cheap) + attention * (not scores and not fused),
            widest=max((ffn.width for ffns in skeleton.ffns for ffn in ffns), default=0),
            channels=max(sum(ffn.width * len(ffn.units) for ffn in ffns) for ffns in skeleton.ffns),
            met=max(through),
            matrix=max((e.numel for layer in stored for e in layer), default=0),
            block_size=block_size,
        )

    def fixed(self, blocks: int, second_order: bool, merging: bool = True) -> int:
        """Bytes that are there whatever the micro-batch: the ends of the model, or two layers and their statistics."""
        ends = self.outside_held + HEAD_COPIES * 4 * HEAD_ELEMENTS
        sampled = self.met * min(blocks * self.block_size, CORRELATION_TOKENS + blocks)
        sums = 4 * (5 * blocks * self.channels + 3 * sampled)
        squares = DENSE_MATRICES * 8 * self.widest**2 if second_order else 0
        return max(ends, 2 * self.layer + self.merging * merging + sums + 8 * self.matrix + squares)

    def step(self, blocks: int) -> int:
        """Bytes of so many blocks on their way through a layer and back: what is saved, and as much in gradients."""
        tokens = blocks * self.block_size
        return 2 * self.saved_token * tokens + 4 * 4 * self.block_size * self.widest


@dataclass(frozen=True)
class _Product:
    """A matrix that a token meets: products of so many columns make so many outputs."""

    columns: int
    outputs: int
    ffn: bool


def _products(layer: nn.Module, ffns: list[Ffn], config: Any, hidden: int) -> list[_Product]:
    """All that a token meets in a layer; of experts as many as it is routed to."""
    inside = {name for ffn in ffns for name in ffn.cuts()}
    found = []
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 2 and name not in inside:
            home = layer.get_submodule(name.rpartition(".")[0])
            columns, outputs = parameter.shape if is_conv1d(home) else reversed(parameter.shape)
            found.append(_Product(columns, outputs, ffn=False))
    for ffn in ffns:
        met, gated = routed(ffn, config), ffn.row_weights()[0] is not None
        found.append(_Product(hidden, met * ffn.width * (1 + gated), ffn=True))
        found.append(_Product(ffn.width, met * hidden, ffn=True))
    return found


def _channels_met(ffns: list[Ffn], config: Any) -> int:
    """FFN channels of a layer that one token goes through."""
    return sum(ffn.width * routed(ffn, config) for ffn in ffns)


def _unused(ffns: list[Ffn], config: Any, hidden: int) -> int:
    """Weights of the experts of a layer that one token does not go through, roughly."""
    return sum(3 * hidden * ffn.width * (len(ffn.units) - routed(ffn, config)) for ffn in ffns)


def routed(ffn: Ffn, config: Any) -> int:
    """Experts of an FFN that one token goes through; 1 of one that is no stack of experts."""
    if not ffn.stacked:
        return 1
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k")
    every = len(ffn.units)
    return min(every, next((k for name in names if isinstance(k := getattr(config, name, None), int)), every))
