"""Many cuts of one model side by side: each is made in passing, one layer resident, and no checkpoint is written."""

from __future__ import annotations

import csv
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from surgery.calibration import TokenBlocks
from surgery.checkpoint import Checkpoint
from surgery.devices import micro_batch
from surgery.divergence import measure
from surgery.index import ChannelIndex
from surgery.indexing import RunOptions
from surgery.mending import layer_cutter
from surgery.plan import ResizePlan
from surgery.plots import save_comparison
from surgery.prune import planned_specs
from surgery.resize import tensor_cuts
from surgery.stream import StreamedModel
from surgery.tokens import TokenStream


@dataclass(frozen=True)
class Row:
    """One cut measured on one text.

    `perplexity` and `bits_per_byte` as `surgeon eval` has them; `kl` mean over tokens of KL(dense || cut) in nats;
    `parameters` of the written checkpoint; `seconds` the cut took, repair included, measuring not.
    """

    method: str
    repair: str
    allocation: str
    sparsity: float
    text: str
    perplexity: float
    bits_per_byte: float
    kl: float
    parameters: int
    seconds: float


class Comparison:
    """Measures cuts of one checkpoint on `texts`; the dense model is run once, and is the first row of each text."""

    def __init__(
        self, checkpoint: Checkpoint, index: ChannelIndex, texts: list[TokenBlocks], options: RunOptions
    ) -> None:
        self.checkpoint = checkpoint
        self.index = index
        self.texts = texts
        self.options = options
        self.dense: list[TokenStream] = []
        self.rows: list[Row] = []

    def add_dense(self) -> list[Row]:
        """Measure the model as it is. Call it first."""
        model = StreamedModel(self.checkpoint, self.options.device, self.options.dtype)
        self.dense = self._streams(model)
        for number, layer in model.walk(range(len(model.layers))):
            for stream in self.dense:
                stream.forward(number, layer)
        return self._measure(
            model, self.dense, ("dense", "none", "none", 0.0), self.checkpoint.parameters, 0.0
        )

    def add(self, plan: ResizePlan) -> list[Row]:
        """Carry out a plan in memory, layer by layer, and measure it."""
        model = StreamedModel(self.checkpoint, self.options.device, self.options.dtype)
        streams = self._streams(model)
        with model.outside():
            cut_layer = layer_cutter(model, plan, self.index.input_ids.long(), self.options)
        seconds = 0.0
        for number, layer in model.walk(range(len(model.layers))):
            started = time.monotonic()
            cut_layer(number, layer)
            seconds += time.monotonic() - started
            for stream in streams:
                stream.forward(number, layer)
        specs = planned_specs(self.checkpoint, plan, tensor_cuts(model.skeleton))
        parameters = sum(spec.numel for spec in specs.values())
        name = (plan.method, plan.repair, plan.allocation, plan.sparsity)
        return self._measure(model, streams, name, parameters, seconds)

    def _streams(self, model: StreamedModel) -> list[TokenStream]:
        found = []
        for blocks in self.texts:
            step = micro_batch(blocks.ids.shape[1], self.options.device)
            memory = self.options.memory // (2 * len(self.texts))
            found.append(TokenStream(model, blocks.ids.long(), micro_batch=step, host_bytes=memory))
        return found

    def _measure(
        self,
        model: StreamedModel,
        streams: list[TokenStream],
        name: tuple[str, str, str, float],
        parameters: int,
        seconds: float,
    ) -> list[Row]:
        made = []
        with model.outside(), torch.no_grad():
            for blocks, stream, dense in zip(self.texts, streams, self.dense, strict=True):
                (found,) = measure(model, dense, [stream])
                made.append(
                    Row(
                        *name,
                        blocks.name,
                        found.perplexity,
                        found.nats / math.log(2) / blocks.predicted_bytes,
                        found.kl,
                        parameters,
                        seconds,
                    )
                )
        self.rows += made
        return made


def save_rows(rows: list[Row], folder: Path) -> None:
    """Write compare.csv and compare.png into an existing folder."""
    with (folder / "compare.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(Row.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    save_comparison(folder / "compare.png", rows)
