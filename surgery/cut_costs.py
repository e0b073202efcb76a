"""What carrying out a cut will take, said before it starts; and how a memory budget is shared out for it.

Symbols: N blocks of T tokens, D hidden_size, K channels kept of an FFN, F there were, s bytes of the compute dtype. A cut reads
every layer once; with repair, calibration tokens go through each layer as it was and as it becomes, and matrices of
K x K and D x K are solved for (`surgery.repair_memory`). Hidden states go into files and channels into parts before a
budget is refused. The estimates err upwards; `tests/benchmarks/streamed.py --memory` shows what was used.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.costs import check_budget
from surgery.curves import FIT_BLOCKS, MEASURE_TOKENS, curve_bytes
from surgery.dense import STORES
from surgery.devices import TOKENS_PER_STEP, capacity
from surgery.ffn import Ffn, is_conv1d
from surgery.gate import GATE_TOKENS
from surgery.heap import SHARE
from surgery.machine import Machine
from surgery.mended import stored_apart
from surgery.plan import ResizePlan
from surgery.repair_memory import parts, repair_bytes, schedule
from surgery.sizes import Sizes, routed
from surgery.skeleton import Skeleton
from surgery.tokens import HEAD_ELEMENTS
from surgery.widths import WidthChange

if TYPE_CHECKING:
    from surgery.indexing import RunOptions

MEASURED_COPIES = 5  # of the head's logits in float32 while two models' are compared
MOST_PARTS = 16  # into which channels are divided to meet a budget
SOLVED = 4  # times a part is solved for: two or three ridges, and the one chosen on all blocks


@dataclass(frozen=True)
class CutJob:
    """What one walk over the layers does.

    `kept`: for every layer, K by FFN. `cuts` are made of each layer, all repaired by `repair` on `blocks` x
    `block_size` tokens; `text_tokens` of other text go along, counted once for each cut and once for the dense model. With `put_back` a
    copy of each layer is kept meanwhile. `written` bytes are the result. With `curves`, what cutting a layer costs is measured before.
    """

    kept: list[dict[str, int]]
    repair: str
    blocks: int
    block_size: int
    cuts: int = 1
    text_tokens: int = 0
    put_back: bool = False
    written: int = 0
    curves: bool = False

    @property
    def tokens(self) -> int:
        """Calibration tokens that a repair runs."""
        return self.blocks * self.block_size if self.repair != "none" else 0

    @property
    def accumulates(self) -> bool:
        """Whether the pruned model's own hidden states are followed."""
        return self.repair == "lstsq-acc"


@dataclass(frozen=True)
class CutCosts:
    """What one cut takes on one machine.

    `micro_batch` blocks go through a layer together. `hidden_bytes` are the hidden states between layers, kept
    `hidden_on` device, memory or disk. `matrix_bytes` may be spent on matrices, of which `repair_bytes` will be, in
    `repair_parts` passes over a layer. `ends_held`: embeddings and head stay in memory for the whole walk. `host_bytes` and `device_bytes` are peaks, above what the libraries take; `smallest_bytes`
    is the smallest --memory that would do. `flops` are those of running layers, `float32_flops` and `float64_flops` of a repair.
    """

    micro_batch: int
    hidden_bytes: int
    hidden_on: str
    matrix_bytes: int
    repair_bytes: int
    repair_parts: int
    ends_held: bool
    host_bytes: int
    device_bytes: int
    smallest_bytes: int
    read_bytes: int
    write_bytes: int
    flops: float
    float32_flops: float
    float64_flops: float

    def seconds(self, machine: Machine) -> dict[str, float]:
        """Seconds for arithmetic and for reading on a machine, as of an index."""
        compute = self.flops / machine.flops
        if self.float64_flops:
            compute += self.float32_flops / machine.float32_flops + self.float64_flops / machine.float64_flops
        return {"compute": compute, "read": self.read_bytes / machine.read}

    def as_json(self) -> dict[str, Any]:
        """The `costs` of `surgeon prune --dry-run --json`."""
        return asdict(self)


def planned(plan: ResizePlan, ids: torch.Tensor, written: int = 0) -> CutJob:
    """The job of carrying out one plan, repaired on ids [N, T]."""
    kept = [{unit: len(ffn.kept) for unit, ffn in layer.ffns.items()} for layer in plan.layers]
    blocks, block_size = ids.shape
    return CutJob(kept, plan.repair, blocks, block_size, written=written, curves=plan.allocation == "global")


def widths_after(
    skeleton: Skeleton, changes: tuple[WidthChange, ...], uniform: bool = True
) -> list[dict[str, int]]:
    """K by FFN for every layer, foreseen from the new widths alone; where layers may differ, the most it can be."""
    shares = {change.key: change.after / change.before if uniform else 1.0 for change in changes}
    return [
        {unit: round(ffn.width * shares[ffn.site.width_key]) for ffn in ffns for unit in ffn.units}
        for ffns in skeleton.ffns
    ]


