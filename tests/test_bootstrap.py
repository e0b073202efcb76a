"""Intervals: how often they hold the truth, and their parts against scipy and against formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from surgery.bootstrap import Interval, Statistic, overlap_of_sets, paired_ratio, resampled, studentized

BLOCKS = 64


def mean_of(values: torch.Tensor) -> Statistic:
    return lambda weights: (weights @ values) / weights.sum(1)


def test_an_overlap_spans_the_intervals_of_scipy() -> None:
    values = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 3
    ours = overlap_of_sets(float(values.mean()), mean_of(values)(resampled(40, 9999)), 40)
    ends = []
    for method in ("percentile", "basic"):
        how = {"method": method, "n_resamples": 9999, "rng": np.random.default_rng(0)}
        ends += stats.bootstrap((values.numpy(),), np.mean, **how).confidence_interval
    assert ours.bounds == pytest.approx([min(ends), max(ends)], abs=0.03 * (max(ends) - min(ends)))


def test_the_studentized_interval_is_that_of_the_formula() -> None:
    """Against a loop over resamples with the textbook standard error of a mean, and their percentiles."""
    values = torch.rand(20, generator=torch.Generator().manual_seed(2), dtype=torch.float64).exp()
    weights = resampled(20, 999, seed=5).int()
    samples = [values.repeat_interleave(row) for row in weights]
    mean, error = float(values.mean()), float(values.std(correction=0)) / 20**0.5
    t = sorted((float(x.mean()) - mean) / (float(x.std(correction=0)) / 20**0.5) for x in samples)
    found = studentized(mean_of(values), 20, replicates=999, seed=5)
    means = sorted(float(x.mean()) for x in samples)
    low, high = min(mean - t[974] * error, means[24]), max(mean - t[24] * error, means[974])
    assert found.bounds == pytest.approx([low, high], rel=1e-9)


def test_intervals_stay_within_and_no_spread_gives_no_width() -> None:
    few = torch.zeros(BLOCKS, dtype=torch.float64)
    few[:3] = torch.tensor([0.9, 0.5, 0.01])
    assert studentized(mean_of(few), BLOCKS, within=(0, 0.03)).high == 0.03
    assert studentized(mean_of(1 - few), BLOCKS).high > 1
    same = studentized(mean_of(torch.full((BLOCKS,), 0.25, dtype=torch.float64)), BLOCKS)
    assert same.bounds == pytest.approx([0.25, 0.25], abs=1e-12)
    assert overlap_of_sets(0.9, torch.linspace(0.5, 0.9, 999), 64).high == 1


def test_pairing_takes_out_what_both_models_find_hard() -> None:
    generator = torch.Generator().manual_seed(3)
    hard = torch.rand(BLOCKS, generator=generator, dtype=torch.float64) * 300 + 300
    more = 0.02 * 100 + torch.randn(BLOCKS, generator=generator, dtype=torch.float64) * 0.5
    paired = paired_ratio(hard, hard + more, 100)
    assert paired.estimate == pytest.approx(float((more.sum() / BLOCKS / 100).exp()))
    assert paired.excludes(1) and not paired.excludes(paired.estimate)
    alone = [studentized(mean_of(x / 100), BLOCKS) for x in (hard, hard + more)]
    assert not alone[0].differs_from(alone[1])
    assert not paired_ratio(hard, hard + more - more.mean(), 100).excludes(1)


def test_intervals_part_only_without_a_common_value() -> None:
    one = Interval(0.2, 0.1, 0.3, 64)
    assert not one.differs_from(Interval(0.4, 0.3, 0.5, 64))
    assert one.differs_from(Interval(0.4, 0.31, 0.5, 64)) and Interval(0.4, 0.31, 0.5, 64).differs_from(one)


def test_a_paired_ratio_covers() -> None:
    """Of 400 experiments, those whose 95% interval holds the true ratio; blocks differ by a skewed amount."""
    generator = torch.Generator().manual_seed(4)
    same, held = torch.zeros(BLOCKS, dtype=torch.float64), 0
    for _ in range(400):
        change = 0.02 * (0.7 * torch.randn(BLOCKS, generator=generator, dtype=torch.float64)).exp()
        found = paired_ratio(same, 100 * change, 100)
        held += not found.excludes(float(np.exp(0.02 * np.exp(0.7**2 / 2))))
    assert 0.93 <= held / 400 <= 0.97
