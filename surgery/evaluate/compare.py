"""Compares pruning plans of one model in memory, without writing checkpoints."""

from __future__ import annotations

import contextlib
import csv
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.bootstrap import LEAST_BLOCKS, paired_ratio
from surgery.budget.budget import largest_micro_batch
from surgery.budget.prune_cost import PruneCost, PruneJob, prune_cost
from surgery.card.figures import save_comparison
from surgery.cut.model_cut import model_cut
from surgery.cut.slice_edits import mask_cut
from surgery.cut.tensors import edited_specs
from surgery.engine import distributed
from surgery.engine.hooks import preserved
from surgery.engine.loss import LossAndDivergence, measure_divergence
from surgery.engine.open_model import Model
from surgery.engine.resume import Journal
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.index.channel_index import ChannelIndex
from surgery.markdown import markdown_table
from surgery.plan.prune_plan import PrunePlan
from surgery.progress import Progress, no_progress
from surgery.pruning.jobs import comparison_job, kept_widths
from surgery.repair.dense_reference import DenseReference
from surgery.repair.layer_repair import LayerRepair, dense_reference
from surgery.repair.methods import REPAIRS
from surgery.text import TokenBlocks

ScaledNorms = dict[TokenStream, Callable[[], AbstractContextManager[None]]]


