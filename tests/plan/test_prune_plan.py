"""Plans: widths, protection, and what is refused."""

from __future__ import annotations

import pytest
import torch

from surgery.errors import PlanError
from surgery.index import supernodes as halo
from surgery.index.channel_index import STATISTICS, ChannelIndex, FfnIndex, LayerIndex
from surgery.index.super_weights import SuperWeight
from surgery.plan import scores as importance
from surgery.plan.make_plan import make_plan
from surgery.plan.ranking import keep_highest
from surgery.plan.widths import deployability, rounded_width


def random_index(seed: int, width: int = 64, layers: int = 3) -> ChannelIndex:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(layers):
        values = {name: torch.rand(width, generator=generator) for name in STATISTICS}
        made.append(LayerIndex({"dense": FfnIndex(values, halo.supernodes(values["loss_proxy"]), 100)}))
    column = int(torch.randint(0, width, (1,), generator=generator))
    weight = SuperWeight(1, 0, column, 1.0, 1.0, 1.0, 1.0, 1.0, 1, 0)
    return ChannelIndex({}, {}, {}, {}, made, [weight], [], torch.zeros(1, 2))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("method", ["scar-lp", "scar-prot", "scar-conn"])
def test_protected_channels_always_stay(seed: int, method: str) -> None:
    index = random_index(seed)
    plan = make_plan(index, method=method, width=1 + seed % 5 + 2, seed=seed)
    for number, (layer, planned) in enumerate(zip(index.layers, plan.layers, strict=True)):
        kept = planned.kept.tolist()
        assert kept == sorted(set(kept)) and len(kept) == plan.width_after
        assert set(layer.supernodes.tolist()) <= set(kept)
        if number == 1:
            column = index.super_weights[0].column
            assert kept[plan.super_weights[0]["column"]] == column == plan.super_weights[0]["column_before"]


def test_baselines_protect_nothing_and_say_so() -> None:
    index = random_index(0)
    index.layers[0].statistics["activation_power"] = -index.layers[0].statistics["loss_proxy"]
    plan = make_plan(index, method="activation", sparsity=0.5, multiple_of=1)
    assert plan.layers[0].ffns["dense"].supernodes_kept == 0


def test_removed_super_weight_has_no_column() -> None:
    index = random_index(0)
    index.layers[1].statistics["activation_power"][index.super_weights[0].column] = -1
    plan = make_plan(index, method="activation", sparsity=0.5, multiple_of=1)
    assert plan.super_weights[0]["column"] is None


@pytest.mark.parametrize(
    ("width", "sparsity", "multiple", "expected"),
    [
        (1536, 0.25, 64, 1152),
        (1536, 0.5, 64, 768),
        (14336, 0.5, 128, 7168),
        (100, 0, 64, 100),
        (48, 0.3, 8, 32),
    ],
)
def test_rounded_width(width: int, sparsity: float, multiple: int, expected: int) -> None:
    assert rounded_width(width, sparsity, multiple) == expected


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(PlanError, match="sparsity"):
        rounded_width(64, sparsity, 8)


def test_width_zero_and_nothing_removed_are_errors() -> None:
    with pytest.raises(PlanError, match="zero"):
        rounded_width(64, 0.99, 64)
    with pytest.raises(PlanError, match="removes nothing"):
        rounded_width(64, 0.01, 64)
    with pytest.raises(PlanError, match="out of range"):
        make_plan(random_index(0), width=65)
    with pytest.raises(PlanError, match="protected"):
        make_plan(random_index(0, width=1000), method="scar-lp", width=2)


def test_ties_keep_the_lower_channel() -> None:
    assert keep_highest(torch.zeros(5), torch.tensor([4]), 3).tolist() == [0, 1, 4]


def test_protect_follows_the_papers_formula() -> None:
    layer = random_index(3, width=400).layers[0].ffns["dense"]
    protect = importance.protection(layer)
    members = layer.halo
    assert len(members) == round(0.1 * (400 - 4))
    outside = torch.ones(400, dtype=torch.bool)
    outside[members] = False
    assert torch.all(protect[outside] == 1)
    most = members[layer.statistics["halo_redundancy"][members].argmax()]
    least = members[layer.statistics["halo_redundancy"][members].argmin()]
    assert protect[most] == pytest.approx(0.2) and protect[least] == pytest.approx(1.0)


def test_redundancy_of_a_copy_and_of_a_scaled_copy_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(500, 8, generator=generator)
    q[:, 1] = q[:, 0]
    q[:, 2] = 1e-12 * q[:, 0]
    q[:, 3] = -q[:, 0]
    values = halo.redundancy(q, torch.tensor([0]))
    assert values[1] == pytest.approx(values[2].item(), rel=1e-3) and values[1] > 5
    assert values[3] == 0 and values[0] == 0


def test_connectivity_is_the_share_written_where_the_core_writes() -> None:
    down = torch.zeros(8, 3)
    down[0, 0] = down[0, 1] = down[5, 1] = down[7, 2] = 1.0
    values = halo.connectivity(down, torch.tensor([0]), support_size=1)
    assert values.tolist() == [1.0, 0.5, 0.0]


def test_deployability_lists_divisors() -> None:
    assert deployability(1152) == {"32": [1, 2, 4], "64": [1, 2], "128": [1], "256": []}


def mixture(unseen: bool) -> ChannelIndex:
    generator = torch.Generator().manual_seed(1)
    layers = []
    for number in range(4):
        ffns = {}
        for expert in range(4):
            values = {name: 1e-4 * torch.rand(64, generator=generator) for name in STATISTICS}
            values |= {
                name: torch.rand(64, generator=generator) for name in ("gate_norm", "up_norm", "down_norm")
            }
            seen = 0 if unseen and number == 3 and expert == 2 else 100
            core = halo.supernodes(values["loss_proxy"]) if seen else torch.empty(0, dtype=torch.long)
            ffns[f"expert.{expert}"] = FfnIndex(values, core, seen)
        layers.append(LayerIndex(ffns))
    return ChannelIndex({}, {}, {}, {}, layers, [], [], torch.zeros(1, 2), {"intermediate_size": 64})


def test_an_expert_no_token_reached_does_not_claim_the_budget() -> None:
    options = {"method": "scar-lp", "sparsity": 0.5, "multiple_of": 8, "allocation": "score"}
    plans = {unseen: make_plan(mixture(unseen), **options).widths[0].per_layer for unseen in (False, True)}
    assert max(plans[True]) <= 40 and abs(plans[True][3] - plans[False][3]) <= 8  # type: ignore[operator, type-var]


def test_padding_goes_by_config_key() -> None:
    index = mixture(False)
    index.layers[0] = LayerIndex({"dense": index.layers[0].ffns["expert.0"]})
    index.keys = {"dense": "intermediate_size", "experts": "intermediate_size"}
    plan = make_plan(index, method="scar-lp", sparsity=0.5, multiple_of=8, allocation="score", pad=True)
    stored = {plan.stored_width(n, name) for n, layer in enumerate(plan.layers) for name in layer.ffns}
    assert stored == {plan.width_after}
