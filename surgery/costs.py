"""What an index will take, said before it starts: bytes moved, operations, memory; and how a budget is shared out.

Symbols: N blocks of T tokens, L layers, D hidden_size, F the FFN channels a token goes through in a layer, V vocabulary,
s bytes of the compute dtype. The estimates err upwards; `tests/benchmarks/scale.py` sets them beside what was used.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.checkpoint import Checkpoint
from surgery.devices import TOKENS_PER_STEP, amount, room, wide_dtype
from surgery.errors import MemoryBudgetError
from surgery.ffn import Ffn
from surgery.heap import SHARE
from surgery.skeleton import Skeleton
from surgery.statistics import CORRELATION_TOKENS
from surgery.tokens import HEAD_ELEMENTS

if TYPE_CHECKING:
    from surgery.indexing import RunOptions

SAVED_CHANNELS = 4  # values autograd keeps for a channel and token: gate, its activation, up, their product
SAVED_HIDDEN = 6  # and for a hidden dimension: norms and sums
SAVED_ROWS = (
    2  # and for a row of any other matrix of the layer: queries, keys, values and what is made of them
)
KEPT_CHANNELS = 3  # values kept of a channel and token for the backward pass: gate, up, their product
KEPT_HIDDEN = (
    6  # and of a hidden dimension: what enters and leaves, attention, what the FFN puts out, padding
)
ROUTING = 256  # bytes for a token and an expert: scores, which are float32, and indices
HEAD_COPIES = 4  # logits, in float32, their gradient, softmax
DENSE_MATRICES = 16  # F x F in double precision at the peak of second-order scores
PROBE_SECONDS = 0.5
PROBE_BYTES = 256 << 20
WIDE_PROBE = 1024


@dataclass(frozen=True)
class IndexCosts:
    """What one index takes on one machine.

    `micro_batch` blocks go through a layer together. `hidden_bytes` are the stored layer inputs, kept `hidden_on` device,
    memory or disk. `graph_bytes` may be spent on what the backward pass would compute again; it is expected to do for
    `graph_layers` layers. `host_bytes` and `device_bytes` are peaks, above what the libraries take; `smallest_bytes` is the
    smallest --memory that would do. `flops` are those of one forward pass, one backward pass to the activations, and the
    layers computed again.
    """

    micro_batch: int
    hidden_bytes: int
    hidden_on: str
    graph_bytes: int
    graph_layers: int
    host_bytes: int
    device_bytes: int
    smallest_bytes: int
    read_bytes: int
    write_bytes: int
    flops: float

    def seconds(self, machine: Machine) -> dict[str, float]:
        """Seconds for arithmetic and for reading, which overlap: the larger one bounds the run."""
        return {"compute": self.flops / machine.flops, "read": self.read_bytes / machine.read}

    def as_json(self) -> dict[str, Any]:
        """The `costs` of `surgeon index --dry-run --json`."""
        return asdict(self)


@dataclass(frozen=True)
class Machine:
    """Measured: operations a second of a matrix product in the compute dtype, bytes a second read from the checkpoint.

    The other two are operations a second in float32 and float64, where they were asked for.
    """

    flops: float
    read: float
    float32_flops: float = 0.0
    float64_flops: float = 0.0

    def as_json(self) -> dict[str, float]:
        """The `machine` of a dry run's JSON; rates that were not asked for are left out."""
        rates = {
            "flops_per_second": self.flops,
            "read_bytes_per_second": self.read,
            "float32_flops_per_second": self.float32_flops,
            "float64_flops_per_second": self.float64_flops,
        }
        return {name: rate for name, rate in rates.items() if rate}