@dataclass(frozen=True)
class ComparisonRow:
    """Measurements of one plan on one text.

    `perplexity` and `bits_per_byte` are defined as for `surgeon eval`. `kl` is the mean over tokens of
    KL(dense || pruned) in nats. `parameters` counts those of the written checkpoint. `seconds` is the time
    that pruning and repair take if the plan runs alone, without the measurement. `factor_low` and
    `factor_high` are the 95% interval of its perplexity over the dense model's, over the text's blocks; None
    for the dense model and for fewer than LEAST_BLOCKS blocks. `cuts` are the kinds that a search for a
    target could take, "ffn" without one, and `gone` what it took beside FFN channels.
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
    factor_low: float | None = None
    factor_high: float | None = None
    cuts: str = "ffn"
    gone: str = ""


class Comparison:
    """Measures pruning plans of one model on `texts`, several plans per pass over the layers.

    All plans share the dense model's streams: those of the texts, for the KL divergence, and that of the
    calibration text, for repair targets. Each plan edits the resident layer, which is restored afterwards.
    """

    def __init__(self, opened: Model, index: ChannelIndex, texts: list[TokenBlocks]) -> None:
        self.opened = opened
        self.index = index
        self.texts = texts
        self.rows: list[ComparisonRow] = []

    def add(
        self,
        plans: list[PrunePlan],
        progress: Progress[Any] = no_progress,
        journal: Journal | None = None,
    ) -> list[ComparisonRow]:
        """Measure the dense model and each plan, with as many plans per pass as memory allows.

        Of several processes each measures some of the plans, and all have the rows of all. With `journal`,
        an interrupted run resumes after the last finished pass. Returns `rows`. Raises MemoryBudgetError,
        DistributedError.
        """
        own = distributed.own_share(plans, "cuts")
        distributed.init(self.opened.run.device)
        before = len(self.rows)
        self._add_own(own, progress, journal)
        cuts = before + len(self.texts)  # where the rows of the dense model end
        self.rows[cuts:] = distributed.of_all(self.rows[cuts:])
        return self.rows

    def _add_own(self, plans: list[PrunePlan], progress: Progress[Any], journal: Journal | None) -> None:
        """Measure the dense model and the plans that are this process's."""
        together, self.cost = share_passes(self.opened, self.job(plans))
        for start in range(0, max(1, len(plans)), together):
            step = f"pass {start}"
            if journal is not None and step in journal:
                self.rows += [ComparisonRow(**row) for row in journal.load(f"pass-{start}")[0]["rows"]]
                continue
            before = len(self.rows)
            self._run_pass(plans[start : start + together], with_dense=start == 0, progress=progress)
            if journal is not None:
                journal.save(f"pass-{start}", {"rows": [asdict(row) for row in self.rows[before:]]})
                journal.mark(step)

    def job(self, plans: list[PrunePlan]) -> PruneJob:
        """The job of measuring all plans in one pass."""
        widths = [kept_widths(plan) for plan in plans]
        kept = [
            {name: max(layer[name] for layer in layers) for name in layers[0]}
            for layers in zip(*widths, strict=True)
        ]
        repairs = {plan.repair for plan in plans}
        tokens = text_tokens(self.texts)
        return comparison_job(kept, repairs, self.index.input_ids.shape, len(plans), tokens)

    def _run_pass(self, plans: list[PrunePlan], with_dense: bool, progress: Progress[Any]) -> None:
        model = StreamedModel(self.opened)
        with model.other_weights() if self.cost.ends_held else contextlib.nullcontext():
            self._measure_cuts(model, plans, with_dense, progress)

    def _measure_cuts(
        self, model: StreamedModel, plans: list[PrunePlan], with_dense: bool, progress: Progress[Any]
    ) -> None:
        with model.other_weights():
            dense = self._streams(model)
            reference = None
            if any(REPAIRS.find(plan.repair).changes_weights for plan in plans):
                reference = dense_reference(model, self.index.input_ids.long(), self.cost)
            cuts = [_MeasuredCut(model, plan, self._streams(model), reference, self.cost) for plan in plans]
        shared = 0.0
        count = len(model.layers)
        for number, layer in progress(model.stream_layers(range(count)), "layers", count):
            for stream in dense:
                stream.forward(number, layer)
            started = time.monotonic()
            if reference is not None:
                reference.run(number, layer)
            shared += time.monotonic() - started
            for cut in cuts:
                with preserved(layer):
                    cut.layer(number, layer)
            if reference is not None:
                reference.step()
        scaled = self._scaled(model, cuts)
        self._measure(model, dense, cuts, with_dense, shared, scaled)

    def _scaled(self, model: StreamedModel, cuts: list[_MeasuredCut]) -> ScaledNorms:
        """The final norms that cuts repair, by the streams of texts through them."""
        found: ScaledNorms = {}
        with model.other_weights():
            for cut in cuts:
                norm = None if cut.repair is None else cut.repair.final_norm()
                if norm is not None:
                    found |= dict.fromkeys(cut.streams, norm.applied)
        return found

    def _streams(self, model: StreamedModel) -> list[TokenStream]:
        found = []
        for blocks in self.texts:
            step = largest_micro_batch(blocks.ids.shape[1], model.device.type)
            found.append(TokenStream(model, blocks.ids.long(), micro_batch=step, place=self.cost.hidden_on))
        return found

    def _measure(
        self,
        model: StreamedModel,
        dense: list[TokenStream],
        cuts: list[_MeasuredCut],
        with_dense: bool,
        shared: float,
        scaled: ScaledNorms,
    ) -> None:
        """Append the rows of one pass, one per plan and text; those of the dense model first, if wanted."""
        names = [(c.plan.method, c.plan.repair, c.plan.allocation, c.plan.sparsity) for c in cuts]
        seconds = [c.seconds + shared * c.repairs for c in cuts]
        parameters = [c.parameters for c in cuts]
        columns = [cut.streams for cut in cuts]
        if with_dense:
            names.insert(0, ("dense", "none", "none", 0.0))
            seconds.insert(0, 0.0)
            parameters.insert(0, self.opened.checkpoint.parameters)
            columns.insert(0, dense)
        # The dense model is measured in every pass: intervals compare with its loss of the same blocks.
        found = [
            measure_divergence(
                model, dense[place], [*(streams[place] for streams in columns), dense[place]], scaled
            )
            for place in range(len(self.texts))
        ]
        searched = [_kinds(cut.plan) for cut in cuts]
        for place, name in enumerate(names):
            kinds = ("", "") if name[0] == "dense" else searched[place - with_dense]
            for blocks, measured in zip(self.texts, found, strict=True):
                loss = measured[place]
                bits = loss.nats / math.log(2) / blocks.predicted_bytes
                row = (*name, blocks.name, loss.perplexity, bits, loss.kl, parameters[place], seconds[place])
                interval = (None, None) if name[0] == "dense" else _factor(measured[-1], loss, blocks)
                self.rows.append(ComparisonRow(*row, *interval, *kinds))


COUNTED = {  # kinds of which a number stays in every layer: what a row calls it, and its fact
    "kv": ("key/value heads kept", "heads"),
    "experts": ("experts kept", "after"),
    "vocab": ("tokens kept", "after"),
}


def _kinds(plan: PrunePlan) -> tuple[str, str]:
    """The kinds that a search could take, and what goes beside FFN channels, as "layers 3, 7"."""
    gone = []
    for part in plan.cuts:
        what, count = COUNTED.get(part.kind, (part.kind, ""))
        numbers = [part.facts[count]] if count else part.facts["removed"]
        gone.append(f"{what} {', '.join(map(str, numbers))}")
    return ",".join(plan.search.kinds) if plan.search is not None else "ffn", "; ".join(gone)


