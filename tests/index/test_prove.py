"""Super weights are proved by what their removal costs: masks, rows, columns and decoys, planted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.planted import FAMILIES, ROW, Planted
from torch.nn import functional

from surgery.index import structures
from surgery.index.findings import Finding
from surgery.index.paired_bootstrap import paired_interval

SIZE = 3000.0


def proved(findings: list[Finding]) -> list[str]:
    return [found.structure.name for found in findings if found.is_super]


def by_hand(planted: Planted, change: Callable[[], None]) -> float:
    """What a change of the whole model, run by transformers, adds to the loss per token."""
    ids = planted.sample().long()

    def loss() -> float:
        with torch.no_grad():
            logits = planted.model(ids, use_cache=False).logits[:, :-1]
        return float(functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)))

    before = loss()
    change()
    return loss() - before


@pytest.mark.parametrize("family", FAMILIES)
def test_two_that_mask_each_other_are_found_together(family: str, save_tiny: Callable[..., Path]) -> None:
    planted = Planted(save_tiny(family))
    for layer in (1, 2):
        # The spike of layer 1 fills the norm, so that layer 2's channel reads nothing while it is there.
        planted.channel(layer, 11)
        planted.write(layer, ROW, 11, SIZE)
    with torch.no_grad():
        planted.model.model.layers[2].self_attn.o_proj.weight.zero_()  # or it would see the difference
    found = planted.found()
    assert proved(found.structures) == ["layer 1 column 11 + layer 2 column 11"]
    effects = {one.structure.name: one.effect.mean for one in found.structures}
    assert max(abs(effects[f"layer {n} [17, 11]"]) for n in (1, 2)) < 0.05
    assert [(w.layer, w.round, w.kind) for w in found.super_weights] == [(1, 1, "pair"), (2, 2, "pair")]

    def remove() -> None:
        for layer in (1, 2):
            planted.write(layer, ROW, 11, 0.0)

    assert effects["layer 1 column 11 + layer 2 column 11"] == pytest.approx(
        by_hand(planted, remove), rel=1e-3
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_matters_while_none_of_its_scalars_does(family: str, save_tiny: Callable[..., Path]) -> None:
    planted = Planted(save_tiny(family))
    for column in range(20):
        planted.channel(1, column)
        planted.write(1, ROW, column, SIZE / 20)
    found = planted.found()
    assert proved(found.structures) == ["layer 1 row 17"] and found.super_weights == []
    assert abs(by_hand(planted, lambda: planted.write(1, ROW, 3, 0.0))) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_spike_without_effect_is_ranked_last(family: str, save_tiny: Callable[..., Path]) -> None:
    planted = Planted(save_tiny(family))
    planted.channel(1, 11)
    planted.write(1, ROW, 11, SIZE)
    planted.channel(3, 12, reads=ROW)  # fires on the first spike, and makes it larger
    planted.write(3, ROW, 12, 2 * SIZE)
    found = planted.found()
    spikes = sorted([*found.super_weights, *found.echoes], key=lambda w: -abs(w.output))
    assert (spikes[0].layer, spikes[0].column) == (3, 12)
    assert proved(found.structures) == ["layer 1 [17, 11]"]
    assert all(part.layer == 3 for part in found.structures[-1].structure.parts)
    decoy = next(one for one in found.structures if one.structure.name == "layer 3 [17, 12]")
    assert abs(decoy.effect.mean) < 0.01 and not decoy.is_super


def test_spikes_beyond_the_most_that_are_measured_singly_are_measured_together(
    save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = Planted(save_tiny(FAMILIES[0]))
    planted.channel(1, 11)
    planted.write(1, ROW, 11, SIZE)
    planted.channel(3, 12, reads=ROW)  # a larger spike without an effect
    planted.write(3, ROW, 12, 2 * SIZE)
    monkeypatch.setattr(structures, "MAX_SCALARS", 1)
    found = planted.found()
    rest = next(one for one in found.structures if one.structure.name == "layer 1 [17, 11]")
    assert rest.is_super and rest.effect.mean == pytest.approx(
        by_hand(planted, lambda: planted.write(1, ROW, 11, 0.0)), rel=1e-3
    )
    assert (1, 11) in [(weight.layer, weight.column) for weight in found.super_weights]
    assert "layer 1 column 11" not in [one.structure.name for one in found.structures]  # not a candidate


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_has_none(family: str, save_tiny: Callable[..., Path]) -> None:
    assert proved(Planted(save_tiny(family)).found().structures) == []


def test_intervals_of_few_pairs_hold_the_true_mean_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(1)
    for count in (8, 16, 64):
        draws = torch.randn(400, count, generator=generator, dtype=torch.float64) + 1.0
        held = [interval.low <= 1.0 <= interval.high for interval in map(paired_interval, draws)]
        assert 0.92 < sum(held) / len(held) < 0.98
    alone = paired_interval(torch.tensor([3.0]))
    assert alone.as_json() == [None, None] and alone.mean == 3.0
