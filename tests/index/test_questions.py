"""The questions of docs/library.md, each against the sets and ranks written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_model
from scipy import stats

import surgery
from surgery.errors import IndexMismatchError, UsageError
from surgery.index.channel_index import ChannelIndex

TEXT = ["--calibration", "text.txt", "--blocks", "8", "--block-size", "16"]


def indexed(surgeon: Callable[..., Any], model: Path, name: str, *more: str) -> ChannelIndex:
    surgeon("index", str(model), "--out", name, *TEXT, *more)
    return ChannelIndex.load(name)


def test_supernodes_of_both(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    one = indexed(surgeon, save_tiny("llama", intermediate_size=300), "one")
    other = indexed(surgeon, Path("tiny"), "other", "--seed", "7")
    common = surgery.common_supernodes(one, other)
    for number, channels in common.items():
        sets = [set(index.layers[number].supernodes.tolist()) for index in (one, other)]
        assert channels == sorted(sets[0] & sets[1])
    overlap = surgery.supernode_overlap(one, other)
    assert overlap.estimate == pytest.approx(sum(map(len, common.values())) / 18)
    assert 0 <= overlap.low <= overlap.high <= 1
    assert surgery.supernode_overlap(one, one).bounds == [1, 1]
    narrow = indexed(surgeon, save_tiny("llama", name="narrow"), "narrow-index")
    with pytest.raises(IndexMismatchError, match="different shape"):
        surgery.common_supernodes(one, narrow)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_supernodes_that_are_outliers(
    family: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    index = indexed(surgeon, save_tiny(family), "index")
    for by in ("activation_power", "weight_norm"):
        found = surgery.supernode_outliers(index, by)
        shares = [
            len(channels) / max(1, len(layer.supernodes))
            for channels, layer in zip(found.values(), index.layers, strict=True)
        ]
        assert shares == pytest.approx([layer.summary()["overlap"][by] for layer in index.layers])
        assert all(set(found[n]) <= set(x.supernodes.tolist()) for n, x in enumerate(index.layers))
    with pytest.raises(UsageError, match="no such statistic"):
        surgery.supernode_outliers(index, "colour")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_lp_against_movement(
    family: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    """Against norms of the whole model's weights as transformers loads them, and scipy's correlation."""
    before, after = save_tiny(family), save_tiny(family, name="after", seed=1)
    index = indexed(surgeon, before, "index")
    found = surgery.lp_against_movement(index, surgery.open_model(before), surgery.open_model(after))
    old, new = (tiny_model(family, seed=seed).state_dict() for seed in (0, 1))
    for number, correlation in found.correlations.items():
        layer = index.layers[number]
        proxy = torch.cat([ffn.statistics["loss_proxy"] for ffn in layer.ffns.values() if ffn.tokens])
        moved = torch.cat(
            [moved_channels(old, new, family, number, f.expert) for f in layer.ffns.values() if f.tokens]
        )
        expected = stats.spearmanr(proxy.numpy(), moved.numpy()).statistic
        assert correlation == pytest.approx(expected, abs=1e-6)
    assert len(found.correlations) == len(index.layers)
    wide = save_tiny("llama", name="wide", hidden_size=64)
    with pytest.raises(IndexMismatchError, match="another checkpoint"):
        surgery.lp_against_movement(index, surgery.open_model(before), surgery.open_model(wide))


def moved_channels(old: Any, new: Any, family: str, layer: int, expert: int | None) -> torch.Tensor:
    """Distance [F] of each channel's rows and column between two state dicts."""
    delta = {name: new[name].float() - old[name].float() for name in old}
    if family == "gpt2":
        stem = f"transformer.h.{layer}.mlp."
        parts = [delta[stem + "c_fc.weight"].T, delta[stem + "c_proj.weight"]]
    elif family == "mixtral":
        stem = f"model.layers.{layer}.mlp.experts."
        both = delta[stem + "gate_up_proj"][expert]
        parts = [*both.chunk(2), delta[stem + "down_proj"][expert].T]
    else:
        stem = f"model.layers.{layer}.mlp."
        parts = [delta[stem + "gate_proj.weight"], delta[stem + "up_proj.weight"]]
        parts.append(delta[stem + "down_proj.weight"].T)
    return torch.cat(parts, 1).norm(dim=1)


def test_layers_that_differ(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    one = indexed(surgeon, save_tiny("llama", intermediate_size=300), "one")
    assert surgery.differing_layers(one, one) == {}
    steep = ChannelIndex.load("one")
    ffn = steep.layers[2].ffns["dense"]
    assert ffn.block_sums is not None
    ffn.block_sums.block_lp[:, :] *= 0.01  # as if its top channels held a hundredth of their LP
    assert list(surgery.differing_layers(one, steep)) == [2]
    found = surgery.concentration(one, 2)
    assert found.estimate == pytest.approx(one.layers[2].summary()["lp_share"]["0.01"])
    ffn.block_sums = None
    with pytest.raises(IndexMismatchError, match="kept no sums"):
        surgery.concentration(steep, 2)