def _factor(
    dense: LossAndDivergence, pruned: LossAndDivergence, blocks: TokenBlocks
) -> tuple[float | None, float | None]:
    """95% interval of the pruned model's perplexity over the dense model's; (None, None) for few blocks."""
    if len(blocks.ids) < LEAST_BLOCKS:
        return None, None
    nats = [torch.tensor(one.block_nats, dtype=torch.float64) for one in (dense, pruned)]
    found = paired_ratio(nats[0], nats[1], blocks.ids.shape[1] - 1)
    return found.low, found.high


class _MeasuredCut:
    """One plan in a pass over the layers, with the streams of the texts through the pruned layers."""

    def __init__(
        self,
        model: StreamedModel,
        plan: PrunePlan,
        streams: list[TokenStream],
        reference: DenseReference | None,
        cost: PruneCost,
    ) -> None:
        self.plan = plan
        self.streams = streams
        self.seconds = 0.0
        cut, repair = model_cut(model.meta_model, plan), REPAIRS.find(plan.repair)
        specs = edited_specs(model.checkpoint, cut.edits)
        self.parameters = sum(spec.numel for spec in specs.values())
        self.repairs = repair.changes_weights
        self.skipped = cut.skipped
        self.edit: Callable[[int, nn.Module], object] = mask_cut(cut)
        self.repair: LayerRepair | None = None
        if self.repairs:
            assert reference is not None
            self.repair = LayerRepair(reference, cut, repair, cost.matrix_bytes)
            self.edit = self.repair.layer

    def layer(self, number: int, layer: nn.Module) -> None:
        """Prune the resident layer and run this plan's texts through it, where the plan has such a layer."""
        if number in self.skipped:
            return
        started = time.monotonic()
        self.edit(number, layer)
        self.seconds += time.monotonic() - started
        for stream in self.streams:
            stream.forward(number, layer)


def text_tokens(texts: list[TokenBlocks]) -> int:
    """Number of tokens of all texts."""
    return sum(blocks.ids.numel() for blocks in texts)


def share_passes(opened: Model, job: PruneJob) -> tuple[int, PruneCost]:
    """(plans per pass, cost of one pass): the number of plans is halved while hidden states would go to disk.

    Raises MemoryBudgetError.
    """
    together, each = max(1, job.cuts), job.text_tokens // (job.cuts + 1)
    while True:
        single_pass = replace(job, cuts=together, text_tokens=each * (together + 1))
        cost = prune_cost(opened.meta_model, single_pass, opened.run)
        if cost.hidden_on != "disk" or together == 1:
            return together, cost
        together = (together + 1) // 2


def save_rows(rows: list[ComparisonRow], folder: Path) -> None:
    """Write compare.csv, compare.md and compare.png into an existing folder."""
    with (folder / "compare.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(ComparisonRow.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    (folder / "compare.md").write_text(markdown(rows), encoding="utf-8")
    save_comparison(folder / "compare.png", [asdict(row) for row in rows])


def markdown(rows: list[ComparisonRow]) -> str:
    """The rows as a Markdown table: a line per plan, a perplexity column per text.

    KL, and the 95% interval of perplexity over dense, are of the first text. With columns of kinds where a
    target was searched for.
    """
    texts = list(dict.fromkeys(row.text for row in rows))
    searched = any(row.cuts not in ("", "ffn") or row.gone for row in rows)
    headings = ["method", "repair", "allocation", "removed", *(["may go", "gone"] if searched else [])]
    headings += [*texts, "× dense", "KL", "parameters", "seconds"]
    lines = []
    for place in range(0, len(rows), len(texts)):
        cut = rows[place : place + len(texts)]
        first = cut[0]
        cells = [first.method, first.repair, first.allocation, f"{100 * first.sparsity:.0f}%"]
        cells += [first.cuts, first.gone] if searched else []
        cells += [f"{row.perplexity:.4g}" for row in cut]
        low, high = first.factor_low, first.factor_high
        cells.append("" if low is None or high is None else f"{low:.3f} to {high:.3f}")
        cells += [f"{first.kl:.3f}", f"{first.parameters / 1e6:.1f} M", f"{first.seconds:.0f}"]
        lines.append(cells)
    return markdown_table(headings, lines) + "\n"
