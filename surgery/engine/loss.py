"""Next-token loss and KL divergence from the dense model, with the output head applied to slices of tokens.

The logits of a whole block, [T, V], are never materialised. Shape letters: N blocks, T tokens of a block,
D hidden_size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch.nn import functional

from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream

HEAD_ELEMENTS = 1 << 23  # logits materialised at a time: tokens x vocabulary


def head_slices(model: StreamedModel, tokens: int) -> Iterator[slice]:
    """Slices of `tokens` whose logits have at most HEAD_ELEMENTS elements each (one token at least)."""
    step = max(1, HEAD_ELEMENTS // model.model.config.get_text_config().vocab_size)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def next_token_loss(stream: TokenStream, with_gradient: bool = False) -> torch.Tensor:
    """Next-token cross-entropy in nats, summed over each block, [N] float64, from the last layer's output.

    The last token of a block has no target. With `with_gradient`, dL/d(last hidden state) is stored as the
    gradient that `TokenStream.backward` starts from, where L is the sum over all blocks.
    """
    nats = []
    with stream.model.other_weights():
        for block in range(len(stream.ids)):
            nats.append(_block_loss(stream, block, with_gradient))
            stream.model.malloc.trim()
    return torch.stack(nats).cpu()


def _block_loss(stream: TokenStream, block: int, with_gradient: bool) -> torch.Tensor:
    """Summed cross-entropy in nats of one block, a float64 scalar."""
    model, part = stream.model, slice(block, block + 1)
    hidden = stream.last_hidden(part)[0]
    gradient = torch.zeros_like(hidden)
    targets = stream.ids[block, 1:].to(model.device)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for rows in head_slices(model, len(targets)):
        states = hidden[rows].detach().requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            logits = model.logits(states).float()
            piece = functional.cross_entropy(logits, targets[rows], reduction="sum")
        if with_gradient:
            (gradient[rows],) = torch.autograd.grad(piece, states)
        total += piece.detach().double()
    if with_gradient:
        stream.put_last_gradient(part, gradient[None])
    return total


@dataclass(frozen=True)
class LossAndDivergence:
    """Sums in nats over `tokens` predicted tokens: cross-entropy `nats`, KL(dense || this) `divergence`.

    `block_nats` is the cross-entropy of each block.
    """

    nats: float
    divergence: float
    tokens: int
    block_nats: tuple[float, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens), capped at e^700: a heavily damaged model would overflow float64."""
        return math.exp(min(700.0, self.nats / self.tokens))

    @property
    def kl(self) -> float:
        """Mean KL(dense || this) in nats per token."""
        return self.divergence / self.tokens


@torch.no_grad()
def measure_divergence(
    model: StreamedModel,
    dense: TokenStream,
    streams: list[TokenStream],
    scaled: Mapping[TokenStream, Callable[[], AbstractContextManager[None]]] = MappingProxyType({}),
) -> list[LossAndDivergence]:
    """Loss and KL divergence of each of `streams` from `dense`.

    All streams hold the last layer's output. The blocks of each are the first blocks of `dense`. A stream
    that is listed several times is measured once. Logits of a stream are computed within its context of
    `scaled`, where it has one (`FinalNorm.scaled`).
    """
    listed, streams = streams, list(dict.fromkeys(streams))
    blocks = max((len(stream.ids) for stream in streams), default=0)
    sums = torch.zeros(2, len(streams), blocks, dtype=torch.float64, device="cpu")
    tokens = [0] * len(streams)
    with model.other_weights():
        for block in range(blocks):
            part = slice(block, block + 1)
            dense_hidden = dense.store.get(0, part, model.device)[0]
            targets = dense.ids[block, 1:].to(model.device)
            compared = [
                (i, s.store.get(0, part, model.device)[0])
                for i, s in enumerate(streams)
                if block < len(s.ids)
            ]
            for rows in head_slices(model, len(targets)):
                dense_log_p = functional.log_softmax(model.logits(dense_hidden[rows]).float(), -1)
                dense_p = dense_log_p.exp()
                for i, hidden in compared:
                    with scaled.get(streams[i], nullcontext)():
                        log_p = functional.log_softmax(model.logits(hidden[rows]).float(), -1)
                    sums[0, i, block] += (
                        functional.nll_loss(log_p, targets[rows], reduction="sum").double().cpu()
                    )
                    sums[1, i, block] += (dense_p * (dense_log_p - log_p)).sum().double().cpu()
            for i, _ in compared:
                tokens[i] += len(targets)
            model.malloc.trim()
    totals = sums.sum(2).tolist()
    measured = {
        stream: LossAndDivergence(totals[0][i], totals[1][i], tokens[i], tuple(sums[0, i].tolist()))
        for i, stream in enumerate(streams)
    }
    return [measured[stream] for stream in listed]
