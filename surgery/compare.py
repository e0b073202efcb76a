"""Many cuts of one model side by side: each is made in passing, one layer resident, and no checkpoint is written."""

from __future__ import annotations

import contextlib
import csv
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from surgery.calibration import TokenBlocks
from surgery.checkpoint import Checkpoint
from surgery.cut_costs import CutCosts, CutJob, cut_costs
from surgery.dense import DenseStream
from surgery.devices import micro_batch
from surgery.divergence import measure
from surgery.index import ChannelIndex, Track, untracked
from surgery.indexing import RunOptions
from surgery.journal import Journal
from surgery.mending import dense_stream, mender
from surgery.plan import REPAIRS, ResizePlan
from surgery.plots import save_comparison
from surgery.prune import planned_specs
from surgery.resize import mask_channels, tensor_cuts
from surgery.skeleton import Skeleton
from surgery.stream import StreamedModel
from surgery.tokens import TokenStream


@dataclass(frozen=True)
class Row:
    """One cut measured on one text.

    `perplexity` and `bits_per_byte` as `surgeon eval` has them; `kl` mean over tokens of KL(dense || cut) in nats;
    `parameters` of the written checkpoint; `seconds` the cut took or would take alone, repair included, measuring not.
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
    """Measures cuts of one checkpoint on `texts`, many in one walk over its layers.

    The dense model's streams are shared by all: those of the texts, to which each cut's predictions are compared, and that
    of the calibration text, which repairs aim at. Between two cuts a layer's weights are put back.
    """

    def __init__(
        self, checkpoint: Checkpoint, index: ChannelIndex, texts: list[TokenBlocks], options: RunOptions
    ) -> None:
        self.checkpoint = checkpoint
        self.index = index
        self.texts = texts
        self.options = options
        self.rows: list[Row] = []

    def add(
        self, plans: list[ResizePlan], track: Track[Any] = untracked, journal: Journal | None = None
    ) -> list[Row]:
        """Measure the model as it is, and with each plan carried out in memory; as many in one walk as memory allows.

        With `journal`, walks that are done are not done again.
        """
        skeleton = Skeleton(self.checkpoint, self.options.dtype)
        together, self.costs = share_walks(skeleton, self.job(plans), self.options)
        for start in range(0, max(1, len(plans)), together):
            step = f"walk {start}"
            if journal is not None and step in journal:
                self.rows += [Row(**row) for row in journal.load(f"walk-{start}")[0]["rows"]]
                continue
            before = len(self.rows)
            self._walk(plans[start : start + together], with_dense=start == 0, track=track)
            if journal is not None:
                journal.save(f"walk-{start}", {"rows": [asdict(row) for row in self.rows[before:]]})
                journal.mark(step)
        return self.rows

    def job(self, plans: list[ResizePlan]) -> CutJob:
        """All that is to be done, as one walk."""
        repairs = {plan.repair for plan in plans}
        kept = [
            {unit: max(len(layer.ffns[unit].kept) for layer in layers) for unit in layers[0].ffns}
            for layers in zip(*(plan.layers for plan in plans), strict=True)
        ]
        return comparison_job(kept, repairs, self.index.input_ids.shape, len(plans), self.texts)

    def _walk(self, plans: list[ResizePlan], with_dense: bool, track: Track[Any]) -> None:
        model = StreamedModel(
            self.checkpoint, self.options.device, self.options.dtype, memory=self.options.memory
        )
        with model.outside() if self.costs.ends_held else contextlib.nullcontext():
            self._make_cuts(model, plans, with_dense, track)

    def _make_cuts(
        self, model: StreamedModel, plans: list[ResizePlan], with_dense: bool, track: Track[Any]
    ) -> None:
        with model.outside():
            dense = self._streams(model)
            calibration = None
            if any(plan.repair != "none" for plan in plans):
                calibration = dense_stream(model, self.index.input_ids.long(), self.costs)
            cuts = [_Cut(model, plan, self._streams(model), calibration, self.costs) for plan in plans]
        shared = 0.0
        count = len(model.layers)
        for number, layer in track(model.walk(range(count)), "layers", count):
            for stream in dense:
                stream.forward(number, layer)
            started = time.monotonic()
            if calibration is not None:
                calibration.run(number, layer)
            shared += time.monotonic() - started
            original = {name: p.data.clone() for name, p in layer.named_parameters()}
            for cut in cuts:
                cut.layer(number, layer)
                for name, parameter in layer.named_parameters():
                    parameter.data.copy_(original[name])
            if calibration is not None:
                calibration.step()
        self._measure(model, dense, cuts, with_dense, shared)

    def _streams(self, model: StreamedModel) -> list[TokenStream]:
        found = []
        for blocks in self.texts:
            step = micro_batch(blocks.ids.shape[1], self.options.device)
            found.append(TokenStream(model, blocks.ids.long(), micro_batch=step, place=self.costs.hidden_on))
        return found

    def _measure(
        self,
        model: StreamedModel,
        dense: list[TokenStream],
        cuts: list[_Cut],
        with_dense: bool,
        shared: float,
    ) -> None:
        """Rows of one walk: one for each cut and text, after those of the dense model in the first walk."""
        names = [(c.plan.method, c.plan.repair, c.plan.allocation, c.plan.sparsity) for c in cuts]
        seconds = [c.seconds + (shared if c.plan.repair != "none" else 0.0) for c in cuts]
        parameters = [self._parameters(model, cut.plan) for cut in cuts]
        columns = [cut.streams for cut in cuts]
        if with_dense:
            names.insert(0, ("dense", "none", "none", 0.0))
            seconds.insert(0, 0.0)
            parameters.insert(0, self.checkpoint.parameters)
            columns.insert(0, dense)
        found = [
            measure(model, dense[place], [streams[place] for streams in columns])
            for place in range(len(self.texts))
        ]
        for place, name in enumerate(names):
            for blocks, measured in zip(self.texts, found, strict=True):
                one = measured[place]
                bits = one.nats / math.log(2) / blocks.predicted_bytes
                row = Row(*name, blocks.name, one.perplexity, bits, one.kl, parameters[place], seconds[place])
                self.rows.append(row)

    def _parameters(self, model: StreamedModel, plan: ResizePlan) -> int:
        specs = planned_specs(self.checkpoint, plan, tensor_cuts(model.skeleton))
        return sum(spec.numel for spec in specs.values())


class _Cut:
    """One plan on its way through the layers."""

    def __init__(
        self,
        model: StreamedModel,
        plan: ResizePlan,
        streams: list[TokenStream],
        calibration: DenseStream | None,
        costs: CutCosts,
    ) -> None:
        self.plan = plan
        self.streams = streams
        self.seconds = 0.0
        self.edit: Callable[[int, nn.Module], object] = mask_channels(plan, model.skeleton.ffns)
        if plan.repair != "none":
            assert calibration is not None
            self.edit = mender(calibration, plan, costs).layer

    def layer(self, number: int, layer: nn.Module) -> None:
        """Cut the resident layer and move this cut's texts through it."""
        started = time.monotonic()
        self.edit(number, layer)
        self.seconds += time.monotonic() - started
        for stream in self.streams:
            stream.forward(number, layer)


