"""Two models on the same text: bits per byte of both, KL divergence, and how often they agree on a token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from surgery.budget.model_size import ModelSize
from surgery.budget.pass_cost import PassCost, PassJob, StreamShape, merged_cost, pass_cost
from surgery.checkpoint.transformers_model import load_tokenizer
from surgery.engine.loss import head_slices
from surgery.engine.open_model import Model
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.errors import UsageError
from surgery.evaluate.perplexity import Perplexity
from surgery.progress import Progress, no_progress
from surgery.text import TokenBlocks


@dataclass(frozen=True)
class Estimate:
    """A mean over predicted tokens, with its standard error over blocks (None for one block)."""

    mean: float
    stderr: float | None


@dataclass(frozen=True)
class Agreement:
    """A model compared with another one, `against`, on a text.

    - `kl`: mean KL(against || model) in nats per token, at least 0.
    - `top1`: share of tokens at which both models' likeliest next token is the same, 0..1.
    - `bits_per_byte`: that of the model less that of `against`, in bits per byte of text.
    - `model` and `against`: the perplexity of each; `block_nats`: summed cross-entropy of the model on each
      block, in nats.

    Blocks are independent draws of a text to a first approximation; tokens of a block are not.
    """

    model: Perplexity
    against: Perplexity
    kl: Estimate
    top1: Estimate
    bits_per_byte: Estimate
    block_nats: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """An entry of `against.texts` in the output of `surgeon eval --json`."""
        return {
            **self.against.as_json(),
            **{
                name: {"mean": value.mean, "stderr": value.stderr}
                for name, value in (
                    ("kl", self.kl),
                    ("top1", self.top1),
                    ("bits_per_byte_more", self.bits_per_byte),
                )
            },
        }


def check_same_tokens(model: Model, against: Model) -> None:
    """Raise UsageError unless two models have the same tokenizer, without which KL has no meaning."""
    if load_tokenizer(model.checkpoint).get_vocab() != load_tokenizer(against.checkpoint).get_vocab():
        raise UsageError(
            "KL divergence and agreement need models of one tokenizer",
            where=model.name,
            expected=f"the tokenizer of {against.name}",
            next_step="compare bits per byte instead: run `surgeon eval` on each",
        )


@torch.no_grad()
def last_states(
    model: Model,
    texts: Sequence[TokenBlocks],
    cost: PassCost,
    progress: Progress[Any] = no_progress,
) -> list[TokenStream]:
    """The blocks of every text after the last layer, one decoder layer in memory at a time.

    Raises NumericsError on NaN.
    """
    streamed = StreamedModel(model)
    with streamed.other_weights():
        streams = [
            TokenStream(
                streamed,
                blocks.ids.long(),
                micro_batch=cost.blocks_together(blocks.ids.shape[1]),
                place=cost.hidden_on,
            )
            for blocks in texts
        ]
    count = len(streamed.layers)
    for number, layer in progress(streamed.stream_layers(range(count)), "forward", count):
        for stream in streams:
            stream.forward(number, layer)
    return streams


def agreement_cost(model: Model, against: Model, shapes: Sequence[tuple[int, ...]]) -> PassCost:
    """Cost of running both models on blocks of `shapes` [N, T], one after the other, and comparing them.

    Raises MemoryBudgetError.
    """
    costs = []
    streams = tuple(StreamShape(blocks, size, copies=2) for blocks, size in shapes)
    longest = max(size for _, size in shapes)
    for one, other in ((model, against), (against, model)):
        beside = ModelSize.of(other.meta_model, other.run.dtype, longest).other_resident
        job = PassJob(streams, compares=True, beside_head=beside)
        costs.append(pass_cost(one.meta_model, job, one.run))
    return merged_cost(costs)


@torch.no_grad()
def measure_agreement(stream: TokenStream, against: TokenStream, blocks: TokenBlocks) -> Agreement:
    """Compare two models' streams of the same blocks, both after the last layer."""
    sums = torch.zeros(len(stream.ids), 4, dtype=torch.float64, device="cpu")  # nats, nats, KL, agreeing
    model, other = stream.model, against.model
    with model.other_weights(), other.other_weights():
        for block in range(len(stream.ids)):
            part = slice(block, block + 1)
            hidden, other_hidden = stream.last_hidden(part)[0], against.last_hidden(part)[0]
            targets = stream.ids[block, 1:].to(model.device)
            for rows in head_slices(model, len(targets)):
                log_p = functional.log_softmax(model.logits(hidden[rows]).float(), -1)
                log_q = functional.log_softmax(other.logits(other_hidden[rows]).float(), -1)
                sums[block] += (
                    torch.stack(
                        [
                            functional.nll_loss(log_p, targets[rows], reduction="sum"),
                            functional.nll_loss(log_q, targets[rows], reduction="sum"),
                            (log_q.exp() * (log_q - log_p)).sum(),
                            (log_p.argmax(-1) == log_q.argmax(-1)).sum(),
                        ]
                    )
                    .double()
                    .cpu()
                )
            model.malloc.trim()
    size = stream.ids.shape[1]
    bits = (sums[:, 0] - sums[:, 1]) / math.log(2) * len(sums) / blocks.predicted_bytes
    facts = (len(sums) * (size - 1), blocks.predicted_bytes, size, blocks.name, blocks.digest)
    ours, theirs = (Perplexity(float(sums[:, place].sum()), *facts) for place in (0, 1))
    kl, top1 = (_estimate(sums[:, place] / (size - 1)) for place in (2, 3))
    return Agreement(ours, theirs, kl, top1, _estimate(bits), tuple(sums[:, 0].tolist()))


def _estimate(values: torch.Tensor) -> Estimate:
    """Mean and standard error of values [N] of blocks."""
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return Estimate(float(values.mean()), error)


def compare_on_text(
    model: Model, against: Model, blocks: TokenBlocks, progress: Progress[Any] = no_progress
) -> Agreement:
    """Run two models of one tokenizer on `blocks` and compare them.

    Raises MemoryBudgetError, NumericsError, and UsageError for two tokenizers.
    """
    check_same_tokens(model, against)
    cost = agreement_cost(model, against, [blocks.ids.shape])
    (ours,) = last_states(model, [blocks], cost, progress)
    (theirs,) = last_states(against, [blocks], cost, progress)
    return measure_agreement(ours, theirs, blocks)
