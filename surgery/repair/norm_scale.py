"""The final norm's scale: one number, by which a repaired model's logits are made smaller or larger.

A model that lost channels is wrong more often, and as sure of itself as before. Least squares on the residual
stream can't change that, since the final norm takes away the stream's length. The scale c is the one with the
least mean KL(dense || pruned with logits of c times the norm's output), over calibration tokens: the blocks
that are held out while ridges are chosen, and that the last solve of each matrix uses. So the KL is less than
on other text, the more so the fewer the calibration blocks, and c a little nearer to 1.

Scaling all logits by one number chosen on held-out data is temperature scaling (Guo et al., 2017,
arXiv:1706.04599), there by the labels, here by the dense model.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional

from surgery.budget.repair_cost import NORM_SCALES, NORM_SLICE, NORM_TOKENS
from surgery.engine import distributed
from surgery.engine.final_norm import FinalNorm
from surgery.engine.token_stream import TokenStream
from surgery.repair.dense_reference import DenseReference

LEAST_GAIN = 1e-4  # nats a token; less is rounding
PROBED = 2  # hidden states that the norm is found with


@dataclass(frozen=True)
class NormScale:
    """A `scale` of the final norm's output, and the mean KL(dense || pruned) in nats a token on `tokens`
    calibration tokens, `before` and `after`; the repair's last solves used these tokens.
    """

    scale: float
    before: float
    after: float
    tokens: int

    def as_json(self) -> dict[str, Any]:
        """The entry `final_norm` of surgeon.json."""
        return asdict(self)


@dataclass(frozen=True)
class ScaledNorm:
    """A model's final norm `norm`, and the scale `fitted` for it."""

    norm: FinalNorm
    fitted: NormScale

    def applied(self) -> AbstractContextManager[None]:
        """Within the block the model's logits are those with the scale; use it within `other_weights`."""
        return self.norm.scaled(self.fitted.scale)

    def tensor(self, stored: str, tensor: torch.Tensor) -> torch.Tensor:
        """A stored tensor as the scale has it, in its dtype; one that is not of the norm is unchanged."""
        return self.norm.tensor(stored, tensor, self.fitted.scale) if stored in self.norm.stored else tensor


def fit_norm_scale(norm: FinalNorm, dense: DenseReference, pruned: TokenStream) -> ScaledNorm | None:
    """The final norm, scaled for a pruned stream that has left the last layer beside the dense one.

    The first held-out blocks, of NORM_TOKENS tokens at most, choose among NORM_SCALES, and the vertex of the
    parabola through the best and its neighbours is taken; None where that gains less than LEAST_GAIN. Where
    the reference is shared, every process calls it, and all return the same. Call it within `other_weights`.
    """
    means, tokens = _divergences(norm, dense, pruned, NORM_SCALES)
    before, scale = means[NORM_SCALES.index(1.0)], least(means)
    (after,), _ = _divergences(norm, dense, pruned, (scale,))
    if before - after <= LEAST_GAIN:
        return None
    return ScaledNorm(norm, NormScale(scale, before, after, tokens))


@torch.no_grad()
def _divergences(
    norm: FinalNorm, dense: DenseReference, pruned: TokenStream, scales: tuple[float, ...]
) -> tuple[list[float], int]:
    """Mean KL(dense || pruned) in nats a token for each of `scales`, and the number of tokens."""
    stream, model = dense.stream, dense.model
    blocks = max(1, min(dense.held_out_tokens, NORM_TOKENS) // stream.ids.shape[1])
    own = range(max(0, dense.first_held), min(len(stream.ids), dense.first_held + blocks))
    sums = torch.zeros(len(scales) + 1, dtype=torch.float64, device=model.device)
    for block in own:
        exact, found = (one.last_hidden(slice(block, block + 1))[0] for one in (stream, pruned))
        for few, those in zip(exact.split(NORM_SLICE), found.split(NORM_SLICE), strict=True):
            log_p = functional.log_softmax(model.logits(few).float(), -1)
            for place, scale in enumerate(scales):
                with norm.scaled(scale):
                    log_q = functional.log_softmax(model.logits(those).float(), -1)
                sums[place] += functional.kl_div(log_q, log_p, reduction="sum", log_target=True).double()
        sums[-1] += len(exact)
        model.malloc.trim()
    *divergences, tokens = (distributed.all_reduce_sum(sums) if dense.shared else sums).tolist()
    return [divergence / tokens for divergence in divergences], int(tokens)


def least(means: list[float]) -> float:
    """The scale of the least KL, given that of each of NORM_SCALES: between two, the parabola says where."""
    best = min(range(len(NORM_SCALES)), key=means.__getitem__)
    if not 0 < best < len(NORM_SCALES) - 1:
        return NORM_SCALES[best]
    left, middle, right = means[best - 1 : best + 2]
    bend = left - 2 * middle + right
    shift = 0.5 * (left - right) / bend if bend > 0 else 0.0  # of the places, in [-0.5, 0.5]
    return round(NORM_SCALES[best] + shift * (NORM_SCALES[best + 1] - NORM_SCALES[best]), 4)
