"""The loss and its gradient against autograd, the schedule, and what history says."""

from __future__ import annotations

import pytest
import torch

from surgery.heal.distil_loss import DistilLoss, TopTokens, token_losses, top_tokens
from surgery.heal.optimizer import learning_rate
from surgery.heal.train import History, Schedule


def logits(seed: int, tokens: int = 6, vocabulary: int = 40) -> torch.Tensor:
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def test_all_tokens_kept_give_the_whole_divergence() -> None:
    teacher, student = logits(0), logits(1)
    exact = TopTokens(torch.arange(40).expand(6, 40), teacher.log_softmax(-1))
    nats, gradient = token_losses(student, exact, torch.zeros(6, dtype=torch.long), DistilLoss())
    p = teacher.softmax(-1)
    expected = (p * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(nats, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, student.softmax(-1) - p, atol=1e-5, rtol=1e-5)


def test_fewer_tokens_give_a_lower_bound_that_rises_with_their_number() -> None:
    teacher, student = logits(0), logits(1)
    following = torch.zeros(6, dtype=torch.long)
    means = [
        float(token_losses(student, top_tokens(teacher, count, 1.0), following, DistilLoss())[0].mean())
        for count in (1, 4, 16, 40)
    ]
    assert means == sorted(means)


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.0), (2.0, 0.0), (1.0, 0.3), (1.5, 1.0)])
def test_the_gradient_is_that_of_autograd(temperature: float, share: float) -> None:
    loss = DistilLoss(temperature, share)
    teacher, student = top_tokens(logits(0), 8, temperature), logits(1).double().requires_grad_(True)
    following = torch.tensor([3, 1, 39, 0, 7, 7])
    log_q = (student / temperature).log_softmax(-1)
    others = torch.ones_like(log_q, dtype=torch.bool).scatter(-1, teacher.ids, False)
    log_rest = log_q.masked_fill(~others, -torch.inf).logsumexp(-1)
    p, rest = teacher.log_p.double().exp(), teacher.rest.double()
    kl = (p * (teacher.log_p - log_q.gather(-1, teacher.ids))).sum(-1) + rest * (rest.log() - log_rest)
    plain = -student.log_softmax(-1).gather(-1, following[:, None])[:, 0]
    expected = temperature**2 * (1 - share) * kl + share * plain
    (derivative,) = torch.autograd.grad(expected.sum(), student)
    nats, gradient = token_losses(student.detach().float(), teacher, following, loss)
    torch.testing.assert_close(nats, expected.detach().float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradient, derivative.float(), atol=1e-5, rtol=1e-4)


def test_the_rate_rises_for_a_tenth_and_falls_to_a_tenth() -> None:
    rates = [learning_rate(step, 40, 2.0) for step in range(40)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(0.2)
    assert learning_rate(0, 1, 2.0) == 2.0


def test_every_block_makes_part_of_one_step_and_the_end_is_measured() -> None:
    schedule = Schedule(torch.randperm(30), 4)
    assert schedule.steps == 8
    assert sorted(torch.cat([schedule.blocks(step) for step in range(8)]).tolist()) == list(range(30))
    for steps in (1, 2, 7, 8, 9, 32, 100):
        measured = [n for n in range(1, steps + 1) if Schedule(torch.arange(steps), 1).measures_after(n)]
        assert measured[-1] == steps
        assert len(measured) <= 13


def test_training_stalls_after_five_measures_without_improvement() -> None:
    history = History(measures=[{"step": step, "nats": {"a": 3.0, "b": 4.0}} for step in range(7)], best=1)
    assert history.improved
    assert history.stalled
    assert not History(measures=history.measures[:6], best=1).stalled
    assert history.mean(0) == 3.5
