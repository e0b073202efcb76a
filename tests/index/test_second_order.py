"""Second-order scores: against fresh inverses, the special cases they hold, and full-model autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION
from torch.nn import functional
from transformers import AutoModelForCausalLM

from surgery.cli import options
from surgery.index import supernodes as halo
from surgery.index.channel_index import ChannelIndex, FfnIndex
from surgery.index.second_order import DAMPING, damped, obs_scores, removal_costs, unexplained
from surgery.plan import scores as importance
from surgery.plan.make_plan import make_plan
from surgery.plan.methods import METHODS
from surgery.plan.prune_plan import ALLOCATIONS
from surgery.registry import import_object
from surgery.repair.methods import REPAIRS

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def second_moment(u: torch.Tensor) -> torch.Tensor:
    return u.T @ u / len(u)


def correlated(tokens: int, channels: int) -> torch.Tensor:
    return normal(tokens, channels // 2) @ normal(channels // 2, channels) + 0.3 * normal(tokens, channels)


@pytest.mark.parametrize("loss_aware", [False, True])
def test_downdating_equals_a_fresh_inverse_and_a_fresh_fit(loss_aware: bool) -> None:
    u, weight = correlated(400, 50), normal(6, 50)
    moment = damped(second_moment(u))
    output = second_moment(normal(100, 6)) if loss_aware else None
    costs = removal_costs(weight, second_moment(u), output)
    left, expected = list(range(50)), {}
    while left:
        # least squares on what is left, from scratch, gives W after all removals so far
        gone = [c for c in range(50) if c not in left]
        refit = weight[:, left] + weight[:, gone] @ moment[gone][:, left] @ torch.linalg.inv(
            moment[left][:, left]
        )
        scores = obs_scores(refit, torch.linalg.inv(moment[left][:, left]), output)
        place = int(scores.argmin())
        expected[left.pop(place)] = float(scores[place])
    order = costs.argsort().tolist()
    assert order == list(expected)
    rising = torch.tensor([expected[c] for c in order], dtype=torch.float64).cummax(0).values
    assert torch.allclose(costs[order], rising, rtol=1e-4)
    assert order == costs.float().argsort().tolist()


def test_one_huge_channel_does_not_hide_the_others_from_relative_damping() -> None:
    u, weight = normal(500, 20), normal(6, 20)
    u[:, 4] *= 1e4
    weight /= weight.norm(dim=0)
    u[:, 7] *= 0.01
    lost = removal_costs(weight, second_moment(u))
    found = removal_costs(weight, second_moment(u), relative=True)
    assert int(found.argmin()) == 7 and found[7] < 0.01 * found.median()
    assert lost[7] > 0.5 * lost.median()


def test_a_copy_goes_first_and_its_original_does_not() -> None:
    u, weight = normal(500, 40), normal(6, 40)
    u[:, 7] = u[:, 3]
    costs = removal_costs(weight, second_moment(u))
    pair = costs[[3, 7]].sort().values
    assert pair[0] == costs.min() and pair[0] < 0.05 * costs.median() < pair[1]


def test_obs_flap_and_lp_are_special_cases() -> None:
    u, weight = correlated(20000, 12), normal(6, 12)
    s_power = lambda moment: (weight * (moment @ weight)).sum(0)  # noqa: E731
    inverse = torch.linalg.inv(second_moment(u))
    assert torch.allclose(obs_scores(weight, inverse, None), weight.square().sum(0) / inverse.diagonal())
    variance = u.var(0, correction=0)
    values = {"activation_power": u.square().mean(0), "mean": u.mean(0), "down_norm": weight.norm(dim=0)}
    flap = importance.flap(FfnIndex(values, torch.empty(0), 1), GENERATOR)
    assert torch.allclose(obs_scores(weight, (1 / variance).diag(), None), flap)
    g = normal(20000, 6) @ normal(6, 6)
    joint = (u * (g @ weight)).square().mean(0)  # twice LP
    factored = obs_scores(weight, (1 / u.square().mean(0)).diag(), second_moment(g))
    assert torch.allclose(factored, u.square().mean(0) * s_power(second_moment(g)))
    assert torch.allclose(factored, joint, rtol=0.15)  # u and g are independent here


def test_unexplained_variance_is_what_regression_leaves() -> None:
    u = correlated(2000, 10)
    u[:, 9] = normal(2000)
    centred = u - u.mean(0)
    found = unexplained(second_moment(centred))
    for channel in range(10):
        others = [c for c in range(10) if c != channel]
        fit = torch.linalg.lstsq(centred[:, others], centred[:, channel]).solution
        left = (centred[:, channel] - centred[:, others] @ fit).square().sum() / centred[
            :, channel
        ].square().sum()
        assert float(found[channel]) == pytest.approx(float(left), rel=1e-3)
    assert found[9] > 0.95 > found[:9].max()


@pytest.fixture
def second_order_index(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> Callable[[str], Path]:
    def make(variant: str) -> Path:
        source = save_tiny(variant)
        surgeon("index", str(source), "--second-order", "--out", "index", *CALIBRATION)
        return source

    return make


def test_statistics_equal_full_model_autograd(second_order_index: Callable[[str], Path]) -> None:
    source = second_order_index("llama")
    index = ChannelIndex.load(source.parent / "index")
    model = AutoModelForCausalLM.from_pretrained(source).double()
    ids = index.input_ids.long()
    seen: dict[str, torch.Tensor] = {}
    mlp = model.model.layers[2].mlp
    mlp.gate_proj.register_forward_hook(lambda _, x, __: seen.__setitem__("x", x[0].detach()))

    def keep(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.retain_grad()
        seen.update(u=inputs[0].detach(), y=output)

    mlp.down_proj.register_forward_hook(keep)
    logits = model(ids, use_cache=False).logits
    functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="sum"
    ).backward()
    found = index.layers[2].statistics
    gradient = sum(
        (linear.weight * linear.weight.grad).abs().sum(axis)
        for linear, axis in ((mlp.gate_proj, 1), (mlp.up_proj, 1), (mlp.down_proj, 0))
    )
    assert torch.allclose(found["taylor_weight"].double(), gradient, rtol=1e-4)
    power = seen["x"].square().mean((0, 1)).sqrt()
    read = (mlp.gate_proj.weight.abs() + mlp.up_proj.weight.abs()) @ power
    assert torch.allclose(found["read_norm"].double(), read, rtol=1e-4)
    u, g, weight = seen["u"].flatten(0, 1), seen["y"].grad.flatten(0, 1), mlp.down_proj.weight.detach()
    assert torch.allclose(found["obs"].double(), removal_costs(weight, second_moment(u)), rtol=1e-3)
    shares = g.square().sum(1) / g.square().sum()
    weighted = u.T @ (u * shares[:, None])
    assert torch.allclose(
        found["obs_loss"].double(),
        removal_costs(weight, weighted, second_moment(g), relative=True),
        rtol=1e-3,
    )
    assert DAMPING == 1e-2


@pytest.mark.parametrize("variant", ["llama", "gpt2", "phi3"])
def test_every_method_makes_a_plan(second_order_index: Callable[[str], Path], variant: str) -> None:
    index = ChannelIndex.load(second_order_index(variant).parent / "index")
    kept = {}
    for method in METHODS:
        for protect in (None, True, False):
            plan = make_plan(index, method=method, sparsity=0.5, multiple_of=8, protect=protect)
            survived = all(
                ffn.supernodes_kept == ffn.supernodes for layer in plan.layers for ffn in layer.ffns.values()
            )
            assert survived or not plan.protect
        kept[method] = tuple(plan.layers[2].kept.tolist())
    assert len(set(kept.values())) > 7  # they do not all say the same


def test_methods_that_need_more_say_so(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    source = save_tiny("llama")
    surgeon("index", str(source), "--out", "index", *CALIBRATION)
    cut = ["prune", str(source), "--multiple-of", "8", "--method", "obs-loss", "--repair", "none"]
    refused = surgeon(*cut, "--index", "index", "--out", "cut", code=1)
    assert "--second-order" in refused.stderr
    surgeon(*cut, "--out", "cut", *CALIBRATION)  # made on the fly, the index has all that the method needs


def test_the_command_line_offers_what_the_library_has() -> None:
    assert options.ALLOCATION_NAMES == ALLOCATIONS
    assert options.METHOD_NAME.registry is METHODS and options.REPAIR_NAME.registry is REPAIRS
    for name, method in METHODS.items():
        assert callable(import_object(method.score)) and method.label, name
    for name, repair in REPAIRS.items():
        assert repair.solve is None or callable(import_object(repair.solve)), name
        assert callable(import_object(repair.token_weights)) and repair.label, name


def test_published_redundancy_is_the_scale_free_one_of_large_gradients() -> None:
    q = torch.randn(500, 8, generator=GENERATOR)
    q[:, 1] += q[:, 0]
    core = torch.tensor([0])
    free = halo.redundancy(q, core)
    assert torch.allclose(halo.redundancy(q, core, halo.PUBLISHED_EPSILON), free, atol=1e-4)
    small = halo.redundancy(1e-4 * q, core, halo.PUBLISHED_EPSILON)
    assert torch.allclose(halo.redundancy(1e-4 * q, core), free, atol=1e-4) and small[1] < 0.01 * free[1]
