"""Calibration data of an index: blocks of a text, and prompts that are searched for super weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from surgery import defaults
from surgery.checkpoint.transformers_model import load_tokenizer
from surgery.engine.open_model import Model
from surgery.index.channel_index import ChannelIndex
from surgery.index.spike_detector import PROMPTS, prompt_ids
from surgery.text import TokenBlocks, draw_blocks, open_text


@dataclass(frozen=True)
class Calibration:
    """Calibration blocks [N, T], and the token ids [P] of each prompt that is searched for super weights."""

    blocks: TokenBlocks
    prompts: list[torch.Tensor]


def calibrate(
    model: Model,
    text: str | Sequence[str] = defaults.CALIBRATION_TEXTS,
    *,
    weights: Sequence[float] | None = None,
    blocks: int = defaults.BLOCKS,
    block_size: int = defaults.BLOCK_SIZE,
    seed: int = defaults.SEED,
    text_column: str | None = None,
    spike_prompt: str | None = None,
) -> Calibration:
    """Draw `blocks` blocks of `block_size` tokens with `seed` from a text, or from several in shares.

    `text` is a named text, a file, or a dataset as ID[:CONFIG[:SPLIT]]; of several, `weights` are the shares
    of the blocks, equal by default. `text_column` names the column of a data set. `spike_prompt` is searched
    for super weights in addition to the built-in prompts. Raises CalibrationError when a text can't be read
    or is too short.
    """
    drawn = draw_calibration(
        model, text, weights=weights, blocks=blocks, block_size=block_size, seed=seed, text_column=text_column
    )
    return _with_prompts(drawn, model, spike_prompt)


def draw_calibration(
    model: Model,
    text: str | Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    blocks: int,
    block_size: int,
    seed: int,
    text_column: str | None = None,
) -> TokenBlocks:
    """The calibration blocks of `calibrate`, without prompts; arguments and errors as there."""
    tokenizer = load_tokenizer(model.checkpoint)
    specs = [text] if isinstance(text, str) else list(text)
    texts = [open_text(spec, tokenizer, text_column) for spec in specs]
    return draw_blocks(tokenizer, texts, blocks=blocks, block_size=block_size, seed=seed, weights=weights)


def calibration_of(index: ChannelIndex, model: Model, spike_prompt: str | None = None) -> Calibration:
    """The calibration that an index was made on, to index a cut of its model on the same tokens."""
    said = index.calibration
    blocks = TokenBlocks(
        index.input_ids, said["name"], said["seed"], predicted_bytes=0, parts=tuple(said.get("parts", ()))
    )
    return _with_prompts(blocks, model, spike_prompt)


def _with_prompts(blocks: TokenBlocks, model: Model, spike_prompt: str | None) -> Calibration:
    prompts = (*PROMPTS, *([spike_prompt] if spike_prompt else []))
    return Calibration(blocks, prompt_ids(load_tokenizer(model.checkpoint), prompts, blocks.ids))
