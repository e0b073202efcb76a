"""Indexes of parts, merged, against the index of the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION, byte_tokenizer, opened, token_blocks

from surgery.errors import UsageError
from surgery.index.block_sums import stored
from surgery.index.build import build_index
from surgery.index.calibration import Calibration
from surgery.index.channel_index import ChannelIndex
from surgery.index.merge import merge_indexes
from surgery.text import TokenBlocks

PROMPTS = [torch.tensor([5, 6, 7])]


def built(folder: Path, blocks: TokenBlocks, part: slice, out: Path) -> ChannelIndex:
    """The index of some of the blocks, with its sample."""
    some = replace(blocks, ids=blocks.ids[part])
    index = build_index(opened(folder), Calibration(some, PROMPTS), save_samples=True)
    out.mkdir()
    index.save(out)
    return index


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "deepseek_v3", "gpt_oss"])
def test_parts_make_the_whole(
    family: str, save_tiny: Callable[..., Path], tmp_path: Path, license_text: str
) -> None:
    folder = save_tiny(family, max_position_embeddings=512)
    blocks = token_blocks(byte_tokenizer(), license_text, "text", block_size=512, blocks=8)
    whole = built(folder, blocks, slice(0, 8), tmp_path / "whole")
    built(folder, blocks, slice(0, 3), tmp_path / "one")  # 1,536 tokens: every one sampled
    built(folder, blocks, slice(3, 8), tmp_path / "two")  # 2,560 tokens: every second one, as of all 4,096
    merged = merge_indexes([tmp_path / "one", tmp_path / "two"], opened(folder))
    assert torch.equal(merged.input_ids, whole.input_ids)
    assert merged.loss["nats"] == pytest.approx(whole.loss["nats"], rel=1e-9)
    assert merged.loss["tokens"] == whole.loss["tokens"] == 8 * 511
    assert merged.calibration["sha256"] == whole.calibration["sha256"]
    for ours, theirs in zip(merged.layers, whole.layers, strict=True):
        assert ours.ffns.keys() == theirs.ffns.keys()
        for unit, whole_ffn in theirs.ffns.items():
            assert torch.equal(ours.ffns[unit].supernodes, whole_ffn.supernodes)
            assert ours.ffns[unit].tokens == whole_ffn.tokens
            assert ours.ffns[unit].statistics.keys() == whole_ffn.statistics.keys()
            sums, whole_sums = ours.ffns[unit].block_sums, whole_ffn.block_sums
            assert sums is not None and whole_sums is not None and sums.groups == 8
            for name, value in stored("", [whole_sums], stacked=False).items():
                # a channel whose power is that of the next may stand in its place
                assert torch.allclose(getattr(sums, name).float(), value.float(), rtol=1e-3, atol=1e-4), name
            for name, value in whole_ffn.statistics.items():
                limit = 1e-4 if name.startswith("halo_redundancy") else 1e-6
                found = ours.ffns[unit].statistics[name]
                assert torch.allclose(found, value, rtol=limit, atol=limit * float(value.abs().max())), name
    merged.save(tmp_path)
    assert ChannelIndex.load(tmp_path).calibration["merged"][1]["blocks"] == 5


def test_the_command_and_what_it_refuses(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    source = save_tiny("llama")
    text = (source.parent / "text.txt").read_text()
    for place, name in enumerate(("one", "two")):
        (source.parent / f"{name}.txt").write_text(text[place * 5000 : (place + 1) * 5000])
        calibration = [*CALIBRATION]
        calibration[calibration.index("text.txt")] = f"{name}.txt"
        surgeon("index", str(source), "--out", name, *calibration, "--save-samples")
    surgeon("index", str(source), "--out", "bare", *CALIBRATION)
    model = ["--model", str(source)]
    assert "8 blocks" in surgeon("merge-index", "one", "two", *model, "--dry-run").stdout
    surgeon("merge-index", "one", "two", *model, "--out", "both")
    both = ChannelIndex.load(source.parent / "both")
    assert both.calibration["name"] == "one.txt + two.txt" and both.calibration["blocks"] == 8
    surgeon(
        "prune", str(source), "--index", "both", "--sparsity", "0.5", "--multiple-of", "8", "--out", "cut"
    )
    assert "counts twice" in surgeon("merge-index", "one", "one", *model, "--out", "x", code=1).stderr
    assert "--save-samples" in surgeon("merge-index", "one", "bare", *model, "--out", "x", code=1).stderr
    assert "two indexes" in surgeon("merge-index", "one", *model, "--out", "x", code=2).stderr
    other = save_tiny("llama", name="other", intermediate_size=40)
    shown = surgeon("merge-index", "one", "two", "--model", str(other), "--out", "x", code=1).stderr
    assert "another checkpoint" in shown and not (source.parent / "x").exists()
    with pytest.raises(UsageError):
        merge_indexes([source.parent / "one"], opened(source))
