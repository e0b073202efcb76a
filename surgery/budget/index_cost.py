"""What an index takes: bytes moved, operations, memory; and how a budget is divided for it.

Symbols: N blocks of T tokens, L layers, D hidden_size, F the FFN channels a token goes through in a layer, V
vocabulary, s bytes of the compute dtype. Estimates err upwards; `tests/benchmarks/scale.py` puts them beside
what was used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from surgery.budget.budget import Budget, Cost, largest_micro_batch
from surgery.budget.model_size import ModelSize
from surgery.budget.pass_cost import PassCost, PassJob, StreamShape, pass_cost
from surgery.engine.run_options import RunOptions
from surgery.model.meta_model import MetaModel

PROOF_BLOCKS, PROOF_TOKENS = 8, 64  # calibration blocks, and their first tokens, to measure structures on
PROOF_CONDITIONS = 64  # structures that run beside each other in one pass


@dataclass(frozen=True, kw_only=True)
class IndexCost(Cost):
    """What one index takes. `hidden_bytes` are stored layer inputs. The passes that prove super weights come
    before it: see `proof_cost`.

    `cache_bytes` may be spent on activations that the backward pass would recompute, which is expected to be
    enough for `cached_layers` layers. `flops` are one forward pass, one backward pass to the activations, and
    the recomputation. `proof_flops` are those of one structure that is measured, at most; how many there are
    is known when the spikes are.
    """

    cache_bytes: int
    cached_layers: int
    proof_flops: float


def index_cost(
    meta_model: MetaModel, blocks: int, block_size: int, run: RunOptions, second_order: bool = False
) -> IndexCost:
    """Cost of indexing `blocks` x `block_size` tokens within `run.memory`.

    On a GPU the memory that is free there is divided in the same way, and `run.memory` is for the host's
    part. Raises MemoryBudgetError, naming the smallest budget that would do, when one block in one layer
    exceeds it.
    """
    size = ModelSize.of(meta_model, run.dtype, block_size, run.device.type)
    budget = Budget.of(run, free_only=True)
    tokens = blocks * block_size
    on_device = budget.on_device
    resident = size.resident_bytes(blocks, second_order, merging=not on_device)  # merging is the host's work
    smallest = resident + size.micro_batch_bytes(1)
    if not on_device:  # the passes before, which prove super weights, share --memory
        unlimited = replace(run, memory=1 << 62)
        shape = min(blocks, PROOF_BLOCKS), min(block_size, PROOF_TOKENS)
        smallest = max(smallest, proof_cost(meta_model, *shape, unlimited).smallest_bytes)
    budget.check(smallest)
    micro_batch = largest_micro_batch(block_size, run.device.type)
    while micro_batch > 1 and resident + size.micro_batch_bytes(micro_batch) > budget.limit:
        micro_batch //= 2
    used = resident + size.micro_batch_bytes(micro_batch)
    hidden = (size.layers + 1) * tokens * size.hidden * run.dtype.itemsize
    place = budget.place(hidden * (2 if on_device else 1), used)  # a GPU's other half is for activations
    if on_device and place != "device":
        place = "memory" if hidden <= budget.host else "disk"
    used += hidden * (place == budget.first_place)
    cache = 0 if second_order else max(0, budget.usable - used) // (2 if on_device else 1)
    per_layer = size.kept_token * tokens
    cache *= per_layer > 0  # no operation of the model is expensive
    cached = min(size.layers, cache // max(1, per_layer))
    used += cached * per_layer
    proved = min(blocks, PROOF_BLOCKS) * min(block_size, PROOF_TOKENS)
    forward = 2.0 * tokens * (size.active + size.attention)
    spared = (forward - 2.0 * tokens * size.again) * cached / max(1, size.layers)
    return IndexCost(
        micro_batch=micro_batch,
        hidden_bytes=hidden,
        hidden_on=place,
        cache_bytes=cache,
        cached_layers=cached,
        **budget.peaks(used, smallest, hidden, place, host=2 * size.layer + size.merging),
        read_bytes=3 * (size.layers_stored + size.other_stored),  # spikes, forward, backward
        write_bytes=hidden if place == "disk" else 0,
        flops=3 * forward - spared + 4.0 * tokens * size.head,
        proof_flops=(forward / tokens + 2.0 * size.head) * proved,
    )


def proof_cost(
    meta_model: MetaModel, blocks: int, block_size: int, run: RunOptions, conditions: int = PROOF_CONDITIONS
) -> PassCost:
    """Cost of one pass that measures `conditions` structures, each removed. Raises MemoryBudgetError."""
    job = PassJob((StreamShape(blocks, block_size, conditions + 1),), preserves_layer=True)
    return pass_cost(meta_model, job, run)
