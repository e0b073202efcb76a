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

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss depends on the teacher's predictions."""
        return self.cross_entropy < 1


@dataclass(frozen=True)
class TopTokens:
    """The teacher's k most likely next tokens of n positions: `ids` [n, k], and `log_p` [n, k] in nats."""

    ids: torch.Tensor
    log_p: torch.Tensor

    @classmethod
    def none(cls, *shape: int) -> TopTokens:
        """No tokens at positions of this shape, for a loss that needs no teacher."""
        return cls(torch.empty((*shape, 0), dtype=torch.int32), torch.empty((*shape, 0), dtype=torch.half))

    @property
    def rest(self) -> torch.Tensor:
        """Mass [n] of all other tokens."""
        return (1 - self.log_p.exp().sum(-1)).clamp_min(0)


def top_tokens(logits: torch.Tensor, count: int, temperature: float = 1.0) -> TopTokens:
    """The `count` most likely tokens of float32 logits [n, V] at a temperature; float16 digits of ln p."""
    scaled = _tempered(logits, temperature)
    found, ids = scaled.topk(min(count, logits.shape[-1]), dim=-1)
    log_p = found - scaled.logsumexp(-1, keepdim=True)
    return TopTokens(ids, log_p.half().float())


def token_losses(
    logits: torch.Tensor, teacher: TopTokens, following: torch.Tensor, loss: DistilLoss
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Loss [n] of each token in nats, its gradient [n, V] by the logits) of float32 student logits [n, V].

    `following` [n] are the ids of the tokens that come next. With c = 1 the teacher is not looked at.
    """
    temperature, share = loss.temperature, loss.cross_entropy
    if not loss.needs_teacher:
        return _cross_entropy(torch.log_softmax(logits, -1), following)
    log_q = torch.log_softmax(_tempered(logits, temperature), -1)
    log_q_top = log_q.gather(-1, teacher.ids)
    cross = None
    if share:
        log_q1 = log_q.clone() if temperature == 1 else torch.log_softmax(logits, -1)
        cross = _cross_entropy(log_q1, following)
    q = log_q.exp_()  # in place: whole logits are the largest tensors here
    p_top, p_rest = teacher.log_p.exp(), teacher.rest
    q.scatter_(-1, teacher.ids, 0.0)
    q_rest = q.sum(-1).clamp_min(TINY)
    nats = (p_top * (teacher.log_p - log_q_top)).sum(-1)
    nats += p_rest * (p_rest.clamp_min(TINY).log() - q_rest.log())
    nats = temperature**2 * (1 - share) * nats
    weight = temperature * (1 - share)
    gradient = q.mul_((1 - p_rest / q_rest)[:, None])
    gradient.scatter_(-1, teacher.ids, log_q_top.exp() - p_top)
    if weight != 1:
        gradient.mul_(weight)
    if cross is None:
        return nats, gradient
    return nats + share * cross[0], gradient.add_(cross[1], alpha=share)


def _cross_entropy(log_q: torch.Tensor, following: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-ln q of the tokens that follow, [n], and its gradient [n, V] by the logits; `log_q` is overwritten."""
    places = following[:, None]
    nats = -log_q.gather(-1, places)[:, 0]
    gradient = log_q.exp_()
    gradient.scatter_add_(-1, places, torch.full_like(nats, -1.0)[:, None])
    return nats, gradient


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """logits / temperature, without a copy where that is 1."""
    return logits if temperature == 1 else logits / temperature


def counted_tokens(counted: torch.Tensor) -> int:
    """Tokens that are predicted and count, of blocks whose `counted` [N, T] tokens are given."""
    return int(counted[:, 1:].sum())


def distil(
    stream: TokenStream,
    targets: TopTokens,
    loss: DistilLoss,
    counted: torch.Tensor | None = None,
    tokens: int | None = None,
) -> float:
    """Mean loss of the counted tokens of a stream that has left the last layer; its gradient is stored.

    `targets` hold [N, T - 1, k]: the last token of a block has no target. Position t has a loss where token
    t + 1 is `counted` [N, T], all by default. The mean L is the sum divided by `tokens`, by default the
    stream's own `counted_tokens`; where blocks are a share of a batch, those of the whole batch. dL/d(last
    hidden state) becomes the gradient that a backward pass starts from. Both are 0 where no token counts.
    """
    model = stream.model
    blocks = len(stream.ids)
    if counted is None:
        counted = torch.ones(stream.ids.shape, dtype=torch.bool)
    tokens = counted_tokens(counted) if tokens is None else tokens
    total = torch.zeros((), dtype=torch.float64)
    with model.other_weights():
        for block in range(blocks):
            part = slice(block, block + 1)
            hidden = stream.last_hidden(part)[0]
            gradient = torch.zeros_like(hidden)
            following = stream.ids[block, 1:].to(model.device)
            ids = targets.ids[block].to(model.device, torch.long)
            log_p = targets.log_p[block].to(model.device, torch.float32)
            places = counted[block, 1:].nonzero()[:, 0].to(model.device)
            for some in head_slices(model, len(places)):
                rows = places[some]
                states = hidden[rows].detach().requires_grad_(True)
                with torch.enable_grad():
                    logits = model.logits(states)
                with torch.no_grad():
                    teacher = TopTokens(ids[rows], log_p[rows])
                    nats, found = token_losses(logits.float(), teacher, following[rows], loss)
                    found = found.div_(tokens).to(logits.dtype)
                (gradient[rows],) = torch.autograd.grad(logits, states, found)
                total += nats.double().sum().cpu()
            stream.put_last_gradient(part, gradient[None])
            model.malloc.trim()
    return float(total) / max(1, tokens)
