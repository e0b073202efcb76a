"""Bootstrap intervals over blocks of text: how far a figure moves when the blocks are drawn again.

A statistic is a function of weights w [m, n] of n blocks that returns m values: a weight says how often a
block counts. One call so evaluates many resamples, and no block's data is copied. A statistic does not change
when all weights are multiplied by a number (means, ratios of means, and what follows from them).

Blocks are taken as independent draws. Blocks that follow each other in one long document are not quite that,
and intervals of such a text are somewhat too narrow.

LP of blocks is skewed, and percentile intervals of it hold too rarely. `studentized` adds the bootstrap-t
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993), with the standard error of each resample from
the gradient of the statistic, the infinitesimal jackknife. `overlap_of_sets` is for overlaps, which have no
gradient. No bootstrap sees tails that the blocks do not show: where a few blocks in a thousand outweigh all
others, intervals from 64 blocks hold less often than they say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

LEVEL = 0.95
REPLICATES = 1999  # one less than a multiple of 40, so that 2.5% of them end at a replicate
SEED = 42
LEAST_BLOCKS = 8  # fewer say next to nothing about their own spread
CHUNK = 250  # replicates evaluated at a time

Statistic = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval at confidence `level`, from resampling `blocks` blocks of text.

    `low` and `high` are in the unit of the estimate. A biased estimate may lie outside of them.
    """

    estimate: float
    low: float
    high: float
    blocks: int
    level: float = LEVEL

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside the interval."""
        return not self.low <= value <= self.high

    def differs_from(self, other: Interval) -> bool:
        """Whether the two intervals part, that is, have no value in common.

        This asks for more than a test of the difference at the same level, so that of many layers few are
        named by chance.
        """
        return self.low > other.high or other.low > self.high

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Interval:
        """Inverse of `dataclasses.asdict`."""
        return cls(**fields)

    @property
    def bounds(self) -> list[float]:
        """[low, high], as JSON files hold it."""
        return [self.low, self.high]

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"


def studentized(
    statistic: Statistic,
    blocks: int,
    *,
    within: tuple[float, float] = (-math.inf, math.inf),
    level: float = LEVEL,
    replicates: int = REPLICATES,
    seed: int = SEED,
) -> Interval:
    """Interval of a statistic θ of blocks, differentiable almost everywhere in the weights.

    se² = Σ_b w_b (∂θ/∂w_b)². With t* = (θ* − θ) / se* over resamples, the bootstrap-t interval is
    [θ − t*_high se, θ − t*_low se]. The interval spans this and the percentile interval [θ*_low, θ*_high],
    and is cut off at `within`. Without any spread it is the estimate alone.
    """
    centre, error = _with_error(statistic, torch.ones(1, blocks, dtype=torch.float64))
    estimate, width = float(centre), float(error)
    if width == 0:
        return Interval(estimate, estimate, estimate, blocks, level)
    values, errors = _with_error(statistic, resampled(blocks, replicates, seed))
    t = ((values - centre) / errors).nan_to_num(nan=0.0)  # a resample of one block only is its own centre
    least, most = _tails(values, level)
    low, high = _tails(t, level)
    low, high = min(estimate - high * width, least), max(estimate - low * width, most)
    return Interval(estimate, max(low, within[0]), min(high, within[1]), blocks, level)


def overlap_of_sets(estimate: float, values: torch.Tensor, blocks: int, level: float = LEVEL) -> Interval:
    """Interval of an overlap θ of two sets that are chosen from the blocks, in [0, 1].

    `values` [m] are θ* of resamples. Choosing from a sample lowers an overlap, and choosing from a resample
    lowers it again, by less: the percentile interval lies too low, and the basic interval, its mirror image,
    still somewhat. The interval spans both: [min(θ*_low, 2θ − θ*_high), max(θ*_high, 2θ − θ*_low)].
    """
    low, high = _tails(values.double(), level)
    ends = [min(low, 2 * estimate - high), max(high, 2 * estimate - low)]
    return Interval(estimate, max(0.0, ends[0]), min(1.0, ends[1]), blocks, level)


def paired_ratio(first: torch.Tensor, second: torch.Tensor, tokens: int) -> Interval:
    """Interval of exp((Σ second − Σ first) / all tokens): the ratio of two perplexities on the same blocks.

    `first` and `second` [n] are summed nats of each block, `tokens` those that are predicted in each block. A
    block counts equally often for both models, so what makes a block hard for both cancels.
    """
    change = (second.double() - first.double()) / tokens
    mean = studentized(lambda weights: (weights @ change) / weights.sum(1), len(change))
    low, middle, high = (math.exp(min(700.0, x)) for x in (mean.low, mean.estimate, mean.high))
    return Interval(middle, low, high, len(change))


def resampled(blocks: int, replicates: int = REPLICATES, seed: int = SEED) -> torch.Tensor:
    """Weights [replicates, blocks] float64 of samples drawn with replacement."""
    drawn = torch.randint(blocks, (replicates, blocks), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(replicates, blocks, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(weights))


def _with_error(statistic: Statistic, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The statistic and its standard error by the infinitesimal jackknife, [m] each."""
    values, errors = [], []
    for part in weights.split(CHUNK):
        leaf = part.clone().requires_grad_()
        with torch.enable_grad():
            found = statistic(leaf)
            (gradient,) = torch.autograd.grad(found.sum(), leaf)
        values.append(found.detach())
        errors.append((part * gradient.square()).sum(1).sqrt())
    return torch.cat(values), torch.cat(errors)


def _tails(values: torch.Tensor, level: float) -> tuple[float, float]:
    """The order statistics of values [m] that leave (1 − level) / 2 on either side."""
    ordered = values.sort().values
    outside = max(1, round((1 - level) / 2 * (len(ordered) + 1)))
    return float(ordered[outside - 1]), float(ordered[-outside])
