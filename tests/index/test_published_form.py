"""The published form of an index: small, and the same plans as the index in memory or in its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import byte_tokenizer, opened, token_blocks

from surgery.errors import IndexMismatchError, PlanError
from surgery.index import supernodes
from surgery.index.build import build_index
from surgery.index.calibration import Calibration
from surgery.index.channel_index import ChannelIndex, FfnIndex, LayerIndex
from surgery.index.codes import decode, encode, rounded
from surgery.index.ffn_index import HALO_ONLY, LATER, STATISTICS
from surgery.plan.make_plan import make_plan
from surgery.plan.methods import METHODS


def plans(index: ChannelIndex) -> dict[tuple[str, float], object]:
    """The plans of every method the index has the statistics for, at several sparsities."""
    found: dict[tuple[str, float], object] = {}
    for method in METHODS:
        for sparsity in (0.2, 0.6):
            try:
                plan = make_plan(index, method=method, sparsity=sparsity, multiple_of=1)
            except PlanError as error:
                found[method, sparsity] = str(error)
            else:
                found[method, sparsity] = plan.as_json()
    return found


@pytest.mark.parametrize("signed", [False, True])
def test_codes_are_close_and_stable(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5000, generator=generator).exp().pow(3)  # 30 powers of two
    values[0, :40] = 0
    values[1] = 0
    if signed:
        values[::2] *= torch.randn(3, 5000, generator=generator).sign()[::2]
    codes, ranges = encode(values)
    found = decode(codes, ranges)
    limit = 2.0 ** -(9 if signed else 10)
    assert codes.dtype == torch.uint16 and torch.equal(found == 0, values == 0)
    assert ((found - values).abs() <= limit * values.abs()).all()
    again, same = encode(found)
    assert torch.equal(codes.int(), again.int()) and torch.equal(ranges, same)
    for row, line in zip(values, found, strict=True):
        assert row.abs().max() == line.abs().max()
        assert (line[row.argsort()].diff() >= 0).all(), "order is kept, with ties"


def test_codes_of_few_distinct_numbers_are_exact() -> None:
    for values in (torch.tensor([2.5, 2.5]), torch.tensor([1.0, 1.0 + 2**-23, 0.0]), torch.tensor([-3.0])):
        assert torch.equal(rounded(values), values)
    assert rounded(torch.empty(0)).shape == (0,)


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3"])
def test_every_form_gives_the_same_plans(
    family: str, save_tiny: Callable[..., Path], tmp_path: Path, license_text: str
) -> None:
    blocks = token_blocks(byte_tokenizer(), license_text, "text", block_size=64, blocks=4)
    model = opened(save_tiny(family))
    index = build_index(model, Calibration(blocks, [torch.tensor([5, 6])]), second_order=family == "llama")
    (tmp_path / "own").mkdir()
    (tmp_path / "published").mkdir()
    index.save(tmp_path / "own")
    index.save_published(tmp_path / "published")
    own, published = (ChannelIndex.load(tmp_path / name) for name in ("own", "published"))
    expected = plans(index)
    assert plans(own) == expected
    assert plans(published) == expected
    assert published.as_json() == {**index.as_json(), "schema_version": 2}
    for ours, theirs in zip(published.layers, index.layers, strict=True):
        assert ours.ffns.keys() == theirs.ffns.keys()
        for name, ffn in ours.ffns.items():
            whole = theirs.ffns[name]
            assert ffn.width == whole.width and torch.equal(ffn.halo, _planned_halo(whole))
            for statistic, value in ffn.statistics.items():
                where = ffn.halo if statistic in HALO_ONLY else torch.arange(ffn.width)
                least = 1e-30
                assert torch.allclose(value[where], whole.statistics[statistic][where], 2e-3, least), (
                    statistic
                )
            with pytest.raises(IndexMismatchError, match="does not hold this statistic"):
                ffn.statistics["max_abs"]


def _planned_halo(ffn: FfnIndex) -> torch.Tensor:
    if len(ffn.supernodes) == 0:
        return ffn.supernodes
    return supernodes.halo(rounded(ffn.statistics["halo_connectivity"]), ffn.supernodes)


def test_an_index_of_an_8b_model_is_small(tmp_path: Path) -> None:
    """The shape of Llama-3.1-8B, 64 blocks of 512 tokens: what the two forms take on disk."""
    layers, width = 32, 14_336
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(width, generator=generator).exp() for name in (*STATISTICS, *LATER)}
    core = supernodes.supernodes(values["loss_proxy"])
    made = []
    for _ in range(layers):
        own = {name: value.clone() for name, value in values.items()}
        made.append(LayerIndex({"dense": FfnIndex(own, core, 32_768)}, {"input": 1.0}))
    ids = torch.zeros(64, 512, dtype=torch.int32)
    index = ChannelIndex({"name": "org/8b"}, {"tokens": 32_768}, {}, {}, made, [], [], ids)
    sizes = {}
    for form, save in (("own", index.save), ("published", index.save_published)):
        folder = tmp_path / form
        folder.mkdir()
        save(folder)
        sizes[form] = sum(path.stat().st_size for path in folder.iterdir())
    assert sizes["own"] > 25e6 and sizes["published"] < 10e6, sizes