def comparison_job(
    kept: list[dict[str, int]],
    repairs: set[str],
    calibration: tuple[int, ...],
    cuts: int,
    texts: list[TokenBlocks],
    curves: bool = False,
) -> CutJob:
    """`cuts` of at most `kept` channels, any of them repaired in any of the ways, measured on texts."""
    repair = max(repairs, key=REPAIRS.index, default="none")
    tokens = (cuts + 1) * sum(blocks.ids.numel() for blocks in texts)
    blocks, block_size = calibration
    return CutJob(kept, repair, blocks, block_size, cuts, tokens, put_back=True, curves=curves)


def share_walks(skeleton: Skeleton, job: CutJob, options: RunOptions) -> tuple[int, CutCosts]:
    """How many of a job's cuts are made in one walk, so that their hidden states need no files; what one walk takes."""
    together, each = max(1, job.cuts), job.text_tokens // (job.cuts + 1)
    while True:
        walk = replace(job, cuts=together, text_tokens=each * (together + 1))
        costs = cut_costs(skeleton, walk, options)
        if costs.hidden_on != "disk" or together == 1:
            return together, costs
        together = (together + 1) // 2


def save_rows(rows: list[Row], folder: Path) -> None:
    """Write compare.csv, compare.md and compare.png into an existing folder."""
    with (folder / "compare.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(Row.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    (folder / "compare.md").write_text(markdown(rows), encoding="utf-8")
    save_comparison(folder / "compare.png", rows)


def markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table: a line a cut, a column of perplexities a text; KL is of the first text."""
    texts = list(dict.fromkeys(row.text for row in rows))
    headings = ["method", "repair", "allocation", "removed", *texts, "KL", "parameters", "seconds"]
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    for place in range(0, len(rows), len(texts)):
        cut = rows[place : place + len(texts)]
        first = cut[0]
        cells = [first.method, first.repair, first.allocation, f"{100 * first.sparsity:.0f}%"]
        cells += [f"{row.perplexity:.1f}" for row in cut]
        cells += [f"{first.kl:.3f}", f"{first.parameters / 1e6:.1f} M", f"{first.seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
