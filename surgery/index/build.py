"""Builds a ChannelIndex (`surgeon index`) in one forward and one backward pass over the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from surgery import defaults
from surgery.budget.index_cost import index_cost
from surgery.checkpoint.manifest import source_json
from surgery.engine import distributed
from surgery.engine.disk_errors import in_layer
from surgery.engine.loss import next_token_loss
from surgery.engine.open_model import Model
from surgery.engine.resume import Journal
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import FfnActivations, TokenStream
from surgery.errors import CalibrationError, NumericsError
from surgery.index import supernodes
from surgery.index.calibration import Calibration, calibrate
from surgery.index.channel_index import ChannelIndex
from surgery.index.ffn_index import FfnIndex
from surgery.index.found_structures import find_structures
from surgery.index.layer_index import LayerIndex, layer_from, layer_tensors, sample_tensors
from surgery.index.second_order import SecondOrder
from surgery.index.statistics import FfnStatistics, LayerStatistics, weight_norms, weight_range
from surgery.model.ffn import Ffn
from surgery.progress import Progress, no_progress


def build_index(
    model: Model,
    text: str | Sequence[str] | Calibration = defaults.CALIBRATION_TEXTS,
    *,
    blocks: int = defaults.BLOCKS,
    block_size: int = defaults.BLOCK_SIZE,
    seed: int = defaults.SEED,
    spike_prompt: str | None = None,
    second_order: bool = False,
    save_samples: bool = False,
    broadcast_reads: bool = False,
    journal: Journal | None = None,
    progress: Progress[Any] = no_progress,
) -> ChannelIndex:
    """Index a model on calibration text: one forward and one backward pass, one decoder layer resident.

    `text`, `blocks`, `block_size`, `seed` and `spike_prompt` are the arguments of `calibrate`; if `text` is a
    Calibration, the other four are not used. `second_order` adds the statistics that methods like `obs` need,
    which takes F x F matrices. `save_samples` adds the samples that merging needs. With `broadcast_reads` one
    process reads each tensor and sends it to the other processes. With `journal`, an interrupted run resumes
    after the last finished layer; the result is bitwise the same.

    Raises CalibrationError as `calibrate` does and for fewer blocks than processes, MemoryBudgetError for a
    budget that is too small, and NumericsError, which names the layer, when hidden states or gradients are
    not finite.
    """
    calibration = text
    if not isinstance(calibration, Calibration):
        calibration = calibrate(
            model, calibration, blocks=blocks, block_size=block_size, seed=seed, spike_prompt=spike_prompt
        )
    run, drawn = model.run, calibration.blocks
    streamed = StreamedModel(model)
    distributed.init(run.device)
    local_ids = drawn.ids[distributed.shard(len(drawn.ids))].long()
    if len(drawn.ids) < distributed.world_size():
        raise CalibrationError(
            "fewer blocks than processes",
            expected=f"--blocks {distributed.world_size()} or more",
            found=str(len(drawn.ids)),
        )
    if broadcast_reads:
        streamed.read = distributed.BroadcastReader(streamed.checkpoint).read
    cost = index_cost(streamed.meta_model, len(local_ids), local_ids.shape[1], run, second_order)
    done = _done_everywhere(journal, run.device)
    found = find_structures(model, streamed, calibration, journal if done["structures"] else None, progress)
    if journal is not None and not done["structures"]:
        journal.save("structures", found.as_json())
        journal.mark("structures")
    stream = None
    if not done["index"]:
        with streamed.other_weights():
            stream = TokenStream(
                streamed,
                local_ids,
                micro_batch=cost.micro_batch,
                keep_inputs=True,
                place=cost.hidden_on,
                cache_bytes=cost.cache_bytes,
                journal=journal.folder if journal is not None else None,
            )
    nats = _forward(streamed, None if done["forward"] else stream, journal, progress)
    layers = _backward(
        streamed, stream, found.maxima, len(drawn.ids), (second_order, save_samples), journal, progress
    )
    if journal is not None:
        journal.mark("index")
        journal.forget("hidden.bin", "gradients.bin")
    tokens = int(drawn.ids.shape[0] * (drawn.ids.shape[1] - 1))
    return ChannelIndex(
        source=source_json(streamed.checkpoint),
        calibration=drawn.as_json(),
        run=run.as_json(),
        loss={"nats": nats, "tokens": tokens, "perplexity": math.exp(nats / tokens)},
        layers=layers,
        super_weights=found.super_weights,
        echoes=found.echoes,
        structures=found.structures,
        input_ids=drawn.ids,
        widths=streamed.meta_model.widths(),
        keys={ffn.kind: ffn.site.width_key for ffns in streamed.meta_model.ffns for ffn in ffns},
    )


def _done_everywhere(journal: Journal | None, device: torch.device) -> dict[str, bool]:
    """Whether the journals of all processes hold the whole index, its structures, and its forward pass.

    A process whose journal holds a step that another process lacks clears its journal and starts over.
    """
    steps = ("index", "structures", "forward")
    known = [journal is not None and step in journal for step in steps]
    done = dict(zip(steps, distributed.all_true(known, device), strict=True))
    if journal is not None and known != list(done.values()):
        # Its backward steps can't be used: another process lacks them, or the saved hidden states are gone.
        journal.start_over()
    return done


def _forward(
    model: StreamedModel, stream: TokenStream | None, journal: Journal | None, progress: Progress[Any]
) -> float:
    """Run all blocks through the layers, and compute the loss and its gradient; returns the summed loss.

    Layers that the journal lists as done do not run. Without a stream the loss is loaded from the journal.
    """
    if stream is None:
        assert journal is not None
        fields, _ = journal.load("forward")
        return float(fields["nats"])
    count = len(model.layers)
    remaining = [n for n in range(count) if journal is None or f"forward {n}" not in journal]
    for number, layer in progress(model.stream_layers(remaining), "forward", len(remaining)):
        with in_layer(number):
            stream.forward(number, layer)
            if journal is not None:
                journal.mark(f"forward {number}")
    nats = next_token_loss(stream, with_gradient=True)
    total = float(distributed.all_reduce_sum(nats.sum().to(model.device)))
    if journal is not None:
        journal.save("forward", {"nats": total})
        journal.mark("forward")
    return total


def _backward(
    model: StreamedModel,
    stream: TokenStream | None,
    maxima: list[dict[str, float]],
    all_blocks: int,
    extras: tuple[bool, bool],
    journal: Journal | None,
    progress: Progress[Any],
) -> list[LayerIndex]:
    """Backpropagate through all layers and compute their statistics.

    Layers that the journals of all processes hold are loaded from the journal.
    """
    count = len(model.layers)
    layers: list[LayerIndex | None] = [None] * count
    known = [journal is not None and f"backward {number}" in journal for number in range(count)]
    in_all_journals = distributed.all_true(known, model.device)
    for number in range(count):
        if journal is not None and in_all_journals[number]:
            fields, tensors = journal.load(f"layer-{number}")
            layers[number] = layer_from(number, fields, tensors, fields["tokens"])
    remaining = [number for number in reversed(range(count)) if layers[number] is None]
    for number, layer in progress(model.stream_layers(remaining), "backward", len(remaining)):
        assert stream is not None
        found = _index_layer(model, stream, number, layer, maxima[number], all_blocks, *extras)
        layers[number] = found
        if journal is not None:
            fields = {**found.summary(), "tokens": all_blocks * stream.ids.shape[1]}
            tensors = {**layer_tensors(number, found), **sample_tensors(number, found)}
            with in_layer(number):
                journal.save(f"layer-{number}", fields, tensors)
                journal.mark(f"backward {number}")
            # Otherwise a faster process overwrites its gradients, and a resumed run can't repeat this layer.
            distributed.barrier()
    return [layer for layer in layers if layer is not None]


def index_fingerprint(
    model: Model, calibration: Calibration, second_order: bool = False, save_samples: bool = False
) -> dict[str, Any]:
    """Everything that a run of `build_index` depends on.

    These are the source and its files, tokens, prompts, options, versions and processes. Two runs with equal
    fingerprints give the same index, so one may resume the other.
    """
    return {
        "source": source_json(model.checkpoint),
        "files": model.checkpoint.file_fingerprints(),
        "calibration": calibration.blocks.as_json(),
        "prompts": [ids.tolist() for ids in calibration.prompts],
        "run": model.run.as_json(),
        "memory": model.run.memory,
        "second_order": second_order,
        "save_samples": save_samples,
        "processes": [distributed.rank(), distributed.world_size()],
    }


def _index_layer(
    model: StreamedModel,
    stream: TokenStream,
    number: int,
    layer: nn.Module,
    maxima: dict[str, float],
    all_blocks: int,
    second_order: bool,
    save_samples: bool,
) -> LayerIndex:
    """Backpropagate through a resident layer and compute its statistics.

    Raises NumericsError, which names the layer, when a statistic is not finite.
    """
    ffns = model.ffns(number)
    blocks, block_size = stream.ids.shape
    sums = LayerStatistics(ffns, blocks, block_size, model.device, all_blocks)
    if second_order:
        moments = SecondOrder(ffns, layer, model.device)

        def observe(activations: FfnActivations) -> None:
            sums.add(activations)
            moments.add(activations)

        with moments.watching():
            stream.backward(number, layer, observe, moments.gradients)
    else:
        stream.backward(number, layer, sums.add)
    finished = sums.finish(for_merging=save_samples)
    for name, values in (moments.finish() if second_order else {}).items():
        finished[name].values.update(values)
    found = {}
    for ffn in ffns:
        statistics = finished[ffn.name]
        if not all(value.isfinite().all() for value in statistics.values.values()):
            raise NumericsError(
                "NaN or infinity in the channel statistics",
                where=f"layer {number}",
                next_step="use --dtype float32, or check the checkpoint's weights",
            )
        ffn_index = found[ffn.name] = index_ffn(ffn, statistics, block_size)
        if save_samples:
            ffn_index.sample = statistics.sampled_q.cpu()
            ffn_index.positions = None if statistics.positions is None else statistics.positions.cpu()
            ffn_index.by_block = None if statistics.by_block is None else statistics.by_block.cpu()
        if ffn.stacked:
            model.malloc.trim()  # each expert frees matrices that malloc would otherwise not return
    return LayerIndex(found, maxima)


def index_ffn(ffn: Ffn, statistics: FfnStatistics, block_size: int) -> FfnIndex:
    """Index of one FFN, whose weights are resident: adds weight norms, supernodes and halo to its statistics.

    `block_size` is the number of tokens in a block.
    """
    values, down = dict(statistics.values), ffn.down_weight()
    values |= weight_norms(*ffn.in_weights(), down)
    values["weight_range"] = weight_range(*ffn.in_weights(), down)
    # An expert that no token was routed to has no loss proxy, and therefore no supernodes.
    has_tokens = statistics.tokens > 0
    core = supernodes.supernodes(values["loss_proxy"]) if has_tokens else torch.empty(0, dtype=torch.long)
    device_core, q = core.to(down.device), statistics.sampled_q
    values["halo_connectivity"] = supernodes.connectivity(down, device_core).cpu()
    values["halo_redundancy"] = supernodes.redundancy(q, device_core).cpu()
    published = supernodes.redundancy(q / (block_size - 1), device_core, supernodes.PUBLISHED_EPSILON)
    values["halo_redundancy_published"] = published.cpu()
    return FfnIndex(
        values,
        core,
        statistics.tokens,
        kind=ffn.kind,
        expert=ffn.expert,
        block_sums=statistics.block_sums,
    )
