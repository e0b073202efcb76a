"""Log-likelihoods of continuations after contexts, for many requests in one pass over the layers.

This is what multiple-choice tasks ask of a model. Requests are sorted by length and padded on the right, into
batches of a few lengths. Attention is causal, so a token never sees the padding after it, and the padding
changes no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from surgery.budget.pass_cost import PassCost, PassJob, StreamShape, merged_cost, pass_cost
from surgery.engine.loss import HEAD_ELEMENTS
from surgery.engine.open_model import Model
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.errors import CalibrationError
from surgery.progress import Progress, no_progress

STEPS = 8  # padded lengths between a power of two and the next: at most an eighth of a block is padding
SHORTEST = 8  # tokens of the shortest block


@dataclass(frozen=True)
class Request:
    """Score `continuation` after `context`; both are token ids, neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """`nats`: ln P(continuation | context), at most 0. `greedy`: whether every token is the likeliest."""

    nats: float
    greedy: bool


@dataclass(frozen=True)
class _Row:
    """An input that is run once, and the (request, end of its own input) that are read from it."""

    ids: tuple[int, ...]
    requests: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Batch:
    """Rows that are padded to `length` tokens."""

    length: int
    rows: tuple[_Row, ...]

    @property
    def ids(self) -> torch.Tensor:
        """Token ids [N, T], padded with 0 on the right."""
        padded = torch.zeros(len(self.rows), self.length, dtype=torch.long, device="cpu")
        for place, row in enumerate(self.rows):
            padded[place, : len(row.ids)] = torch.tensor(row.ids, device="cpu")
        return padded


def score_continuations(
    opened: Model,
    requests: Sequence[Request],
    *,
    max_length: int,
    progress: Progress[Any] = no_progress,
) -> list[Score]:
    """Score every request, one decoder layer in memory at a time.

    Context and continuation are cut from the left to `max_length` + 1 tokens, of which the last is not run.
    An input that begins another input is not run again. The model is read once for as many requests as the
    memory budget holds. Raises CalibrationError for a request without context or continuation, or with a
    continuation longer than `max_length`; MemoryBudgetError; NumericsError on NaN.
    """
    scores: dict[int, Score] = {}
    for batches, cost in _passes(opened, _batches(opened, _inputs(requests, max_length))):
        scores |= _run_pass(opened, requests, batches, cost, progress)
    return [scores[number] for number in range(len(requests))]


def scoring_cost(opened: Model, requests: Sequence[Request], *, max_length: int) -> PassCost:
    """Cost of `score_continuations`, all passes together. Raises as that does."""
    passes = _passes(opened, _batches(opened, _inputs(requests, max_length)))
    return merged_cost([cost for _, cost in passes])


def _inputs(requests: Sequence[Request], max_length: int) -> list[tuple[int, ...]]:
    """The tokens that are run for each request: all but the last."""
    found = []
    for number, request in enumerate(requests):
        if not request.context or not 1 <= len(request.continuation) <= max_length:
            raise CalibrationError(
                "a request can't be scored",
                where=f"request {number}",
                expected=f"a context, and a continuation of 1 to {max_length} tokens",
                found=f"{len(request.context)} and {len(request.continuation)} tokens",
            )
        found.append((request.context + request.continuation)[-(max_length + 1) :][:-1])
    return found


def _batches(opened: Model, inputs: list[tuple[int, ...]]) -> list[_Batch]:
    """Rows by padded length, longest first. Inputs that begin another one share its row."""
    exact = length_matters(opened.meta_model.config.get_text_config())
    asked: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for number, ids in enumerate(inputs):
        asked.setdefault(ids, []).append((number, len(ids)))
    # In lexicographic order, an input that begins any later one begins the next one.
    for ids, following in pairwise(sorted(asked)):
        if following[: len(ids)] == ids and not exact:
            asked[following] += asked.pop(ids)
    by_length: dict[int, list[_Row]] = {}
    for ids, numbers in asked.items():
        length = len(ids) if exact else padded_length(len(ids))
        by_length.setdefault(length, []).append(_Row(ids, tuple(numbers)))
    return [_Batch(length, tuple(by_length[length])) for length in sorted(by_length, reverse=True)]


