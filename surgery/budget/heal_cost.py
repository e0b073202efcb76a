"""What healing takes: memory for training with one layer resident, targets on disk, operations.

Symbols: L layers, D hidden_size, s bytes of the compute dtype, B tokens of a batch, P trained numbers.
Training keeps float32 masters, gradients, two moments and the best state, 20 P bytes: in memory, or in files,
with one layer's in memory. Estimates err upwards.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.budget.budget import Budget, Cost, largest_micro_batch
from surgery.budget.model_size import HEAD_COPIES, ModelSize
from surgery.engine.distributed import world_size
from surgery.engine.loss import HEAD_ELEMENTS
from surgery.engine.run_options import RunOptions
from surgery.model.meta_model import MetaModel

STATE_BYTES = 20  # for each trained number: master, gradient, two moments, best state
SAVES_BYTES = 32  # on disk: two saves of master, two moments and best state
FILES_BYTES = 36  # on disk where the state is in files: that, and the gradient
STEP_BYTES = 16  # for each number of the layer that makes a step: copies of master, moments and gradient
STEP_READS, STEP_WRITES = 28, 16  # from and to files in a step: masters in both passes and the norm, then all
TOP_BYTES = 20  # for each token of a target, while it is taken from the files or computed
TAKING_APART = 40  # for each weight of a parameter that is put together from several stored tensors
WRITING = 16  # for each weight of a matrix that was trained, while it is written or makes a step
LOSS_COPIES = 2 * HEAD_COPIES  # of float32 logits: distributions, masses and gradients of a slice
GRAPH_SHARE = 2  # autograd saves float32 copies in norms: measured graphs may take so many times the estimate


@dataclass(frozen=True)
class HealJob:
    """What a heal does, or one of its processes.

    `trained` numbers of every layer, `adapters` or norms unless all is; `steps` of `batch` blocks of
    `block_size` tokens, `distinct` blocks of them; `measures` of `held_out` blocks each; `targets` of the
    teacher, `top` tokens of a position: "disk", where they take `target_bytes`, "recompute" in every step, or
    "none"; `written` bytes are the result.
    """

    trained: list[int]
    steps: int
    batch: int
    block_size: int
    distinct: int
    held_out: int
    measures: int
    target_bytes: int
    targets: str
    adapters: bool
    top: int
    written: int

    @property
    def recomputes(self) -> bool:
        """Whether the teacher runs in every step."""
        return self.targets == "recompute"

    @property
    def tokens(self) -> int:
        """Tokens seen in all steps."""
        return self.steps * self.batch * self.block_size


@dataclass(frozen=True, kw_only=True)
class HealCost(Cost):
    """What a heal takes.

    `state_bytes` are those of what is trained, kept on `state_on`: device, memory or disk. Files and saves of
    it take `state_disk_bytes`. `keep_bytes` may hold the student's layers between passes, and
    `graph_bytes` what autograd saved of them; `teacher_bytes` may hold the teacher's layers. `ends_held`:
    embeddings and head stay in memory. `targets` and their `target_bytes` on disk are those of the job.
    """

    state_bytes: int
    state_on: str
    state_disk_bytes: int
    keep_bytes: int
    graph_bytes: int
    teacher_bytes: int
    target_bytes: int
    targets: str
    ends_held: bool


def heal_cost(student: MetaModel, teacher: MetaModel, job: HealJob, run: RunOptions) -> HealCost:
    """Cost of a heal within `run.memory`, or on a GPU within its memory.

    Raises MemoryBudgetError, naming the smallest budget that would do.
    """
    needs, budget = _Needs(student, teacher, job, run), Budget.of(run, free_only=True)
    smallest = budget.smallest(min(needs.peak(1), needs.peak(1, in_files=True)))
    budget.check(smallest)
    in_files = needs.peak(1) > budget.usable
    micro_batch = min(job.batch, largest_micro_batch(job.block_size, run.device.type))
    while micro_batch > 1 and needs.peak(micro_batch, in_files) > budget.usable:
        micro_batch //= 2
    used = needs.peak(micro_batch, in_files)
    place = budget.place(needs.hidden, used, host_used=needs.host)
    used += needs.hidden * (place == budget.first_place)
    left = budget.usable - used
    ends = needs.ends if needs.ends <= left else 0
    left -= ends
    keep = _whole_layers(left, needs.student_layers, needs.student.layer)
    left -= keep
    # targets are computed before training starts, unless in every step
    room = left if job.recomputes else left + keep
    teacher_keep = _whole_layers(room, needs.teacher_layers, needs.teacher.layer)
    left -= teacher_keep * job.recomputes
    graphs = min(left, needs.graphs) if keep == needs.student_layers else 0
    training = used + ends + keep + graphs + teacher_keep * job.recomputes
    return HealCost(
        micro_batch=micro_batch,
        hidden_bytes=needs.hidden,
        hidden_on=place,
        **budget.peaks(max(training, used + ends + teacher_keep), smallest, needs.hidden, place, needs.host),
        read_bytes=needs.read_bytes(keep, teacher_keep, in_files),
        write_bytes=needs.write_bytes(place == "disk", in_files),
        flops=needs.flops(graphs),
        state_bytes=STATE_BYTES * needs.trained,
        state_on="disk" if in_files else budget.first_place,
        state_disk_bytes=(FILES_BYTES if in_files else SAVES_BYTES) * needs.trained,
        keep_bytes=keep,
        graph_bytes=graphs,
        teacher_bytes=teacher_keep,
        target_bytes=job.target_bytes,
        targets=job.targets,
        ends_held=bool(ends),
    )


class _Needs:
    """Bytes and operations that the parts of a heal take."""

    def __init__(self, student: MetaModel, teacher: MetaModel, job: HealJob, run: RunOptions) -> None:
        self.job = job
        kind, dtype = run.device.type, run.dtype
        self.student = ModelSize.of(student, dtype, job.block_size, kind)
        self.teacher = ModelSize.of(teacher, dtype, job.block_size, kind)
        self.tokens = job.batch * job.block_size
        self.chunk = job.batch if job.recomputes else min(TARGET_CHUNK, job.distinct)
        streams = [
            ((self.student.layers + 1) * job.batch, self.student.hidden),
            (job.held_out, self.student.hidden),
            (self.chunk, self.teacher.hidden),
        ]
        rows = max(blocks * width for blocks, width in streams)
        self.hidden = rows * job.block_size * dtype.itemsize
        merged = 0 if job.adapters else _largest_merged(student)
        self.writing = max(WRITING * max(self.student.matrix, self.teacher.matrix), TAKING_APART * merged)
        self.trained = sum(job.trained)
        self.cast = (4 + dtype.itemsize) * max(job.trained)  # a layer's cast masters and gradients
        self.cast += 4 * max(job.trained) * (world_size() > 1)  # its gradients in one piece, to be summed
        self.graphs = GRAPH_SHARE * self.student.layers * self.student.saved_token * self.tokens
        self.graphs += dtype.itemsize * self.trained
        self.student_layers = _resident(student, dtype.itemsize)
        self.teacher_layers = _resident(teacher, dtype.itemsize) * (job.targets != "none")
        self.ends = max(self.student.other_resident, self.teacher.other_resident)
        self.host = max(2 * size.layer + size.merging for size in (self.student, self.teacher))
        self.merging = max(self.student.merging, self.teacher.merging) * (kind != "cuda")

    def peak(self, blocks: int, in_files: bool = False) -> int:
        """Bytes with `blocks` blocks in a layer at once, all else on disk or read again; with the state of
        what is trained in memory or `in_files`.
        """
        rows = min(HEAD_ELEMENTS, self.job.block_size * (self.student.head // self.student.hidden))
        at_ends = self.ends + 4 * LOSS_COPIES * rows
        layer = max(2 * size.layer + size.micro_batch_bytes(blocks) for size in (self.student, self.teacher))
        layer += self.merging + self.cast
        size, chunk = self.job.block_size, max(self.chunk, self.job.batch, self.job.held_out)
        arguments = chunk * size * (TOP_BYTES * self.job.top + 16) + 8 * size**2  # targets, ids, masks
        stepping = self.writing + STEP_BYTES * max(self.job.trained) * in_files
        held = STATE_BYTES * self.trained * (not in_files)
        return held + max(at_ends, layer, stepping) + arguments

    def write_bytes(self, hidden_on_disk: bool, in_files: bool) -> int:
        """Bytes written: the result, targets, layer inputs and the state of what is trained."""
        job = self.job
        state = (STEP_WRITES * job.steps + 4 * job.measures) * self.trained
        return job.written + job.target_bytes + self.hidden * hidden_on_disk * job.steps + state * in_files

    def read_bytes(self, keep: int, teacher_keep: int, in_files: bool) -> int:
        """Bytes read: layers that do not stay in memory are read in every pass, masters in files too."""
        job, student, teacher = self.job, self.student, self.teacher
        passes = 2 * job.steps + job.measures
        again = 1 - keep / max(1, self.student_layers)
        read = student.layers_stored * (1 + passes * again) + 2 * (student.other_stored + job.written)
        read += (STEP_READS * job.steps + 8 * job.measures) * self.trained * in_files
        if job.targets != "none":
            passes = job.steps if job.recomputes else -(-job.distinct // TARGET_CHUNK)
            again = 1 - teacher_keep / max(1, self.teacher_layers)
            read += teacher.layers_stored * (1 + (passes - 1) * again) + teacher.other_stored
        return round(read)

    def flops(self, graphs: int) -> float:
        """Operations of all steps: forward, the recomputation that graphs do not spare, gradients of inputs
        and of what is trained, head; held-out measures; the teacher's passes.
        """
        job, student, teacher = self.job, self.student, self.teacher
        layers = 2.0 * (student.active + student.attention)
        again = layers * (1 - graphs / max(1, self.graphs))
        weights = 0.0 if job.adapters else 2.0 * student.active
        step = 2 * layers + again + weights + 4.0 * student.head + 6.0 * sum(job.trained) * job.adapters
        measured = job.measures * job.held_out * job.block_size * (layers + 2.0 * student.head)
        seen = {"disk": job.distinct * job.block_size, "recompute": job.tokens, "none": 0}[job.targets]
        return job.tokens * step + measured + seen * 2.0 * (teacher.active + teacher.attention + teacher.head)


TARGET_CHUNK = 128  # blocks that go through the teacher in one pass


def _resident(meta_model: MetaModel, itemsize: int) -> int:
    """Bytes of all decoder layers in the compute dtype."""
    tensors = meta_model.checkpoint.tensors
    stored = (name for layer in meta_model.layer_parameters for p in layer for name in p.stored)
    return sum(tensors[name].numel for name in stored) * itemsize


def _largest_merged(meta_model: MetaModel) -> int:
    """Weights of the largest parameter that is put together from several stored tensors."""
    tensors = meta_model.checkpoint.tensors
    merged = (p for layer in meta_model.layer_parameters for p in layer if p.converter is not None)
    return max((sum(tensors[name].numel for name in p.stored) for p in merged), default=0)


def _whole_layers(room: int, all_layers: int, largest: int) -> int:
    """Bytes of as many layers as have room, given the bytes of all of them and of the largest."""
    return all_layers if room >= all_layers else room // largest * largest
