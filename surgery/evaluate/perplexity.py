"""Perplexity of any checkpoint, one layer in memory at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from surgery import defaults
from surgery.budget.pass_cost import EDIT_BYTES, PassCost, PassJob, StreamShape, pass_cost
from surgery.checkpoint.transformers_model import load_tokenizer, text_config
from surgery.engine.loss import next_token_loss
from surgery.engine.open_model import Model
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.model.meta_model import LayerEdit
from surgery.progress import Progress, no_progress
from surgery.text import TokenBlocks, first_blocks, open_text

CONVENTION = (
    "rows joined by two newlines, tokenised once, non-overlapping blocks of {block_size} tokens, "
    "last partial block dropped, first token of a block not predicted (as GPTQ)"
)


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a model on a text.

    `nats` is the summed cross-entropy over `tokens` predicted tokens, which are `utf8_bytes` bytes of text;
    `block_nats` is that of each block, from which `surgery.bootstrap` makes intervals.
    """

    nats: float
    tokens: int
    utf8_bytes: int
    block_size: int
    text: str
    digest: str
    block_nats: tuple[float, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens); infinity where that overflows."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """nats / (ln 2 * bytes of text); comparable between tokenizers."""
        return self.nats / math.log(2) / self.utf8_bytes

    def as_json(self) -> dict[str, Any]:
        """The content of `surgeon eval --json` and of the entry in surgeon.json."""
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
            "block_nats": list(self.block_nats),
        }

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4f}, {self.bits_per_byte:.4f} bits per byte "
            f"({self.tokens:,} tokens of {self.text})"
        )


def perplexity(
    model: Model,
    text: str | TokenBlocks = defaults.EVALUATION_TEXT,
    *,
    blocks: int | None = None,
    block_size: int | None = None,
    edit: LayerEdit | None = None,
    progress: Progress[Any] = no_progress,
) -> Perplexity:
    """Perplexity of a model on a text, each block of tokens on its own, one layer in memory at a time.

    `text` is a named text, a file, a dataset as ID[:CONFIG[:SPLIT]], or blocks. `blocks` limits the number of
    blocks, from the first; `block_size` is that of `evaluation_blocks`. `edit` may change each layer's
    weights as they are loaded (masking, ablation). Raises CalibrationError as `evaluation_blocks` does,
    MemoryBudgetError for a budget that is too small, NumericsError on NaN.
    """
    drawn = evaluation_blocks(model, text, blocks, block_size) if isinstance(text, str) else text
    cost = perplexity_cost(model, *drawn.ids.shape, edits=edit is not None)
    streamed = StreamedModel(model, edit)
    step = cost.blocks_together(drawn.ids.shape[1])
    stream = TokenStream(streamed, drawn.ids.long(), micro_batch=step, place=cost.hidden_on)
    count = len(streamed.layers)
    for number, layer in progress(streamed.stream_layers(range(count)), "forward", count):
        stream.forward(number, layer)
    nats = next_token_loss(stream)
    rows, size = drawn.ids.shape
    return Perplexity(
        nats=float(nats.sum()),
        tokens=rows * (size - 1),
        utf8_bytes=drawn.predicted_bytes,
        block_size=size,
        text=drawn.name,
        digest=drawn.digest,
        block_nats=tuple(nats.tolist()),
    )


def perplexity_cost(model: Model, blocks: int, block_size: int, *, edits: bool = False) -> PassCost:
    """Cost of measuring perplexity; `edits` adds float32 copies for layer edits. Raises MemoryBudgetError."""
    job = PassJob((StreamShape(blocks, block_size),), edit_bytes=EDIT_BYTES * edits)
    return pass_cost(model.meta_model, job, model.run)


def evaluation_blocks(
    model: Model,
    text: str,
    blocks: int | None = None,
    block_size: int | None = None,
    text_column: str | None = None,
) -> TokenBlocks:
    """The first `blocks` blocks (default: all) of `block_size` tokens of a text.

    The default size is that of `default_block_size`; `text_column` names the column of a data set. Raises
    CalibrationError for a text that can't be read, is empty or too short.
    """
    tokenizer = load_tokenizer(model.checkpoint)
    size = block_size or default_block_size(model.checkpoint.config)
    return first_blocks(tokenizer, open_text(text, tokenizer, text_column), block_size=size, blocks=blocks)


def default_block_size(config: dict[str, Any]) -> int:
    """2048, or the context length of the model if that is shorter."""
    text = text_config(config)
    lengths = [
        text.get(key) for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    ]
    return min([2048, *(length for length in lengths if isinstance(length, int) and length > 1)])
