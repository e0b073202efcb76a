"""Tiny random models of every family, and what tests share: paths, a byte tokenizer, calibration options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers.model_families import config_fields
from surgery.checkpoint.reader import Checkpoint
from surgery.engine.open_model import Model
from surgery.engine.run_options import RunOptions
from surgery.text import Text, TokenBlocks, draw_blocks, first_blocks

PLENTY = 8 << 30  # a memory budget that holds every tiny model
ROOT = Path(__file__).parent.parent.parent
REAL_MODEL = ROOT / ".cache" / "SmolLM2-135M-Instruct"
CALIBRATION = ["--calibration", "text.txt", "--blocks", "4", "--block-size", "32"]
REAL_TEXT = ROOT / ".cache" / "wikipedia.txt"

FAMILIES = [
    "llama",
    "llama-tied-bias",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "mixtral",
    "deepseek_v3",
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ messages[0].content }}"
    return fast


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model of a variant of `model_families`, weights large enough that its layers matter."""
    config = AutoConfig.for_model(**{**config_fields(family), **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0  # as some families set it on loading
    return model.to(dtype)


def token_blocks(
    tokenizer: Any,
    text: str,
    name: str,
    *,
    block_size: int,
    blocks: int | None = None,
    seed: int | None = None,
) -> TokenBlocks:
    """Blocks of a string: with `seed` a sample of `blocks` blocks, else the first ones."""
    source = Text(name, lambda _: iter([text]), size=len(text.encode()))
    if seed is None:
        return first_blocks(tokenizer, source, block_size=block_size, blocks=blocks)
    return draw_blocks(tokenizer, [source], block_size=block_size, blocks=blocks or 1, seed=seed)


def opened(
    folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", memory: int = PLENTY
) -> Model:
    """A checkpoint folder as a Model, to compute in `dtype` on `device` within `memory` bytes."""
    return Model(Checkpoint.open(folder), RunOptions(torch.device(device), dtype, memory))
