"""What a prune or a comparison takes, and how a memory budget is divided for it.

Symbols: N blocks of T tokens, D hidden_size, K channels kept of an FFN, F before, s bytes of the compute
dtype. A prune reads every layer once; with repair, calibration tokens go through each layer as it was and as
it becomes, and matrices of K x K and D x K are solved for (`repair_cost`). Hidden states go to files and
channels into column blocks before a budget is refused. Estimates err upwards; `tests/benchmarks/streamed.py
--memory` shows what was used.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from surgery.budget.budget import Budget, Cost, largest_micro_batch
from surgery.budget.machine import Machine
from surgery.budget.model_size import ModelSize, token_share
from surgery.budget.repair_cost import (
    DENSE_STORES,
    EXPERT_PASSES,
    NORM_SCALES,
    NORM_SLICE,
    NORM_TOKENS,
    column_blocks,
    held_out_blocks,
    pass_schedule,
    repair_bytes,
)
from surgery.budget.sensitivity_cost import MEASURE_TOKENS, sensitivity_cost, width_search_cost
from surgery.engine.device import TOKENS_PER_STEP
from surgery.engine.run_options import RunOptions
from surgery.model.ffn import Ffn, is_conv1d
from surgery.model.meta_model import MetaModel

VERIFY_TOKENS = 64  # tokens that a written checkpoint is verified on
MOST_BLOCKS = 16  # column blocks that channels are divided into to meet a budget
SOLVED = 4  # times a block is solved for: two or three ridges, and the chosen one on all blocks


@dataclass(frozen=True)
class PruneJob:
    """What one pass over the layers does.

    `kept`: for every layer, K by FFN. `cuts` are made of each layer; with `repairs` they are repaired on
    `blocks` x `block_size` tokens, and with `follows_pruned` each cut's own hidden states are computed too.
    `text_tokens` of other text go along, counted once for each cut and once for the dense model. With
    `preserves_layer` a copy of each layer is kept meanwhile. `written` bytes are the result. With
    `sensitivity` the sensitivity of layers is measured before, with `searches_widths` whole sets of widths.
    """

    kept: list[dict[str, int]]
    repairs: bool
    follows_pruned: bool
    blocks: int
    block_size: int
    cuts: int = 1
    text_tokens: int = 0
    preserves_layer: bool = False
    written: int = 0
    sensitivity: bool = False
    searches_widths: bool = False

    @property
    def tokens(self) -> int:
        """Calibration tokens that a repair runs."""
        return self.blocks * self.block_size if self.repairs else 0


@dataclass(frozen=True, kw_only=True)
class PruneCost(Cost):
    """What one pass takes.

    `matrix_bytes` may be spent on matrices, of which `repair_bytes` will be, in `repair_parts` passes over a
    layer. `ends_held`: embeddings and head stay in memory for the whole pass. `flops` are those of running
    layers, `float32_flops` and `float64_flops` those of a repair.
    """

    matrix_bytes: int
    repair_bytes: int
    repair_parts: int
    ends_held: bool
    float32_flops: float
    float64_flops: float

    def seconds(self, machine: Machine) -> dict[str, float]:
        """Seconds for arithmetic and for reading, as of an index."""
        seconds = super().seconds(machine)
        if self.float64_flops:
            seconds["compute"] += self.float32_flops / machine.float32_flops
            seconds["compute"] += self.float64_flops / machine.float64_flops
        return seconds


def prune_cost(meta_model: MetaModel, job: PruneJob, run: RunOptions) -> PruneCost:
    """Cost of a job within `run.memory`, or on a GPU within all its memory but a tenth.

    Raises MemoryBudgetError, naming the smallest budget that would do.
    """
    needs = _Needs(meta_model, job, run)
    size, budget = needs.size, Budget.of(run)
    smallest = budget.smallest(needs.peak(1, needs.matrices(MOST_BLOCKS)))
    budget.check(smallest)
    usable = budget.usable
    count = next(n for n in range(1, MOST_BLOCKS + 1) if needs.peak(1, needs.matrices(n)) <= usable)
    matrices = needs.matrices(count)
    host = (
        needs.deferred + (2 * size.layer + size.merging) * budget.on_device
    )  # read and pinned, beside a GPU
    if budget.on_device:
        budget.check_host(host)
    place = budget.place(needs.hidden, needs.in_pass(1, matrices), host)
    resident = needs.hidden * (place == budget.first_place)
    micro_batch = largest_micro_batch(job.block_size, run.device.type)
    while micro_batch > 1 and needs.in_pass(micro_batch, matrices) + resident > usable:
        micro_batch //= 2
    beside = needs.beside(micro_batch)
    ends = size.other_resident * (beside + matrices + resident + size.other_resident <= usable)
    allowance = usable - resident - ends - beside
    spent, passes = needs.repair(allowance)
    used = max(max(needs.at_ends, beside + spent + ends) + resident, needs.sensitivity)
    flops, single, double = _operations(meta_model, needs, allowance, passes)
    return PruneCost(
        micro_batch=micro_batch,
        hidden_bytes=needs.hidden,
        hidden_on=place,
        matrix_bytes=allowance,
        repair_bytes=spent,
        repair_parts=passes,
        ends_held=bool(ends),
        **budget.peaks(used, smallest, needs.hidden, place, host),
        read_bytes=size.layers_stored + size.other_stored * (1 if ends else 2) + job.written,
        write_bytes=job.written + needs.journal + needs.hidden * (place == "disk"),
        flops=flops,
        float32_flops=single,
        float64_flops=double,
    )


class _Needs:
    """Bytes that the parts of a job take, by what is chosen for it."""

    def __init__(self, meta_model: MetaModel, job: PruneJob, run: RunOptions) -> None:
        self.job = job
        self.size = size = ModelSize.of(meta_model, run.dtype, job.block_size)
        s, repairs, follows = run.dtype.itemsize, job.repairs, job.follows_pruned
        self.widest = max((width for layer in job.kept for width in layer.values()), default=0)
        self.inner = max(map(_widest_output, meta_model.layers, meta_model.ffns, [size.hidden] * size.layers))
        streams = DENSE_STORES + follows * job.cuts if repairs else 0
        channels = self.widest * follows
        self.hidden = s * (job.tokens * (streams * size.hidden + channels) + job.text_tokens * size.hidden)
        self.journal = s * size.layers * job.tokens * (1 + follows) * size.hidden
        self.deltas = size.channels * size.hidden * s * repairs
        if (
            repairs and meta_model.casts_stored_weights
        ):  # deltas in double precision, until the layer is written
            kept = max((sum(layer.values()) for layer in job.kept), default=0)
            self.deltas += 8 * size.hidden * (kept + self.inner)
        self.deferred = 2 * size.merged * repairs
        self.merging = size.merging * (run.device.type != "cuda")  # which the host does
        head = 4 * 3 * VERIFY_TOKENS * (size.head // size.hidden)
        if repairs and follows:  # the final norm's scale
            head = size.compared_bytes(NORM_SLICE) + 2 * job.block_size * size.hidden * s
        if job.text_tokens:
            block = min(MEASURE_TOKENS, job.text_tokens // (job.cuts + 1))
            head = size.compared_bytes(block) + (job.cuts + 1) * block * size.hidden * s
        self.at_ends = size.other_resident + head
        self.writing = 8 * size.matrix if repairs else 2 * s * size.matrix
        texts = min(TOKENS_PER_STEP[run.device.type], job.text_tokens // (job.cuts + 1))
        self.passing = size.saved_token * max(VERIFY_TOKENS, texts)
        self.sensitivity = 0
        if job.sensitivity:
            self.sensitivity = sensitivity_cost(size, job.blocks, job.block_size, run).resident_bytes
        if job.searches_widths:
            searching = width_search_cost(size, job.blocks, job.block_size, run).resident_bytes
            self.sensitivity = max(self.sensitivity, searching)

    def beside(self, blocks: int) -> int:
        """Bytes beside matrices and hidden states when `blocks` blocks go through a layer together."""
        size, tokens = self.size, blocks * self.job.block_size * self.job.repairs
        layers = (2 + self.job.preserves_layer) * size.layer + self.merging + self.deferred + self.deltas
        width = max(self.widest, self.inner)
        adding = 4 * (tokens * (2 * width + 4 * size.hidden) + 2 * size.hidden * width + width**2)
        running = max(self.passing, size.saved_token * tokens)
        return layers + running + max(adding * self.job.repairs, self.writing)

    def in_pass(self, blocks: int, matrices: int) -> int:
        """The same with so many bytes of matrices, or what the ends of the model take where that is more."""
        return max(self.at_ends, self.beside(blocks) + matrices)

    def peak(self, blocks: int, matrices: int) -> int:
        """The same, or what measuring sensitivity takes, which is over before hidden states are made."""
        return max(self.sensitivity, self.in_pass(blocks, matrices))

    def matrices(self, count: int) -> int:
        """Bytes of matrices where the widest FFN and the attention's output are solved in `count` column
        blocks.
        """
        widths = [-(-width // count) for width in (self.widest, self.inner * self.job.follows_pruned)]
        return max(repair_bytes([width], self.size.hidden) for width in widths) * self.job.repairs

    def repair(self, budget: int) -> tuple[int, int]:
        """Bytes of matrices within `budget`, and passes over a layer, the most of any layer."""
        if not self.job.repairs:
            return 0, 0
        outputs = self.size.hidden
        inner = max((block.stop for block in column_blocks(self.inner, outputs, budget)[:1]), default=0)
        most, passes = repair_bytes([inner * self.job.follows_pruned], outputs), 0
        for layer in self.job.kept:
            blocks = {name: column_blocks(kept, outputs, budget) for name, kept in layer.items()}
            schedule = pass_schedule(blocks, outputs, budget)
            passes = max(passes, len(schedule))
            for now in schedule:
                widths = [block.stop - block.start for block in now.values()]
                most = max(most, repair_bytes(widths, outputs))
        return most, passes


def _widest_output(layer: nn.Module, ffns: list[Ffn], outputs: int) -> int:
    """Inputs of the widest matrix of a layer that writes D = `outputs` dimensions and is no FFN's; 0 without
    one.
    """
    inside = {name for ffn in ffns for name in (*ffn.site.in_projections, ffn.site.down)}
    found = [0]
    for name, module in layer.named_modules():
        if name not in inside and type(module).__name__ in ("Linear", "Conv1D"):
            shape = tuple(module.get_parameter("weight").shape)
            rows, columns = shape[::-1] if is_conv1d(module) else shape
            if rows == outputs:
                found.append(columns)
    return max(found)


def _operations(meta_model: MetaModel, needs: _Needs, budget: int, passes: int) -> tuple[float, float, float]:
    """Floating-point operations in the compute dtype, in float32 and in float64."""
    size, job, d = needs.size, needs.job, needs.size.hidden
    weights = size.active + size.attention
    forward = 2.0 * weights * (2 * VERIFY_TOKENS + job.text_tokens)
    if not job.repairs:
        return forward, 0.0, 0.0
    mixture = job.follows_pruned and any(ffn.stacked for ffns in meta_model.ffns for ffn in ffns)
    together = EXPERT_PASSES * mixture  # times that routed experts are solved for again, all of a layer
    forward += 2.0 * weights * job.tokens * (1 + (passes * (1 + together) + mixture) * job.cuts)
    config = meta_model.config.get_text_config()
    solved: list[tuple[int, float]] = []  # (width, share of the tokens that go through it)
    for ffns, kept in zip(meta_model.ffns, job.kept, strict=True):
        for ffn in ffns:
            solved += [(kept[ffn.name], token_share(ffn, ffns, config))] * (1 + together * ffn.stacked)
        solved += [(needs.inner, 1.0)] * job.follows_pruned
    single = double = 0.0
    for width, share in solved:
        for block in column_blocks(width, d, budget):
            count = block.stop - block.start
            single += 2.0 * job.tokens * share * (count**2 + count * d + width * d)
            single += SOLVED * (count**3 / 3 + 4.0 * d * count**2)
            double += float(job.blocks) * count * (count + d)  # sums over micro-batches
    if job.follows_pruned:  # the final norm's scale
        tokens = min(NORM_TOKENS, held_out_blocks(job.blocks) * job.block_size)
        forward += 2.0 * size.head * tokens * (3 + len(NORM_SCALES)) * job.cuts
    return forward, single * job.cuts, double * job.cuts
