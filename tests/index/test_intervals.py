"""Block sums and the intervals computed from them: against single blocks, all channels, and a known truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import byte_tokenizer, opened, token_blocks

from surgery.errors import IndexMismatchError
from surgery.index.block_sums import GROUPS, block_sums, stored
from surgery.index.build import build_index
from surgery.index.calibration import Calibration
from surgery.index.channel_index import ChannelIndex, FfnIndex, LayerIndex
from surgery.index.intervals import (
    halo_share,
    held_share,
    median_top_share,
    model_outlier_overlap,
    outlier_overlap,
    overlap_interval,
    published_intervals,
    top_share,
    why_no_sums,
    why_none,
)
from surgery.index.supernodes import mass_share, supernodes

BLOCKS, WIDTH = 64, 300  # twice as many blocks as groups


def gamma(shape: float, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Gamma variates with mean 1; the smaller `shape`, the more skewed."""
    return torch._standard_gamma(torch.full(size, shape, dtype=torch.float64), generator=generator) / shape


def drawn_blocks(
    generator: torch.Generator, means: torch.Tensor, blocks: int = BLOCKS, shape: float = 1.0
) -> torch.Tensor:
    """LP of blocks [N, F] with mean `means` [F]: skewed channels, and blocks with more or less of all."""
    return means * gamma(shape, (blocks, len(means)), generator) * gamma(9, (blocks, 1), generator)


def layer_of(lp: torch.Tensor, power: torch.Tensor | None = None) -> LayerIndex:
    """A layer whose index was computed from LP and activation power of blocks [N, F]."""
    power = lp if power is None else power
    values = {"loss_proxy": lp.mean(0).float(), "activation_power": power.mean(0).float()}
    (sums,) = block_sums(*(value[None] for value in values.values()), lp[None], power[None])
    core = supernodes(values["loss_proxy"])
    return LayerIndex({"dense": FfnIndex(values, core, len(lp), block_sums=sums)})


def test_intervals_of_a_share_hold_the_truth() -> None:
    """The share of 95% intervals from 64 blocks that hold the true top-1% share, in 600 experiments.

    LP falls slowly or steeply from channel to channel, and is more or less skewed from block to block.
    """
    generator, held = torch.Generator().manual_seed(1), 0
    for steepness, shape in ((0.4, 2.0), (0.8, 1.0), (1.1, 0.5)):
        means = torch.arange(1, WIDTH + 1, dtype=torch.float64) ** -steepness
        truth = mass_share(means, 0.01)
        for _ in range(200):
            found = top_share(layer_of(drawn_blocks(generator, means, shape=shape)))
            assert found is not None
            held += not found.excludes(truth)
    assert 0.93 <= held / 600 <= 0.97