def index_costs(
    skeleton: Skeleton, blocks: int, block_size: int, options: RunOptions, second_order: bool = False
) -> IndexCosts:
    """Costs of indexing `blocks` x `block_size` tokens, sharing out `options.memory`.

    On a GPU the same sharing is done with the memory that is free there, and `options.memory` is for the host's part.
    Raises MemoryBudgetError, naming the smallest budget that would do, when one block's way through one layer outgrows it.
    """
    sizes = Sizes.of(skeleton, options.dtype, block_size)
    tokens = blocks * block_size
    fixed = sizes.fixed(blocks, second_order)
    on_device = options.device.type == "cuda"
    budget = room(options.device) if on_device else options.memory
    smallest = fixed + sizes.step(1)
    check_budget(smallest, budget, options.device.type)
    step = max(1, TOKENS_PER_STEP[options.device.type] // block_size)
    while step > 1 and fixed + sizes.step(step) > budget:
        step //= 2
    used = fixed + sizes.step(step)
    hidden = (sizes.layers + 1) * tokens * sizes.hidden * options.dtype.itemsize
    if on_device:
        fits_host = hidden <= options.memory
        place = "device" if 2 * hidden <= budget - used else "memory" if fits_host else "disk"
    else:
        budget -= options.memory // SHARE  # for what the C library holds free
        place = "memory" if hidden <= budget - used else "disk"
    used += hidden * (place == ("device" if on_device else "memory"))
    graphs = 0 if second_order else max(0, budget - used) // (2 if on_device else 1)
    per_layer = sizes.kept_token * tokens
    kept = min(sizes.layers, graphs // per_layer)
    used += kept * per_layer
    forward = 2.0 * tokens * (sizes.active + sizes.attention)
    pinned = 2 * sizes.layer + hidden * (place == "memory")
    return IndexCosts(
        micro_batch=step,
        hidden_bytes=hidden,
        hidden_on=place,
        graph_bytes=graphs,
        graph_layers=kept,
        host_bytes=pinned if on_device else used,
        device_bytes=used if on_device else 0,
        smallest_bytes=2 * sizes.layer if on_device else smallest,
        read_bytes=2 * sizes.inside + 2 * sizes.outside,
        write_bytes=hidden if place == "disk" else 0,
        flops=forward * (3 - kept / max(1, sizes.layers)) + 4.0 * tokens * sizes.head,
    )


def check_budget(smallest: int, budget: int, device: str) -> None:
    """Raise MemoryBudgetError when not even the smallest way fits."""
    if smallest <= budget:
        return
    raise MemoryBudgetError(
        "one layer and one block of tokens outgrow the memory budget",
        where=f"{device} memory",
        expected=f"at least {amount(smallest)}",
        found=amount(budget),
        next_step="use a smaller --block-size, or a machine with more memory"
        if device == "cuda"
        else f"give --memory {-(-smallest // (1 << 20))}MiB or more, or a smaller --block-size",
    )


@dataclass(frozen=True)
class Sizes:
    """What of a model's shape decides costs; bytes but for `hidden`, `layers` and numbers of weights."""

    layers: int
    hidden: int
    layer: int  # the largest layer, in the compute dtype and as stored where that differs
    inside: int  # all layers, as stored
    outside: int  # embeddings, final norm, head, as stored
    outside_held: int
    head: int  # weights of the output head
    active: float  # weights of all layers that a token meets
    attention: float  # multiplications of queries with keys and of these with values, for a token
    saved_token: int  # what autograd keeps for a token, in the largest layer
    kept_token: int  # what of it is kept from the forward pass to the backward pass
    widest: int  # channels of the largest FFN
    channels: int  # of all FFNs of the largest layer
    matrix: int  # weights of the largest matrix
    block_size: int

    @classmethod
    def of(cls, skeleton: Skeleton, dtype: torch.dtype, block_size: int) -> Sizes:
        config = skeleton.config.get_text_config()
        hidden = int(config.hidden_size)
        tensors = skeleton.checkpoint.tensors
        stored = [[tensors[n] for a in assemblies for n in a.stored] for assemblies in skeleton.inside]
        outside = [tensors[n] for a in skeleton.outside for n in a.stored]
        numbers = [sum(entry.numel for entry in layer) for layer in stored]
        cast = any(entry.dtype != dtype for layer in stored for entry in layer)
        copies = [
            sum(e.nbytes for e in layer) * cast + n * dtype.itemsize
            for layer, n in zip(stored, numbers, strict=True)
        ]
        heads = int(getattr(config, "num_attention_heads", 0) or 0)
        eager = getattr(config, "_attn_implementation", None) == "eager"
        through = [_channels_met(ffns, config) for ffns in skeleton.ffns]
        unused = [_unused(ffns, config, hidden) for ffns in skeleton.ffns]
        rows = max(
            _other_rows(layer, ffns) for layer, ffns in zip(skeleton.layers, skeleton.ffns, strict=True)
        )
        saved = SAVED_CHANNELS * max(through) + SAVED_HIDDEN * hidden + SAVED_ROWS * rows
        experts = max(sum(len(ffn.units) for ffn in ffns if ffn.stacked) for ffns in skeleton.ffns)
        saved += 3 * heads * block_size * eager
        kept = KEPT_CHANNELS * max(through) + KEPT_HIDDEN * hidden + rows + heads * block_size * eager
        return cls(
            layers=len(stored),
            hidden=hidden,
            layer=max(copies),
            inside=sum(entry.nbytes for layer in stored for entry in layer),
            outside=sum(entry.nbytes for entry in outside),
            outside_held=sum(entry.numel for entry in outside) * dtype.itemsize,
            head=hidden * int(config.vocab_size),
            active=sum(numbers) - sum(unused),
            attention=len(stored) * block_size * hidden / 2,
            saved_token=saved * dtype.itemsize + ROUTING * experts,
            kept_token=kept * dtype.itemsize + ROUTING * experts + 4 * heads,
            widest=max((ffn.width for ffns in skeleton.ffns for ffn in ffns), default=0),
            channels=max(sum(ffn.width * len(ffn.units) for ffn in ffns) for ffns in skeleton.ffns),
            matrix=max((e.numel for layer in stored for e in layer), default=0),
            block_size=block_size,
        )

    def fixed(self, blocks: int, second_order: bool) -> int:
        """Bytes that are there whatever the micro-batch: the ends of the model, or two layers and their statistics."""
        ends = self.outside_held + HEAD_COPIES * 4 * HEAD_ELEMENTS
        sums = 4 * self.channels * (5 * blocks + 3 * CORRELATION_TOKENS)
        squares = DENSE_MATRICES * 8 * self.widest**2 if second_order else 0
        return max(ends, 2 * self.layer + sums + 8 * self.matrix + squares)

    def step(self, blocks: int) -> int:
        """Bytes of so many blocks on their way through a layer and back: what is saved, and as much in gradients."""
        tokens = blocks * self.block_size
        return 2 * self.saved_token * tokens + 4 * 4 * self.block_size * self.widest


def _other_rows(layer: nn.Module, ffns: list[Ffn]) -> int:
    """Rows of all matrices of a layer that are no FFN's."""
    inside = {name for ffn in ffns for name in ffn.cuts()}
    return sum(max(p.shape) for name, p in layer.named_parameters() if p.dim() == 2 and name not in inside)


def _channels_met(ffns: list[Ffn], config: Any) -> int:
    """FFN channels of a layer that one token goes through."""
    return sum(ffn.width * min(routed(ffn, config), len(ffn.units)) for ffn in ffns)


def _unused(ffns: list[Ffn], config: Any, hidden: int) -> int:
    """Weights of the experts of a layer that one token does not go through, roughly."""
    return sum(3 * hidden * ffn.width * max(0, len(ffn.units) - routed(ffn, config)) for ffn in ffns)


def routed(ffn: Ffn, config: Any) -> int:
    """Experts of an FFN that one token goes through; 1 of one that is no stack of experts."""
    if not ffn.stacked:
        return 1
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k")
    return next(
        (int(k) for name in names if isinstance(k := getattr(config, name, None), int)), len(ffn.units)
    )


def measure_machine(
    checkpoint: Checkpoint, skeleton: Skeleton, options: RunOptions, wide: bool = False
) -> Machine:
    """Spend about a second to see how fast this machine multiplies matrices of this model and reads its weights.

    With `wide` another one on float32 and float64, which repairs are computed in.
    """
    largest = max(
        (
            entry
            for assemblies in skeleton.inside
            for a in assemblies
            for entry in map(checkpoint.tensors.__getitem__, a.stored)
        ),
        key=lambda entry: entry.numel,
    )
    rows, columns = largest.shape[-2:] if len(largest.shape) > 1 else (largest.numel, 1)
    tokens = TOKENS_PER_STEP[options.device.type]
    weight = torch.randn(rows, columns, device=options.device).to(options.dtype)
    inputs = torch.randn(tokens, columns, device=options.device).to(options.dtype)
    rate = _rate(lambda: inputs @ weight.T, 2.0 * tokens * rows * columns, options.device)
    started, read = time.perf_counter(), 0
    for entry in checkpoint.tensors.values():
        checkpoint.read(entry.name)
        read += entry.nbytes
        if read >= PROBE_BYTES or time.perf_counter() - started > PROBE_SECONDS:
            break
    reading = read / max(1e-9, time.perf_counter() - started)
    others = []
    for dtype in (torch.float32, wide_dtype(options.device)) if wide else ():
        square = torch.randn(WIDE_PROBE, WIDE_PROBE, device=options.device).to(dtype)
        multiply = functools.partial(torch.matmul, square, square)
        others.append(_rate(multiply, 2.0 * WIDE_PROBE**3, options.device))
    return Machine(rate, reading, *others)


def _rate(run: Callable[[], object], each: float, device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    wait()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < PROBE_SECONDS:
        run()
        wait()
        count += 1
    return each * count / (time.perf_counter() - started)
