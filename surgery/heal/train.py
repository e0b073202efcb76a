"""Trains a student: steps over batches of blocks, held-out measures along the way, the best state kept.

A step is that of a plain loop: the gradients of all layers are there before any of them is clipped and used.
With several processes each takes its share of the blocks; sums over all of them make the same step in each.
Shape letters: N blocks, T tokens of a block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from surgery.engine import distributed
from surgery.engine.loss import next_token_loss
from surgery.engine.resume import Journal
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.errors import NumericsError
from surgery.heal.distil_loss import DistilLoss, TopTokens, counted_tokens, distil
from surgery.heal.optimizer import Optimizer
from surgery.heal.train_stream import GraphBudget, TrainingStream, all_layers
from surgery.heal.trainable import Trainables
from surgery.progress import Progress, no_progress

MEASURES = 8  # held-out measures in a run, beside that before
# Measures without an improvement after which training stops. Held-out texts are few blocks, whose measures
# are noisy until the learning rate falls: with 3 a heal of SmolLM2 stopped at 240 of 391 steps.
PATIENCE = 5
SAVE_SECONDS = 30.0  # between two saves of the state; up to twice as many where a save takes long
SAVE_SHARE = 0.1  # of the time, as far as that goes, for saves


@dataclass(frozen=True)
class HeldOut:
    """Blocks [N, T] of each text, by name, that are never trained on."""

    texts: dict[str, torch.Tensor]

    @property
    def ids(self) -> torch.Tensor:
        """The blocks of all texts."""
        return torch.cat(list(self.texts.values()))


@dataclass
class History:
    """What a run has seen: `losses` of every step; `measures`, each {"step", "nats" by held-out text}; the
    `seconds` it took; `best`, the place of the best measure.
    """

    losses: list[float] = field(default_factory=list)
    measures: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    best: int = 0

    def mean(self, place: int) -> float:
        """Mean log-perplexity over the held-out texts at a measure, nats a token."""
        nats = self.measures[place]["nats"].values()
        return float(sum(nats) / len(nats))

    @property
    def improved(self) -> bool:
        """Whether the best measure is better than that before training."""
        return self.best > 0

    @property
    def stalled(self) -> bool:
        """Whether the last PATIENCE measures were no better than an earlier one."""
        return len(self.measures) - 1 - self.best >= PATIENCE


@dataclass(frozen=True)
class Schedule:
    """Which blocks make which step: `order` holds block numbers, `batch` of them a step."""

    order: torch.Tensor
    batch: int

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return -(-len(self.order) // self.batch)

    def blocks(self, step: int) -> torch.Tensor:
        """Numbers of the blocks of a step."""
        return self.order[step * self.batch : (step + 1) * self.batch]

    def own_blocks(self, step: int) -> torch.Tensor:
        """Numbers of those blocks of a step that this process trains on; none where a step is too small."""
        blocks = self.blocks(step)
        return blocks[distributed.shard(len(blocks))]

    @property
    def own(self) -> torch.Tensor:
        """Numbers, in rising order, of all blocks that this process trains on."""
        own: torch.Tensor = torch.cat([self.own_blocks(step) for step in range(self.steps)]).unique()
        return own

    @property
    def own_batch(self) -> int:
        """The most blocks of a step that this process trains on."""
        return len(range(self.batch)[distributed.shard(self.batch)])

    def measures_after(self, done: int) -> bool:
        """Whether held-out blocks are measured when so many steps are done."""
        every = max(1, self.steps // MEASURES)
        return done == self.steps or (done % every == 0 and self.steps - done >= every // 2)


@dataclass(frozen=True)
class Division:
    """How memory is divided: blocks in a layer at once, where hidden states are, bytes of kept graphs."""

    micro_batch: int
    place: str = "device"
    graph_bytes: int = 0


class Trainer:
    """Trains what `trainables` holds of a student on blocks of ids [N, T], towards a teacher's targets.

    `targets(block numbers)` gives the targets of those blocks of a batch that this process trains on. The
    loss is on the predicted tokens that are `counted` [N, T], all by default. With `journal` the state is
    saved at least every SAVE_SECONDS, and an interrupted run goes on from there with the same result.
    """

    def __init__(
        self,
        model: StreamedModel,
        trainables: Trainables,
        ids: torch.Tensor,
        targets: Callable[[torch.Tensor], TopTokens],
        *,
        held_out: HeldOut,
        counted: torch.Tensor | None = None,
        schedule: Schedule,
        peak: float,
        loss: DistilLoss | None = None,
        division: Division | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.model = model
        self.trainables = trainables
        self.ids = ids
        self.targets = targets
        self.held_out = held_out
        self.counted = torch.ones_like(ids, dtype=torch.bool) if counted is None else counted
        self.schedule = schedule
        self.loss = loss or DistilLoss()
        self.division = division or Division(1)
        self.journal = journal
        self.state = trainables.state
        self.optimizer = Optimizer(self.state, peak, schedule.steps)
        self.graphs = GraphBudget(self.division.graph_bytes)
        self.history = History()
        self.saved, self.saves = time.monotonic(), 0  # when the state was saved last, and how often
        self.save_seconds = 0.0  # that the last save took

    def step(self, number: int) -> float:
        """Carry out one step; returns the mean loss of its counted tokens in nats.

        Raises NumericsError, DistributedError.
        """
        own = self.schedule.own_blocks(number)
        tokens = counted_tokens(self.counted[self.schedule.blocks(number)])
        stream, loss = None, 0.0
        if len(own):
            stream = self._forward(own)
            loss = distil(stream, self.targets(own), self.loss, self.counted[own], tokens)
        for layer_number, found in self._backward(stream):
            summed = distributed.sum_tensors(found)
            self.state.put_gradients({f"{layer_number}.{path}": one for path, one in summed.items()})
        loss = float(self._summed(torch.tensor(loss, dtype=torch.float64, device="cpu")))
        norm = self.optimizer.step(number)
        if not (loss < float("inf") and norm < float("inf")):
            raise NumericsError(
                "the loss or its gradient is not finite",
                where=f"step {number + 1}",
                next_step="use a smaller --learning-rate, or --dtype float32",
            )
        return loss

    def _forward(self, blocks: torch.Tensor) -> TrainingStream:
        """A stream of the blocks with these numbers that has left the last layer."""
        stream = TrainingStream(
            self.model,
            self.ids[blocks],
            self.trainables,
            micro_batch=self.division.micro_batch,
            place=self.division.place,
            graphs=self.graphs,
        )
        for number, layer in all_layers(self.model):
            stream.forward(number, layer)
        return stream

    def _backward(self, stream: TrainingStream | None) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """(Layer, path -> gradient) from the last layer on: those of a stream, or zeros without one."""
        if stream is not None:
            for number, layer in all_layers(self.model, backwards=True):
                yield number, stream.train_backward(number, layer)
            return
        for number in reversed(range(len(self.model.layers))):
            masters = self.trainables.of_layer(number)
            yield number, {path: torch.zeros_like(master) for path, master in masters.items()}

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of float64 numbers over all processes."""
        return distributed.sum_numbers(values, self.model.device)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Mean cross-entropy in nats a token of every held-out text, with the masters as they are.

        Raises DistributedError.
        """
        ids = self.held_out.ids
        own = distributed.shard(len(ids))
        sums = torch.zeros(len(ids), dtype=torch.float64, device="cpu")
        if own.stop > own.start:
            stream = TokenStream(
                self.model, ids[own], micro_batch=self.division.micro_batch, place=self.division.place
            )
            for number, layer in all_layers(self.model):
                with self.trainables.installed(number, layer):
                    stream.forward(number, layer)
            sums[own] = next_token_loss(stream)
        counts = [len(blocks) for blocks in self.held_out.texts.values()]
        means = [float(part.mean()) / (ids.shape[1] - 1) for part in self._summed(sums).split(counts)]
        return dict(zip(self.held_out.texts, means, strict=True))

    def run(self, progress: Progress[Any] = no_progress) -> History:
        """Train to the end, or until held-out measures stop improving; the best state is then in place."""
        first = self._resume()
        started = time.monotonic() - self.history.seconds
        if not self.history.measures:
            self._note(0)
        count = self.schedule.steps
        for number in progress(range(first, count), "steps", count - first):
            if self.history.stalled:
                break
            self.history.losses.append(self.step(number))
            if self.schedule.measures_after(number + 1):
                self._note(number + 1)
            self.history.seconds = time.monotonic() - started
            self._save(number + 1)
        self.state.use_best()
        return self.history

    def _note(self, step: int) -> None:
        """Measure after `step` steps, and keep the state where that is the best so far."""
        history = self.history
        history.measures.append({"step": step, "nats": self.measure()})
        last = len(history.measures) - 1
        if last == 0 or history.mean(last) < history.mean(history.best):
            history.best = last
            self.state.keep_best()

    def _save(self, done: int) -> None:
        """Save the state after `done` steps, unless it was saved a moment ago."""
        last = done == self.schedule.steps
        if self.journal is None or not (last or self._due()):
            return
        self.saves += 1
        started = time.monotonic()
        self.state.save(self.journal, self.saves, {"done": done, "history": asdict(self.history)})
        self.saved = time.monotonic()
        self.save_seconds = self.saved - started

    def _due(self) -> bool:
        """Whether it is time for a save, by the clock of the first process.

        The state of all parameters is 16 bytes each: on a slow disk, writing it every SAVE_SECONDS would take
        longer than the steps in between.
        """
        pause = min(2 * SAVE_SECONDS, max(SAVE_SECONDS, self.save_seconds / SAVE_SHARE))
        return distributed.first_says(time.monotonic() - self.saved >= pause, self.model.device)

    def _resume(self) -> int:
        """Take up the last saved state; returns the number of steps that were done."""
        fields = None if self.journal is None else self.state.load(self.journal)
        if fields is None or self.journal is None:
            return 0
        self.saves = self.state.last_save(self.journal)
        self.history = History(**fields["history"])
        return int(fields["done"])