def length_matters(config: Any) -> bool:
    """Whether a block's length changes the positions of its first tokens, as some rotary embeddings do."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def padded_length(tokens: int) -> int:
    """The least length of a block that holds `tokens` tokens: a power of two, or one of STEPS to the next."""
    if tokens <= SHORTEST:
        return SHORTEST
    step = max(1, (1 << (tokens - 1).bit_length()) // (2 * STEPS))
    return -(-tokens // step) * step


def _passes(opened: Model, batches: list[_Batch]) -> list[tuple[list[_Batch], PassCost]]:
    """Batches that share a pass, with its cost: halved until their hidden states do not go to disk.

    Reading the layers once more takes less time than moving hidden states to the disk and back in each layer.
    """
    if not batches:
        return []
    shapes = tuple(StreamShape(len(batch.rows), batch.length) for batch in batches)
    masks = sum(4 * batch.length**2 for batch in batches[1:])  # those of the longest are in the cost already
    cost = pass_cost(opened.meta_model, PassJob(shapes, beside=masks), opened.run)
    count = sum(len(batch.rows) for batch in batches)
    if cost.hidden_on != "disk" or count == 1:
        return [(batches, cost)]
    first, second = _halves(batches)
    return _passes(opened, first) + _passes(opened, second)


def _halves(batches: list[_Batch]) -> tuple[list[_Batch], list[_Batch]]:
    """Batches with the first half of the tokens, cut inside a batch where that is the only one."""
    if len(batches) == 1:
        length, rows = batches[0].length, batches[0].rows
        middle = len(rows) // 2
        return [_Batch(length, rows[:middle])], [_Batch(length, rows[middle:])]
    tokens = [batch.length * len(batch.rows) for batch in batches]
    place, done = 1, tokens[0]
    while place < len(batches) - 1 and 2 * (done + tokens[place]) <= sum(tokens):
        done += tokens[place]
        place += 1
    return batches[:place], batches[place:]


def _run_pass(
    opened: Model,
    requests: Sequence[Request],
    batches: list[_Batch],
    cost: PassCost,
    progress: Progress[Any],
) -> dict[int, Score]:
    """The scores of the requests of `batches`, by number."""
    model = StreamedModel(opened)
    with model.other_weights():
        streams = [
            TokenStream(
                model, batch.ids, micro_batch=cost.blocks_together(batch.length), place=cost.hidden_on
            )
            for batch in batches
        ]
    count = len(model.layers)
    for number, layer in progress(model.stream_layers(range(count)), "layers", count):
        for stream in streams:
            stream.forward(number, layer)
    scores: dict[int, Score] = {}
    with model.other_weights():
        for batch, stream in zip(batches, streams, strict=True):
            for part in stream.slices:
                rows = batch.rows[part]
                scores |= _read_scores(model, requests, rows, stream.last_hidden(part))
                model.malloc.trim()
    return scores


@torch.no_grad()
def _read_scores(
    model: StreamedModel, requests: Sequence[Request], rows: tuple[_Row, ...], hidden: torch.Tensor
) -> dict[int, Score]:
    """Scores of the requests of a micro-batch, from its last hidden states [n, T, D]."""
    numbers: list[int] = []
    places: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for place, row in enumerate(rows):
        for number, end in row.requests:
            continuation = requests[number].continuation
            numbers += [number] * len(continuation)
            places += [place] * len(continuation)
            positions += range(end - len(continuation), end)
            targets += continuation
    chosen = hidden[places, positions]
    wanted = torch.tensor(targets, device=hidden.device)
    vocabulary = model.model.config.get_text_config().vocab_size
    step = max(1, min(HEAD_ELEMENTS // vocabulary, hidden.shape[1]))
    nats, greedy = [], []
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        logits = model.logits(chosen[part]).float()
        picked = logits.gather(-1, wanted[part, None])[:, 0]
        nats.append((picked - logits.logsumexp(-1)).double().cpu())
        greedy.append((logits.argmax(-1) == wanted[part]).cpu())
    sums: dict[int, list[Any]] = {}
    for number, value, best in zip(
        numbers, torch.cat(nats).tolist(), torch.cat(greedy).tolist(), strict=True
    ):
        total = sums.setdefault(number, [0.0, True])
        total[0] += value
        total[1] &= best
    return {number: Score(*total) for number, total in sums.items()}
