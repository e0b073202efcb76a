"""Interval of the mean of a few paired differences, by resampling the pairs.

A block of text gives one pair: its loss in the original model and in a changed one. Pairs of one text are
compared, so what makes a text easy or hard for both cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch

LEVEL = 0.95  # of the interval
RESAMPLES = 4000
DRAWN_TOGETHER = 1 << 13  # pairs drawn at a time, so that many blocks take little memory


@dataclass(frozen=True)
class Interval:
    """`mean` of paired differences, and the interval [low, high] that holds their true mean.

    With one pair only there is no interval: `low` is minus and `high` plus infinity.
    """

    mean: float
    low: float
    high: float

    def as_json(self) -> list[float | None]:
        """[low, high]; null for infinity, which JSON does not have."""
        return [bound if math.isfinite(bound) else None for bound in (self.low, self.high)]

    @classmethod
    def from_json(cls, mean: float, bounds: list[float | None]) -> Interval:
        """Inverse of `as_json`, with the mean beside it."""
        low, high = bounds
        return cls(mean, -math.inf if low is None else low, math.inf if high is None else high)


def paired_interval(differences: torch.Tensor, seed: int = 0) -> Interval:
    """Expanded percentile bootstrap interval of the mean of `differences` [N], at LEVEL.

    The plain percentile interval of N pairs is too narrow by sqrt((N - 1) / N), and takes the normal
    distribution where Student's t belongs. The expanded one takes percentiles at
    Phi(-sqrt(N / (N - 1)) * t), with t the quantile of Student's t with N - 1 degrees of freedom (Hesterberg,
    What Teachers Should Know About the Bootstrap, 2015). The seed fixes the resamples.
    """
    values = differences.double()
    count, mean = len(values), float(values.mean())
    if count < 2:
        return Interval(mean, -math.inf, math.inf)
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * student_quantile((1 + LEVEL) / 2, count - 1))
    generator = torch.Generator().manual_seed(seed)
    step = max(1, DRAWN_TOGETHER // count)
    means = torch.cat(
        [
            values[torch.randint(count, (min(step, RESAMPLES - start), count), generator=generator)].mean(1)
            for start in range(0, RESAMPLES, step)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(mean, low, high)


def student_quantile(p: float, degrees: int) -> float:
    """Quantile of Student's t at p in (0.5, 1), by bisection of its distribution function."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, degrees) < p else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, degrees: int) -> float:
    """Distribution function of Student's t at t >= 0: 1/2 plus a finite sum over powers of cos(theta).

    theta = atan(t / sqrt(degrees)) (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    theta = math.atan(t / math.sqrt(degrees))
    if degrees % 2:
        term, total = math.cos(theta), 0.0
        for k in range(1, degrees - 1, 2):
            total += term
            term *= (k + 1) / (k + 2) * math.cos(theta) ** 2
        area = 2 / math.pi * (theta + math.sin(theta) * total)
    else:
        term, total = 1.0, 0.0
        for k in range(0, degrees - 1, 2):
            total += term
            term *= (k + 1) / (k + 2) * math.cos(theta) ** 2
        area = math.sin(theta) * total
    return (1 + area) / 2
