"""How far cut models are from the dense one on the same tokens: loss and KL divergence, through the head in slices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from surgery.stream import StreamedModel
from surgery.tokens import TokenStream, head_slices


@dataclass(frozen=True)
class Measured:
    """Summed over `tokens` predicted tokens: cross-entropy in `nats`, and KL(dense || this) in nats."""

    nats: float
    divergence: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens), at most e^700, which a destroyed model can exceed."""
        return math.exp(min(700.0, self.nats / self.tokens))

    @property
    def kl(self) -> float:
        """Mean KL(dense || this) in nats a token."""
        return self.divergence / self.tokens


@torch.no_grad()
def measure(model: StreamedModel, dense: TokenStream, streams: list[TokenStream]) -> list[Measured]:
    """Loss and divergence of streams that left the last layer, whose blocks are the first of `dense`'s."""
    sums = torch.zeros(2, len(streams), dtype=torch.float64, device="cpu")
    tokens = [0] * len(streams)
    with model.outside():
        for block in range(max((len(stream.ids) for stream in streams), default=0)):
            part = slice(block, block + 1)
            before = dense.store.get(0, part, model.device)[0]
            targets = dense.ids[block, 1:].to(model.device)
            mine = [
                (i, s.store.get(0, part, model.device)[0])
                for i, s in enumerate(streams)
                if block < len(s.ids)
            ]
            for rows in head_slices(model, len(targets)):
                theirs = functional.log_softmax(model.logits(before[rows]).float(), -1)
                shares = theirs.exp()
                for place, hidden in mine:
                    ours = functional.log_softmax(model.logits(hidden[rows]).float(), -1)
                    sums[0, place] += functional.nll_loss(ours, targets[rows], reduction="sum").double().cpu()
                    sums[1, place] += (shares * (theirs - ours)).sum().double().cpu()
            for place, _ in mine:
                tokens[place] += len(targets)
            model.heap.settle()
    return [
        Measured(nats, divergence, count)
        for (nats, divergence), count in zip(sums.T.tolist(), tokens, strict=True)
    ]
