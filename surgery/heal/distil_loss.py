"""The loss of a heal: divergence from the teacher's next-token distribution, and its gradient.

The teacher's distribution p is given by its k largest probabilities and the mass p' of all other tokens,
which count as one. With the student's distribution q, both at temperature T, a token's loss is

    T² · (1 - c) · ( Σ_i p_i ln(p_i / q_i) + p' ln(p' / q') ) + c · (-ln q¹_next)

in nats: at most KL(p || q) of the whole distributions, and 0 where they are equal. c is the share of plain
cross-entropy with the token that follows, for which q¹ is at temperature 1. The gradient by the logits z, of
which the head's backward pass starts, is

    dL/dz_i = T (1 - c) (q_i - p_i)  for the k,   T (1 - c) q_j (1 - p'/q')  for the rest,   + c (q¹ - [next])

Shape letters: N blocks, T tokens of a block, D hidden_size, V vocabulary, n tokens of a slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.engine.loss import head_slices
from surgery.engine.token_stream import TokenStream

TINY = 1e-30  # keeps the logarithm of a mass of 0 finite


@dataclass(frozen=True)
class DistilLoss:
    """`temperature` T of both distributions; `cross_entropy` c, the share of plain cross-entropy."""

    temperature: float = 1.0
    cross_entropy: float = 0.0


@dataclass(frozen=True)
class TopTokens:
    """The teacher's k most likely next tokens of n positions: `ids` [n, k], and `log_p` [n, k] in nats."""

    ids: torch.Tensor
    log_p: torch.Tensor

    @property
    def rest(self) -> torch.Tensor:
        """Mass [n] of all other tokens."""
        return (1 - self.log_p.exp().sum(-1)).clamp_min(0)


def top_tokens(logits: torch.Tensor, count: int, temperature: float = 1.0) -> TopTokens:
    """The `count` most likely tokens of float32 logits [n, V] at a temperature; float16 digits of ln p."""
    scaled = logits / temperature
    found, ids = scaled.topk(min(count, logits.shape[-1]), dim=-1)
    log_p = found - scaled.logsumexp(-1, keepdim=True)
    return TopTokens(ids, log_p.half().float())


def token_losses(
    logits: torch.Tensor, teacher: TopTokens, following: torch.Tensor, loss: DistilLoss
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Loss [n] of each token in nats, its gradient [n, V] by the logits) of float32 student logits [n, V].

    `following` [n] are the ids of the tokens that come next.
    """
    temperature, share = loss.temperature, loss.cross_entropy
    log_q = torch.log_softmax(logits / temperature, -1)
    log_q_top = log_q.gather(-1, teacher.ids)
    gradient = log_q.exp()
    p_top, p_rest = teacher.log_p.exp(), teacher.rest
    gradient.scatter_(-1, teacher.ids, 0.0)
    q_rest = gradient.sum(-1).clamp_min(TINY)
    nats = (p_top * (teacher.log_p - log_q_top)).sum(-1)
    nats += p_rest * (p_rest.clamp_min(TINY).log() - q_rest.log())
    gradient *= (1 - p_rest / q_rest)[:, None]
    gradient.scatter_(-1, teacher.ids, log_q_top.exp() - p_top)
    if share == 0:
        return temperature**2 * nats, gradient.mul_(temperature)
    log_q1 = log_q if temperature == 1 else torch.log_softmax(logits, -1)
    plain = log_q1.exp()
    rows = torch.arange(len(following), device=logits.device)
    plain[rows, following] -= 1
    nats = temperature**2 * (1 - share) * nats - share * log_q1[rows, following]
    return nats, gradient.mul_(temperature * (1 - share)).add_(plain, alpha=share)


def distil(stream: TokenStream, targets: TopTokens, loss: DistilLoss, tokens: int | None = None) -> float:
    """Mean loss of all predicted tokens of a stream that has left the last layer; its gradient is stored.

    `targets` hold [N, T - 1, k]: the last token of a block has no target. dL/d(last hidden state) becomes the
    gradient that a backward pass starts from, where L is the mean. `tokens` is what sums are divided by where
    these blocks are a part of a batch: L is then their part of the batch's mean.
    """
    model = stream.model
    blocks, size = stream.ids.shape
    tokens = blocks * (size - 1) if tokens is None else tokens
    total = torch.zeros((), dtype=torch.float64)
    with model.other_weights():
        for block in range(blocks):
            part = slice(block, block + 1)
            hidden = stream.last_hidden(part)[0]
            gradient = torch.zeros_like(hidden)
            following = stream.ids[block, 1:].to(model.device)
            ids = targets.ids[block].to(model.device, torch.long)
            log_p = targets.log_p[block].to(model.device, torch.float32)
            for rows in head_slices(model, size - 1):
                states = hidden[rows].detach().requires_grad_(True)
                with torch.enable_grad():
                    logits = model.logits(states)
                with torch.no_grad():
                    teacher = TopTokens(ids[rows], log_p[rows])
                    nats, found = token_losses(logits.float(), teacher, following[rows], loss)
                    found = (found / tokens).to(logits.dtype)
                (gradient[rows],) = torch.autograd.grad(logits, states, found)
                total += nats.double().sum().cpu()
            stream.put_last_gradient(part, gradient[None])
            model.malloc.trim()
    return float(total) / tokens
