"""`surgeon index`: one forward and one backward walk over the layers make a ChannelIndex."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from surgery import distributed, halo
from surgery.calibration import TokenBlocks
from surgery.checkpoint import Checkpoint
from surgery.costs import index_costs
from surgery.errors import CalibrationError, NumericsError
from surgery.faults import at_layer
from surgery.ffn import Ffn
from surgery.index import (
    ChannelIndex,
    FfnIndex,
    LayerIndex,
    Track,
    layer_from,
    layer_tensors,
    sample_tensors,
    source_json,
    untracked,
)
from surgery.journal import Journal
from surgery.second_order import SecondOrder
from surgery.statistics import LayerStatistics, UnitStatistics, weight_norms, weight_range
from surgery.stream import StreamedModel
from surgery.super_weights import SuperWeight, SuperWeightDetector, down_of
from surgery.tokens import Flow, TokenStream

ABLATION_BLOCKS = 8
MAX_ABLATIONS = 12


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what to compute: device, compute dtype, bytes of host memory for hidden states."""

    device: torch.device
    dtype: torch.dtype
    memory: int

    def as_json(self) -> dict[str, Any]:
        """The `run` entry of index.json."""
        return {
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """Versions of what computed a result."""
    import transformers

    from surgery import __version__

    return {
        "surgeon": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def build_index(
    checkpoint: Checkpoint,
    blocks: TokenBlocks,
    prompts: list[torch.Tensor],
    options: RunOptions,
    track: Track[Any] = untracked,
    *,
    second_order: bool = False,
    keep_sample: bool = False,
    share_reads: bool = False,
    journal: Journal | None = None,
) -> ChannelIndex:
    """Index a checkpoint on calibration blocks [N, T]; `prompts` (ids [P]) ride along to find super weights.

    With `second_order` also the statistics that methods like `obs` need, at the price of two F x F matrices; with
    `keep_sample` also what merging needs; with `share_reads` each tensor is read by one process and sent to the others. With `journal`, every layer done is kept there and not done again; the result is
    the same to the bit. Raises NumericsError when hidden states or gradients are not finite, naming the layer.
    """
    model = StreamedModel(checkpoint, options.device, options.dtype, memory=options.memory)
    distributed.join(options.device)
    mine = blocks.ids[distributed.shard(len(blocks.ids))].long()
    if len(blocks.ids) < distributed.world_size():
        raise CalibrationError(
            "fewer blocks than processes",
            expected=f"--blocks {distributed.world_size()} or more",
            found=str(len(blocks.ids)),
        )
    if share_reads:
        model.read = distributed.SharedReading(checkpoint).read
    costs = index_costs(model.skeleton, len(mine), mine.shape[1], options, second_order)
    done = _done_everywhere(journal, options.device)
    stream = detector = None
    if not done["index"]:
        folder = journal.folder if journal is not None else None
        with model.outside():
            stream = TokenStream(
                model,
                mine,
                micro_batch=costs.micro_batch,
                keep_inputs=True,
                host_bytes=0 if costs.hidden_on == "disk" else None,
                graph_bytes=costs.graph_bytes,
                journal=folder,
            )
            if not done["forward"]:
                detector = SuperWeightDetector(model, prompts)
    ahead = _forward(model, stream, detector, journal, track)
    layers = _backward(
        model, stream, ahead.maxima, len(blocks.ids), (second_order, keep_sample), journal, track
    )
    if journal is not None:
        journal.mark("index")
        journal.forget("hidden.bin", "gradients.bin")
    tokens = int(blocks.ids.shape[0] * (blocks.ids.shape[1] - 1))
    return ChannelIndex(
        source=source_json(checkpoint),
        calibration=blocks.as_json(),
        run=options.as_json(),
        loss={"nats": ahead.nats, "tokens": tokens, "perplexity": math.exp(ahead.nats / tokens)},
        layers=layers,
        super_weights=ahead.super_weights,
        echoes=ahead.echoes,
        input_ids=blocks.ids,
        widths=model.skeleton.widths(),
        keys={ffn.key: ffn.site.width_key for ffns in model.skeleton.ffns for ffn in ffns},
    )


def _done_everywhere(journal: Journal | None, device: torch.device) -> dict[str, bool]:
    """Which parts of an index the journals of all processes have; one that lost its own makes all begin again."""
    steps = ("index", "forward")
    known = [journal is not None and step in journal for step in steps]
    done = dict(zip(steps, distributed.everywhere(known, device), strict=True))
    if journal is not None and known != list(done.values()):
        journal.start_over()  # what it has of the backward pass is of no use to the others, or its hidden states are gone
    return done


@dataclass(frozen=True)
class _Ahead:
    """What the forward walk finds: summed loss in nats, super weights, echoes, largest prompt activations per layer."""

    nats: float
    super_weights: list[SuperWeight]
    echoes: list[SuperWeight]
    maxima: list[dict[str, float]]


def _forward(
    model: StreamedModel,
    stream: TokenStream | None,
    detector: SuperWeightDetector | None,
    journal: Journal | None,
    track: Track[Any],
) -> _Ahead:
    """Move all blocks to the loss and its gradient; layers that a journal has done are only walked by the prompts."""
    if detector is None:
        assert journal is not None
        fields, _ = journal.load("forward")
        weights, echoes = (
            [SuperWeight.from_json(w) for w in fields[key]] for key in ("super_weights", "echoes")
        )
        return _Ahead(fields["nats"], weights, echoes, fields["maxima"])
    assert stream is not None
    ablations = _Ablations(model, stream)
    count = len(model.layers)
    for number, layer in track(model.walk(range(count)), "forward", count):
        for candidate in detector.forward(number, layer):
            ablations.start(candidate, number)
        ablations.forward(number, layer)
        if journal is None or f"forward {number}" not in journal:
            with at_layer(number):
                stream.forward(number, layer)
                if journal is not None:
                    journal.mark(f"forward {number}")
    with model.outside():
        nats = stream.loss(with_gradient=True)
        effects = ablations.finish(nats)
    weights, echoes = detector.finish(model.checkpoint.config)
    found = _Ahead(
        float(distributed.total(nats.sum().to(model.device))),
        [replace(w, ablation=effects.get(w.place, {})) for w in weights],
        [replace(w, ablation=effects.get(w.place, {})) for w in echoes],
        detector.maxima,
    )
    if journal is not None:
        kinds = {"super_weights": found.super_weights, "echoes": found.echoes}
        listed = {key: [weight.as_json() for weight in entries] for key, entries in kinds.items()}
        journal.save("forward", {"nats": found.nats, "maxima": found.maxima, **listed})
        journal.mark("forward")
    return found


def _backward(
    model: StreamedModel,
    stream: TokenStream | None,
    maxima: list[dict[str, float]],
    all_blocks: int,
    extras: tuple[bool, bool],
    journal: Journal | None,
    track: Track[Any],
) -> list[LayerIndex]:
    """Pull the gradient back through all layers; those that the journals of all processes have done are read from one."""
    count = len(model.layers)
    layers: list[LayerIndex | None] = [None] * count
    known = [journal is not None and f"backward {number}" in journal for number in range(count)]
    everywhere = distributed.everywhere(known, model.device)
    for number in range(count):
        if journal is not None and everywhere[number]:
            fields, tensors = journal.load(f"layer-{number}")
            layers[number] = layer_from(number, fields, tensors, fields["tokens"])
    left = [number for number in reversed(range(count)) if layers[number] is None]
    for number, layer in track(model.walk(left), "backward", len(left)):
        assert stream is not None
        found = _index_layer(model, stream, number, layer, maxima[number], all_blocks, *extras)
        layers[number] = found
        if journal is not None:
            fields = {**found.summary(), "tokens": all_blocks * stream.ids.shape[1]}
            tensors = {**layer_tensors(number, found), **sample_tensors(number, found)}
            with at_layer(number):
                journal.save(f"layer-{number}", fields, tensors)
                journal.mark(f"backward {number}")
            distributed.wait()  # or a process ahead would overwrite gradients that the others may need again
    return [layer for layer in layers if layer is not None]


def index_fingerprint(
    checkpoint: Checkpoint,
    blocks: TokenBlocks,
    prompts: list[torch.Tensor],
    options: RunOptions,
    second_order: bool,
    keep_sample: bool = False,
) -> dict[str, Any]:
    """What makes two runs of `build_index` the same: source and its files, tokens, prompts, options, versions."""
    return {
        "source": source_json(checkpoint),
        "files": checkpoint.stamps(),
        "calibration": blocks.as_json(),
        "prompts": [ids.tolist() for ids in prompts],
        "run": options.as_json(),
        "memory": options.memory,
        "second_order": second_order,
        "keep_sample": keep_sample,
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
    keep_sample: bool,
) -> LayerIndex:
    """Pull gradients through a resident layer and finish its statistics."""
    ffns = model.ffns(number)
    blocks, block_size = stream.ids.shape
    sums = LayerStatistics(ffns, blocks, block_size, model.device, all_blocks)
    if second_order:
        more = SecondOrder(ffns, layer, model.device)

        def observe(flow: Flow) -> None:
            sums.add(flow)
            more.add(flow)

        with more.watching():
            stream.backward(number, layer, observe, more.gradients)
    else:
        stream.backward(number, layer, sums.add)
    finished = sums.finish(with_positions=keep_sample)
    for unit, values in (more.finish() if second_order else {}).items():
        finished[unit].values.update(values)
    found = {}
    for ffn in ffns:
        for place, unit in enumerate(ffn.units):
            if not all(value.isfinite().all() for value in finished[unit].values.values()):
                raise NumericsError(
                    "NaN or infinity in the channel statistics",
                    where=f"layer {number}",
                    next_step="use --dtype float32, or check the checkpoint's weights",
                )
            found[unit] = index_ffn(ffn, place, finished[unit], stream.ids.shape[1])
            if keep_sample:
                positions = finished[unit].positions
                found[unit].sample = finished[unit].sampled_q.cpu()
                found[unit].positions = None if positions is None else positions.cpu()
            if ffn.stacked:
                model.heap.settle()  # of a hundred experts each leaves matrices' worth of freed memory
    return LayerIndex(found, maxima)


def index_ffn(ffn: Ffn, place: int, unit: UnitStatistics, block_size: int) -> FfnIndex:
    """Add weight norms, supernodes and halo to the statistics of one FFN, whose weights are resident."""
    values, down = dict(unit.values), ffn.down_weight(place)
    values |= weight_norms(*ffn.row_weights(place), down)
    values["weight_range"] = weight_range(*ffn.row_weights(place), down)
    # An expert no token reached has no loss proxy: it has no supernodes either.
    core = halo.supernodes(values["loss_proxy"]) if unit.tokens else torch.empty(0, dtype=torch.long)
    values["halo_connectivity"] = halo.connectivity(down, core.to(down.device)).cpu()
    values["halo_redundancy"] = halo.redundancy(unit.sampled_q, core.to(down.device)).cpu()
    of_mean_loss = unit.sampled_q / (block_size - 1)
    published = halo.redundancy(of_mean_loss, core.to(down.device), halo.PUBLISHED_EPSILON)
    values["halo_redundancy_published"] = published.cpu()
    return FfnIndex(values, core, unit.tokens)


class _Ablations:
    """Copies of a few blocks that run on without a candidate super weight, to measure what its loss costs."""

    def __init__(self, model: StreamedModel, stream: TokenStream) -> None:
        self.model = model
        self.stream = stream
        self.branches: list[tuple[SuperWeight, TokenStream]] = []

    def start(self, weight: SuperWeight, number: int) -> None:
        """Branch off before layer `number`; past MAX_ABLATIONS candidates the rest go unmeasured."""
        if len(self.branches) < MAX_ABLATIONS:
            self.branches.append((weight, self.stream.fork(ABLATION_BLOCKS, number)))

    def forward(self, number: int, layer: nn.Module) -> None:
        """Move every branch through the resident layer, its own weight set to zero where that lies here."""
        for weight, branch in self.branches:
            if weight.layer != number:
                branch.forward(number, layer)
                continue
            parameter = down_of(self.model.ffns(number), weight.ffn)
            value = parameter[weight.row, weight.column].clone()
            parameter[weight.row, weight.column] = 0
            branch.forward(number, layer)
            parameter[weight.row, weight.column] = value

    def finish(self, nats: torch.Tensor) -> dict[tuple[int, str, int, int], dict[str, float]]:
        """Place of a weight -> perplexity with and without the weight, on the same tokens."""
        effects = {}
        for weight, branch in self.branches:
            tokens = branch.ids.shape[0] * (branch.ids.shape[1] - 1)
            intact = math.exp(float(nats[: len(branch.ids)].sum()) / tokens)
            # A destroyed model can lose more nats a token than a float holds as perplexity.
            ablated = math.exp(min(700.0, float(branch.loss().sum()) / tokens))
            effects[weight.place] = {
                "perplexity": intact,
                "perplexity_without": ablated,
                "factor": ablated / intact,
                "tokens": tokens,
            }
        return effects
