"""Perplexity of any checkpoint, one layer in memory at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from surgery.calibration import TokenBlocks
from surgery.checkpoint import Checkpoint
from surgery.devices import micro_batch
from surgery.families import text_config
from surgery.index import Track, untracked
from surgery.indexing import RunOptions
from surgery.stream import LayerEdit, StreamedModel
from surgery.tokens import TokenStream

CONVENTION = (
    "rows joined by two newlines, tokenised once, non-overlapping blocks of {block_size} tokens, last partial block "
    "dropped, first token of a block not predicted (as GPTQ)"
)


@dataclass(frozen=True)
class Perplexity:
    """`nats` summed cross-entropy over `tokens` predicted tokens, which spell `utf8_bytes` bytes of text."""

    nats: float
    tokens: int
    utf8_bytes: int
    block_size: int
    text: str
    digest: str

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens); infinite where a float can't hold it."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """nats / (ln 2 * bytes of text): comparable across tokenizers."""
        return self.nats / math.log(2) / self.utf8_bytes

    def as_json(self) -> dict[str, Any]:
        """What `surgeon eval --json` prints and surgeon.json holds."""
        return {
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "nats": self.nats,
            "tokens": self.tokens,
            "bytes": self.utf8_bytes,
            "block_size": self.block_size,
            "text": self.text,
            "sha256": self.digest,
            "convention": CONVENTION.format(block_size=self.block_size),
        }


def measure_perplexity(
    checkpoint: Checkpoint,
    blocks: TokenBlocks,
    options: RunOptions,
    *,
    edit: LayerEdit | None = None,
    track: Track[Any] = untracked,
) -> Perplexity:
    """Perplexity of a checkpoint on blocks of tokens, each block on its own.

    `edit` may change each layer's weights as they come in (masking, ablation). Raises NumericsError on NaN.
    """
    model = StreamedModel(checkpoint, options.device, options.dtype, edit, memory=options.memory)
    step = micro_batch(blocks.ids.shape[1], options.device)
    stream = TokenStream(model, blocks.ids.long(), micro_batch=step, host_bytes=options.memory)
    count = len(model.layers)
    for number, layer in track(model.walk(range(count)), "forward", count):
        stream.forward(number, layer)
    nats = float(stream.loss().sum())
    rows, size = blocks.ids.shape
    return Perplexity(nats, rows * (size - 1), blocks.predicted_bytes, size, blocks.name, blocks.digest)


def default_block_size(config: dict[str, Any]) -> int:
    """2048, or the context length of the model where that is shorter."""
    text = text_config(config)
    lengths = [
        text.get(key) for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    ]
    return min([2048, *(length for length in lengths if isinstance(length, int) and length > 1)])
