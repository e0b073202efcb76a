"""Calibration data of an index: blocks of a text, and prompts that are searched for super weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery import defaults
from surgery.checkpoint.transformers_model import load_tokenizer
from surgery.engine.open_model import Model
from surgery.index.spike_detector import PROMPTS, prompt_ids
from surgery.text import TokenBlocks, read_text, token_blocks


@dataclass(frozen=True)
class Calibration:
    """Calibration blocks [N, T], and the token ids [P] of each prompt that is searched for super weights."""

    blocks: TokenBlocks
    prompts: list[torch.Tensor]


def calibrate(
    model: Model,
    text: str = defaults.CALIBRATION_TEXT,
    *,
    blocks: int = defaults.BLOCKS,
    block_size: int = defaults.BLOCK_SIZE,
    seed: int = defaults.SEED,
    spike_prompt: str | None = None,
) -> Calibration:
    """Draw `blocks` blocks of `block_size` tokens from a text with `seed`.

    `text` is a named text, a file, or a dataset as ID[:CONFIG[:SPLIT]]. `spike_prompt` is searched for super
    weights in addition to the built-in prompts. Raises CalibrationError when the text can't be read or is too
    short.
    """
    tokenizer = load_tokenizer(model.checkpoint)
    words, name = read_text(text)
    drawn = token_blocks(tokenizer, words, name, block_size=block_size, blocks=blocks, seed=seed)
    prompts = (*PROMPTS, *([spike_prompt] if spike_prompt else []))
    return Calibration(drawn, prompt_ids(tokenizer, prompts, drawn.ids))
