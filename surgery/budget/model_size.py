"""ModelSize: the sizes of a model from which memory and FLOPs of a job are estimated.

Symbols: D hidden_size, F the FFN channels that a token activates in a layer. Estimates err upwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.engine.loss import HEAD_ELEMENTS
from surgery.engine.selective_recompute import EXPENSIVE_COLUMNS
from surgery.model.ffn import Ffn, is_conv1d
from surgery.model.meta_model import MetaModel

CORRELATION_TOKENS = 2048  # tokens with stored u * dL/du, for the halo's redundancy; as in the paper's code
SAVED_CHANNELS = 4  # values autograd saves per channel and token: gate, its activation, up, their product
SAVED_HIDDEN = 6  # and per hidden dimension: norms and sums
SAVED_ROWS = 2  # and per row of any other matrix of the layer: queries, keys, values, their transforms
ROUTING = 256  # bytes per token and expert: float32 scores, and indices
HEAD_COPIES = 4  # logits, their float32 copy, their gradient, softmax
COMPARED_COPIES = 5  # float32 copies of the logits while the predictions of two models are compared
DENSE_MATRICES = 16  # F x F in double precision at the peak of second-order scores


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model, in bytes unless a comment names another unit."""

    layers: int  # number of decoder layers
    hidden: int  # hidden_size D
    layer: int  # the largest layer, in the compute dtype and as stored where that differs, and reading it
    merged: int  # stored tensors of a layer that transformers merges into others (experts stored one by one)
    merging: int  # stored tensors of one merged parameter, with a copy for every merging step but the last
    layers_stored: int  # all layers, as stored
    other_stored: int  # embeddings, final norm, head, as stored
    other_resident: int  # the same in the compute dtype
    head: int  # weights of the output head
    active: float  # weights that a token is multiplied with, in all layers
    attention: float  # multiplications per token for queries x keys and scores x values, in all layers
    saved_token: int  # bytes that autograd saves per token, in the largest layer
    kept_token: int  # bytes per token that the activation cache may hold, in the largest layer
    again: float  # multiplications per token, in all layers, that are recomputed even with the cache
    widest: int  # channels of the largest FFN
    channels: int  # channels of all FFNs of the largest layer
    met: int  # of these, channels that one token activates
    matrix: int  # weights of the largest matrix
    block_size: int  # tokens of a block

    @classmethod
    def of(cls, meta_model: MetaModel, dtype: torch.dtype, block_size: int, device: str = "cpu") -> ModelSize:
        """Sizes of a model computed in `dtype` on blocks of `block_size` tokens, on a device type."""
        config = meta_model.config.get_text_config()
        hidden = int(config.hidden_size)
        tensors = meta_model.checkpoint.tensors
        stored = [
            [tensors[n] for p in stored_parameters for n in p.stored]
            for stored_parameters in meta_model.layer_parameters
        ]
        other = [tensors[n] for p in meta_model.other_parameters for n in p.stored]
        numbers = [sum(entry.numel for entry in layer) for layer in stored]
        cast = any(entry.dtype != dtype for layer in stored for entry in layer)
        copies = [
            sum(e.nbytes for e in layer) * cast + n * dtype.itemsize
            for layer, n in zip(stored, numbers, strict=True)
        ]
        heads = int(getattr(config, "num_attention_heads", 0) or 0)
        eager = getattr(config, "_attn_implementation", None) == "eager"
        active_channels = [_active_channels(ffns, config) for ffns in meta_model.ffns]
        unused = [_unused(ffns, config, hidden) for ffns in meta_model.ffns]
        products = [
            _products(*pair, config, hidden) for pair in zip(meta_model.layers, meta_model.ffns, strict=True)
        ]
        rows = max(sum(max(p.columns, p.outputs) for p in layer if not p.ffn) for layer in products)
        saved = SAVED_CHANNELS * max(active_channels) + SAVED_HIDDEN * hidden + SAVED_ROWS * rows
        experts = max(sum(ffn.stacked for ffn in ffns) for ffns in meta_model.ffns)
        saved += 3 * heads * block_size * eager
        expensive = EXPENSIVE_COLUMNS.get(device, 0)
        cached = max(sum(p.outputs for p in layer if p.columns >= expensive) for layer in products)
        keys, values = (getattr(config, name, 0) or 0 for name in ("qk_head_dim", "v_head_dim"))
        head_dim = max(int(getattr(config, "head_dim", 0) or hidden // max(1, heads)), keys, values)
        fused = not eager and keys == values
        scores = 0 if fused else 4 * heads * block_size * (head_dim >= expensive)
        cached += heads * head_dim if fused else max(hidden, heads * head_dim) * (block_size >= expensive)
        attention = float(len(stored) * block_size * max(hidden, heads * head_dim) * (1 if fused else 2))
        cheap = [p for layer in products for p in layer if p.columns < expensive]
        return cls(
            layers=len(stored),
            hidden=hidden,
            layer=max(copies) + meta_model.checkpoint.reading_bytes,
            merged=max(
                sum(tensors[n].nbytes for p in layer if p.converter is not None for n in p.stored)
                for layer in meta_model.layer_parameters
            ),
            merging=max(
                (
                    sum(tensors[n].nbytes for n in p.stored) * len(p.converter.operations)
                    for layer in meta_model.layer_parameters
                    for p in layer
                    if p.converter is not None
                ),
                default=0,
            ),
            layers_stored=sum(entry.nbytes for layer in stored for entry in layer),
            other_stored=sum(entry.nbytes for entry in other),
            other_resident=sum(entry.numel for entry in other) * dtype.itemsize,
            head=hidden * int(config.vocab_size),
            active=sum(numbers) - sum(unused),
            attention=attention,
            saved_token=saved * dtype.itemsize + ROUTING * experts,
            kept_token=cached * dtype.itemsize
            + scores
            + 4 * (heads * fused + experts * (hidden >= expensive)),
            again=sum(p.columns * p.outputs for p in cheap) + attention * (not scores and not fused),
            widest=max((ffn.width for ffns in meta_model.ffns for ffn in ffns), default=0),
            channels=max(sum(ffn.width for ffn in ffns) for ffns in meta_model.ffns),
            met=max(active_channels),
            matrix=max((e.numel for layer in stored for e in layer), default=0),
            block_size=block_size,
        )

    def resident_bytes(self, blocks: int, second_order: bool, merging: bool = True) -> int:
        """Bytes needed with any micro-batch of a pass over `blocks` blocks.

        The larger of embeddings, final norm and head with logits, and of two layers with their statistics;
        `second_order` adds the matrices of second-order scores, `merging` the merging of stored experts.
        """
        outer = self.other_resident + HEAD_COPIES * 4 * HEAD_ELEMENTS
        sampled = self.met * min(blocks * self.block_size, CORRELATION_TOKENS + blocks)
        sums = 4 * (8 * blocks * self.channels + 3 * sampled)  # five, and copies while some are kept by block
        squares = DENSE_MATRICES * 8 * self.widest**2 if second_order else 0
        return max(outer, 2 * self.layer + self.merging * merging + sums + 8 * self.matrix + squares)

    def compared_bytes(self, tokens: int) -> int:
        """Bytes for comparing predictions of two models on a block of `tokens` tokens, in head slices."""
        return COMPARED_COPIES * 4 * min(HEAD_ELEMENTS, tokens * (self.head // self.hidden))

    def micro_batch_bytes(self, blocks: int) -> int:
        """Bytes of `blocks` blocks in a layer: saved activations, and as much for their gradients."""
        tokens = blocks * self.block_size
        return 2 * self.saved_token * tokens + 4 * 4 * self.block_size * self.widest


@dataclass(frozen=True)
class _Product:
    """A matrix [outputs, columns] that a token is multiplied with; `ffn`: whether it belongs to an FFN."""

    columns: int
    outputs: int
    ffn: bool


def _products(layer: nn.Module, ffns: list[Ffn], config: Any, hidden: int) -> list[_Product]:
    """All matrices of a layer that a token is multiplied with, including the experts it is routed to."""
    ffn_parameters = {part.parameter for ffn in ffns for part in (*ffn.in_slices(), ffn.down_slice())}
    found = []
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 2 and name not in ffn_parameters:
            linear = layer.get_submodule(name.rpartition(".")[0])
            columns, outputs = parameter.shape if is_conv1d(linear) else reversed(parameter.shape)
            found.append(_Product(columns, outputs, ffn=False))
    for ffn in ffns:
        if ffn.expert:
            continue  # the first expert accounts for all
        active = routed_experts(ffns, config) if ffn.stacked else 1
        gated = ffn.in_weights()[0] is not None
        found.append(_Product(hidden, active * ffn.width * (1 + gated), ffn=True))
        found.append(_Product(ffn.width, active * hidden, ffn=True))
    return found


def _active_channels(ffns: list[Ffn], config: Any) -> int:
    """FFN channels of a layer that one token activates."""
    return round(sum(ffn.width * token_share(ffn, ffns, config) for ffn in ffns))


def _unused(ffns: list[Ffn], config: Any, hidden: int) -> float:
    """Weights of a layer's experts that one token is not routed to, roughly."""
    return sum(3 * hidden * ffn.width * (1 - token_share(ffn, ffns, config)) for ffn in ffns)


def token_share(ffn: Ffn, ffns: list[Ffn], config: Any) -> float:
    """Share of the tokens that an FFN of a layer gets, in (0, 1], assuming uniform routing."""
    return routed_experts(ffns, config) / sum(other.stacked for other in ffns) if ffn.stacked else 1.0


def routed_experts(ffns: list[Ffn], config: Any) -> int:
    """Number of a layer's experts that one token is routed to."""
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k")
    experts = sum(ffn.stacked for ffn in ffns)
    chosen = next((k for name in names if isinstance(k := getattr(config, name, None), int)), experts)
    return min(experts, chosen)