def cut_costs(skeleton: Skeleton, job: CutJob, options: RunOptions) -> CutCosts:
    """Costs of a job, sharing out `options.memory`, or on a GPU all it has but for a tenth.

    Raises MemoryBudgetError, naming the smallest budget that would do.
    """
    needs = _Needs(skeleton, job, options)
    on_device = options.device.type == "cuda"
    budget = capacity(options.device) if on_device else options.memory - options.memory // SHARE
    least = needs.peak(1, needs.matrices(MOST_PARTS))
    smallest = least if on_device else least * SHARE // (SHARE - 1) + 1
    check_budget(smallest, budget if on_device else options.memory, options.device.type)
    count = next(n for n in range(1, MOST_PARTS + 1) if needs.peak(1, needs.matrices(n)) <= budget)
    matrices = needs.matrices(count)
    host = (
        needs.late + (2 * needs.sizes.layer + needs.sizes.merging) * on_device
    )  # beside a GPU: what is read, pinned
    in_budget = needs.walking(1, matrices) + needs.hidden <= budget
    place = ("device" if on_device else "memory") if in_budget else "disk"
    if on_device:
        check_budget(host, options.memory, "host")
        if not in_budget and host + needs.hidden <= options.memory:
            place = "memory"
    resident = needs.hidden * in_budget
    step = max(1, TOKENS_PER_STEP[options.device.type] // job.block_size)
    while step > 1 and needs.walking(step, matrices) + resident > budget:
        step //= 2
    ends = needs.sizes.outside_held
    ends *= needs.beside(step) + matrices + resident + ends <= budget
    allowance = budget - resident - ends - needs.beside(step)
    spent, passes = needs.repair(allowance)
    used = max(max(needs.at_ends, needs.beside(step) + spent + ends) + resident, needs.curves)
    pinned = host + needs.hidden * (place == "memory")
    forward, single, double = _operations(skeleton, needs, allowance, passes)
    return CutCosts(
        micro_batch=step,
        hidden_bytes=needs.hidden,
        hidden_on=place,
        matrix_bytes=allowance,
        repair_bytes=spent,
        repair_parts=passes,
        ends_held=bool(ends),
        host_bytes=pinned if on_device else used,
        device_bytes=used if on_device else 0,
        smallest_bytes=host if on_device else smallest,
        read_bytes=needs.sizes.inside + needs.sizes.outside * (1 if ends else 2) + job.written,
        write_bytes=job.written + needs.journal + needs.hidden * (place == "disk"),
        flops=forward,
        float32_flops=single,
        float64_flops=double,
    )


class _Needs:
    """Bytes that parts of a job take, by what is chosen for it."""

    def __init__(self, skeleton: Skeleton, job: CutJob, options: RunOptions) -> None:
        self.job = job
        self.sizes = sizes = Sizes.of(skeleton, options.dtype, job.block_size)
        s, tensors = options.dtype.itemsize, skeleton.checkpoint.tensors
        self.widest = max((width for layer in job.kept for width in layer.values()), default=0)
        self.inner = max(map(_widest_output, skeleton.layers, skeleton.ffns, [sizes.hidden] * sizes.layers))
        self.mends = job.repair != "none"
        streams = STORES + job.accumulates * job.cuts if self.mends else 0
        channels = self.widest * job.accumulates
        self.hidden = s * (job.tokens * (streams * sizes.hidden + channels) + job.text_tokens * sizes.hidden)
        self.journal = s * sizes.layers * job.tokens * (1 + job.accumulates) * sizes.hidden
        merged = max(
            sum(tensors[n].nbytes for a in layer if a.converter is not None for n in a.stored)
            for layer in skeleton.inside
        )
        self.originals = sizes.channels * sizes.hidden * s * self.mends
        if self.mends and stored_apart(skeleton):  # changes in double precision, until the layer is written
            kept = max((sum(layer.values()) for layer in job.kept), default=0)
            self.originals += 8 * sizes.hidden * (kept + self.inner)
        self.late = 2 * merged * self.mends
        self.merging = sizes.merging * (options.device.type != "cuda")  # which the host does
        head = 4 * 3 * GATE_TOKENS * (sizes.head // sizes.hidden)
        if job.text_tokens:
            block = min(MEASURE_TOKENS, job.text_tokens // (job.cuts + 1))
            head = compared_bytes(sizes, block) + (job.cuts + 1) * block * sizes.hidden * s
        self.at_ends = sizes.outside_held + head
        self.writing = 8 * sizes.matrix if self.mends else 2 * s * sizes.matrix
        texts = min(TOKENS_PER_STEP[options.device.type], job.text_tokens // (job.cuts + 1))
        self.passing = sizes.saved_token * max(GATE_TOKENS, texts)
        self.curves = curves_need(sizes, job.block_size, options) if job.curves else 0

    def beside(self, step: int) -> int:
        """Bytes of everything but matrices and hidden states when so many blocks are run together."""
        sizes, tokens = self.sizes, step * self.job.block_size * self.mends
        layers = (2 + self.job.put_back) * sizes.layer + self.merging + self.late + self.originals
        width = max(self.widest, self.inner)
        adding = 4 * (tokens * (2 * width + 4 * sizes.hidden) + 2 * sizes.hidden * width + width**2)
        running = max(self.passing, sizes.saved_token * tokens)
        return layers + running + max(adding * self.mends, self.writing)

    def peak(self, step: int, matrices: int) -> int:
        """The same with so many bytes of matrices, or what comes before and after where that is more."""
        return max(self.curves, self.walking(step, matrices))

    def walking(self, step: int, matrices: int) -> int:
        """The same, but for measuring curves, which is over when hidden states are made."""
        return max(self.at_ends, self.beside(step) + matrices)

    def matrices(self, count: int) -> int:
        """Bytes of matrices where the widest FFN and the attention's output are done in `count` parts."""
        widths = [-(-width // count) for width in (self.widest, self.inner * self.job.accumulates)]
        return max(repair_bytes([width], self.sizes.hidden) for width in widths) * self.mends

    def repair(self, budget: int) -> tuple[int, int]:
        """Bytes of matrices within `budget`, and passes over a layer, the most of any."""
        if not self.mends:
            return 0, 0
        outputs = self.sizes.hidden
        inner = max((part.stop for part in parts(self.inner, outputs, budget)[:1]), default=0)
        inner *= self.job.accumulates
        most, passes = repair_bytes([inner], outputs), 0
        for layer in self.job.kept:
            turns = schedule({unit: parts(k, outputs, budget) for unit, k in layer.items()}, outputs, budget)
            passes = max(passes, len(turns))
            for now in turns:
                widths = [part.stop - part.start for part in now.values()]
                most = max(most, repair_bytes(widths, outputs))
        return most, passes


def compared_bytes(sizes: Sizes, tokens: int) -> int:
    """Bytes of comparing two models' predictions on a block of so many tokens, through the head in slices."""
    return MEASURED_COPIES * 4 * min(HEAD_ELEMENTS, tokens * (sizes.head // sizes.hidden))


def curves_need(sizes: Sizes, block_size: int, options: RunOptions) -> int:
    """Bytes that measuring curves takes, but for its branches: matrices of whole layers, which are not divided."""
    tokens = max(TOKENS_PER_STEP[options.device.type], block_size)
    streams = options.dtype.itemsize * sizes.hidden * (FIT_BLOCKS * block_size + MEASURE_TOKENS)
    layers = (
        3 * sizes.layer + sizes.merging + sizes.saved_token * tokens + curve_bytes(sizes.widest, sizes.hidden)
    )
    return streams + max(layers, sizes.outside_held + compared_bytes(sizes, MEASURE_TOKENS))


def _widest_output(layer: nn.Module, ffns: list[Ffn], outputs: int) -> int:
    """Inputs of the widest matrix of a layer that writes D = `outputs` dimensions and is no FFN's; 0 without one."""
    inside = {name for ffn in ffns for name in (*ffn.site.rows, ffn.site.down)}
    found = [0]
    for name, module in layer.named_modules():
        if name not in inside and type(module).__name__ in ("Linear", "Conv1D"):
            shape = tuple(module.get_parameter("weight").shape)
            rows, columns = shape[::-1] if is_conv1d(module) else shape
            if rows == outputs:
                found.append(columns)
    return max(found)


def _operations(skeleton: Skeleton, needs: _Needs, budget: int, passes: int) -> tuple[float, float, float]:
    """Floating-point operations in the compute dtype, in float32 and in float64."""
    sizes, job, d = needs.sizes, needs.job, needs.sizes.hidden
    weights = sizes.active + sizes.attention
    forward = 2.0 * weights * (2 * GATE_TOKENS + job.text_tokens)
    if not needs.mends:
        return forward, 0.0, 0.0
    forward += 2.0 * weights * job.tokens * (1 + passes * job.cuts)
    config = skeleton.config.get_text_config()
    solved = []  # (width, share of the tokens that go through it)
    for ffns, kept in zip(skeleton.ffns, job.kept, strict=True):
        shares = {unit: routed(f, config) / len(f.units) for f in ffns for unit in f.units}
        solved += [(width, shares[unit]) for unit, width in kept.items()]
        solved += [(needs.inner, 1.0)] * job.accumulates
    single = double = 0.0
    for width, share in solved:
        for part in parts(width, d, budget):
            size = part.stop - part.start
            single += 2.0 * job.tokens * share * (size**2 + size * d + width * d)
            double += SOLVED * (size**3 / 3 + 4.0 * d * size**2)
    return forward, single * job.cuts, double * job.cuts