def test_the_top_channels_and_bins_stand_for_all_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals from what is kept, against those of an index that keeps every channel apart."""
    generator = torch.Generator().manual_seed(2)
    lp = drawn_blocks(generator, torch.rand(WIDTH, generator=generator, dtype=torch.float64) ** 4)
    chosen = torch.randperm(WIDTH, generator=generator)[:200]

    def measured() -> list[list[float]]:
        layer = layer_of(lp)
        held = held_share([[(layer.ffns["dense"], chosen)]])
        found = [top_share(layer, 0.01), top_share(layer, 0.05), held]
        return [interval.bounds for interval in found if interval is not None]

    kept = measured()
    monkeypatch.setattr("surgery.index.block_sums.LP_FRACTION", 1.0)
    for bounds, expected in zip(kept, measured(), strict=True):
        assert bounds == pytest.approx(expected, rel=0.02)
    assert len(kept) == 3


def test_blocks_beyond_the_groups_are_summed() -> None:
    lp = drawn_blocks(torch.Generator().manual_seed(3), torch.ones(40, dtype=torch.float64), 150)
    sums = layer_of(lp).ffns["dense"].block_sums
    assert sums is not None and sums.groups == GROUPS and sums.block_lp.shape == (GROUPS, 16)
    first = lp[: 150 // GROUPS + 1]  # the first of the larger groups
    assert float(sums.block_lp_total[0]) == pytest.approx(float(first.sum()), rel=1e-6)
    assert float(sums.block_lp_total.double().sum()) == pytest.approx(float(lp.sum()), rel=1e-6)
    ours = sums.lp.sum(0) / lp[:, sums.block_lp_channels.long()].sum(0)
    assert torch.allclose(ours, torch.ones_like(ours), rtol=1e-3)


def test_an_index_of_an_8b_model_grows_by_less_than_two_megabytes() -> None:
    lp = drawn_blocks(torch.Generator().manual_seed(3), torch.ones(14_336, dtype=torch.float64))
    sums = layer_of(lp).ffns["dense"].block_sums
    assert 32 * sum(t.numel() * t.element_size() for t in stored("", [sums], stacked=False).values()) < 2e6


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3"])
def test_a_group_is_the_index_of_its_block(
    family: str, save_tiny: Callable[..., Path], license_text: str
) -> None:
    """Sums by block in an index of eight blocks, against eight indexes of one block each."""
    folder = save_tiny(family)
    blocks = token_blocks(byte_tokenizer(), license_text, "text", block_size=32, blocks=8)
    prompts = [torch.tensor([5, 6, 7])]
    whole = build_index(opened(folder), Calibration(blocks, prompts))
    for number in (0, 5):
        alone = replace(blocks, ids=blocks.ids[number : number + 1])
        single = build_index(opened(folder), Calibration(alone, prompts))
        for ours, theirs in zip(whole.layers, single.layers, strict=True):
            for name, ffn in ours.ffns.items():
                sums, values = ffn.block_sums, theirs.ffns[name].statistics
                assert sums is not None and sums.groups == 8
                for kind, kept in (("loss_proxy", sums.lp), ("activation_power", sums.power)):
                    channels = sums.block_lp_channels if kind == "loss_proxy" else sums.block_power_channels
                    expected = values[kind].double()[channels.long()] * 32
                    largest = 1e-3 * float(values[kind].sum()) * 32
                    assert torch.allclose(kept[number], expected, rtol=1e-3, atol=largest), (name, kind)
                total = float(values["loss_proxy"].double().sum()) * 32
                assert float(sums.block_lp_total[number]) == pytest.approx(total, rel=1e-4)


def indexed(surgeon: Callable[..., Any], model: Path, name: str, blocks: int = 8) -> ChannelIndex:
    calibration = ["--calibration", "text.txt", "--blocks", str(blocks), "--block-size", "16"]
    surgeon("index", str(model), "--out", name, *calibration)
    return ChannelIndex.load(name)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_what_an_index_keeps_is_small_and_read_back(
    family: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any], tmp_path: Path
) -> None:
    index = indexed(surgeon, save_tiny(family, intermediate_size=200), "index")
    assert why_none(index) == ""
    for layer in index.layers:
        share, overlap = top_share(layer), outlier_overlap(layer, "activation_power")
        assert share is not None and overlap is not None
        fields = layer.summary()
        assert share.estimate == pytest.approx(fields["lp_share"]["0.01"])
        assert overlap.estimate == pytest.approx(fields["overlap"]["activation_power"])
        assert 0 <= share.low < share.high <= 1 and share.blocks == 8
        for by in ("max_abs", "weight_norm"):
            found = outlier_overlap(layer, by)
            assert found is not None and found.estimate == pytest.approx(fields["overlap"][by])
    index.save(tmp_path)
    assert (tmp_path / "index.safetensors").read_bytes() == Path("index/index.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_published_index_keeps_its_intervals(
    family: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any], tmp_path: Path
) -> None:
    """The intervals of its own figures are those of the index it was made from; others need the sums."""
    index = indexed(surgeon, save_tiny(family, intermediate_size=200), "index")
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
        if name == "once":
            index.save_published(tmp_path / name, *published_intervals(index))
        else:
            ChannelIndex.load(tmp_path / "once").save(tmp_path / name)
        published = ChannelIndex.load(tmp_path / name)
        assert published.layers[0].main[0].block_sums is None
        assert why_none(published) == "" and "leaves out the sums" in why_no_sums(published)
        for fraction in (0.001, 0.01, 0.05):
            assert median_top_share(published, fraction) == median_top_share(index, fraction) is not None
        assert halo_share(published) == halo_share(index) is not None
        for by in ("activation_power", "max_abs", "weight_norm"):
            assert model_outlier_overlap(published, by) == model_outlier_overlap(index, by) is not None
        for mine, theirs in zip(published.layers, index.layers, strict=True):
            assert top_share(mine) == top_share(theirs) is not None
            assert outlier_overlap(mine, "max_abs") == outlier_overlap(theirs, "max_abs") is not None
        assert overlap_interval(published, index) is None


@pytest.mark.parametrize("where", ["index", "layer"])
@pytest.mark.parametrize(
    ("intervals", "told"),
    [
        ([1], "by word and key"),
        ({"top_share": {"0.01": {"estimate": 1}}}, "missing"),
        ({"top_share": {"0.01": {"estimate": "a", "low": 0, "high": 1, "blocks": 8}}}, "finite numbers"),
        ({"top_share": {"0.01": {"estimate": 1, "low": 2, "high": 1, "blocks": 8}}}, "wrong order"),
    ],
)
def test_damaged_intervals_are_refused_when_the_index_is_read(
    where: str, intervals: Any, told: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    indexed(surgeon, save_tiny("llama"), "index")
    file = Path("index/index.json")
    fields = json.loads(file.read_text())
    (fields if where == "index" else fields["layers"][0])["intervals"] = intervals
    file.write_text(json.dumps(fields))
    with pytest.raises(IndexMismatchError, match=told):
        ChannelIndex.load("index")


def test_without_sums_it_is_said_why(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    model = save_tiny("llama")
    few = indexed(surgeon, model, "few", blocks=4)
    assert "8 calibration blocks" in why_none(few) and top_share(few.layers[0]) is None
    old = indexed(surgeon, model, "old")
    for layer in old.layers:
        layer.ffns["dense"].block_sums = None
    old.save(Path("old"))
    old = ChannelIndex.load("old")
    assert "version" in why_none(old) and overlap_interval(old, old) is None
    assert held_share([[(old.layers[0].ffns["dense"], torch.arange(3))]]) is None
