"""Repair on the way through the layers: a dense and a pruned stream of calibration tokens, one layer resident.

Each layer is run by the dense stream; then, by the pruned one, once with all its channels to collect moments; what the
kept ones put out once mended is added without a further run. Its attention output projection is mended before its FFN, by the same least squares: it is
the first place where the damage of earlier layers can be made up for (`attention`). Where the matrices of all channels
would outgrow the budget, channels are solved for in parts, one pass and one smaller matrix for each, every part making
up for what those before it left (block Gauss-Seidel).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from surgery.attention import mend_attention
from surgery.cut_costs import CutCosts
from surgery.dense import DenseStream, Seen, run_observed
from surgery.ffn import Ffn
from surgery.mended import Change, MendedLayer, stored_apart
from surgery.plan import ResizePlan
from surgery.repair import (
    HELD_OUT,
    Moments,
    least_squares,
    mean_shift,
    repair,
    token_weights,
)
from surgery.repair_memory import parts, schedule
from surgery.resize import mask_channels
from surgery.stream import StreamedModel
from surgery.tokens import TokenStream, check_finite

Pair = tuple[Moments, Moments]


class Mender:
    """Mends the layers of one plan beside a dense stream; `layer` is called once for each layer the dense stream has run.

    With `accumulate`, inputs are those of the pruned model and targets what brings its residual stream to the dense one;
    without, each layer is mended by itself, on the dense model's inputs: by least squares, or with `mean_only` by the mean
    of what is missing. `budget` is in bytes, for matrices.
    """

    def __init__(
        self,
        dense: DenseStream,
        plan: ResizePlan,
        accumulate: bool,
        budget: int | None = None,
        mean_only: bool = False,
    ) -> None:
        self.model = dense.model
        self.dense = dense
        self.plan = plan
        self.accumulate = accumulate
        self.mean_only = mean_only
        self.budget = budget
        blocks = len(dense.stream.ids)
        self.pruned = dense.stream.fork(blocks, 0, place=dense.place) if accumulate else dense.stream
        self.first_held = blocks - max(1, blocks // HELD_OUT)
        self.finer = stored_apart(self.model.skeleton)

    @torch.no_grad()
    def layer(self, number: int, layer: nn.Module) -> MendedLayer:
        """Mend the resident layer in place, its removed channels set to zero, and move the pruned stream through it."""
        done = MendedLayer(finer=self.finer)
        additive = self.accumulate and self.dense.additive
        if additive and self.dense.attention is not None:
            done.attention = mend_attention(self, number, layer, self.dense.attention, done)
        self._mend_ffns(number, layer, additive, done)
        if additive:
            self._finish(number)
        elif self.accumulate:
            self.pruned.forward(number, layer)
        return done

    def _finish(self, number: int) -> None:
        """Move the pruned stream on: to what it is before the FFN, the mended columns' output is added."""
        (ffn,) = self.model.ffns(number)
        kept = self.plan.layers[number].kept.to(self.model.device)
        weight, bias = ffn.down_weight()[:, kept], ffn.down_bias()
        finite = torch.ones((), dtype=torch.bool, device=self.model.device)
        channels = self.dense.channels(len(kept))
        for part in self.pruned.slices:
            u = channels.get(0, part, self.model.device, len(kept))
            output = self.pruned.store.get(0, part, self.model.device) + functional.linear(u, weight, bias)
            finite &= output.isfinite().all()
            self.pruned.store.put(0, part, output)
        check_finite(finite, number)

    # -- FFNs -------------------------------------------------------------------------------------------------------

    def _mend_ffns(self, number: int, layer: nn.Module, additive: bool, done: MendedLayer) -> None:
        """Mend the kept columns of every FFN, a part of the channels in each pass, and zero the removed ones."""
        ffns = self.model.ffns(number)
        plans = self.plan.layers[number].ffns
        places = {unit: (ffn, place) for ffn in ffns for place, unit in enumerate(ffn.units)}
        outputs = len(ffns[0].down_weight()) if ffns else 0
        chunks = {unit: parts(len(plans[unit].kept), outputs, self.budget) for unit in places}
        turns = schedule(chunks, outputs, self.budget)
        originals = {
            unit: (ffn.down_weight(place).clone(), ffn.down_bias(place))
            for unit, (ffn, place) in places.items()
            if len(turns) > 1 and not additive
        }
        originals = {u: (w, None if b is None else b.clone()) for u, (w, b) in originals.items()}
        for turn, now in enumerate(turns):
            last = turn == len(turns) - 1
            moments = self._ffn_moments(number, layer, additive, now, originals if turn else {}, last)
            for unit, pair in moments.items():
                ffn, place = places[unit]
                solve = (
                    partial(mean_shift, has_bias=ffn.bias_name is not None)
                    if self.mean_only
                    else least_squares
                )
                found = repair(*pair, solve)
                done.ffns.setdefault(unit, []).append(replace(found, change=None))
                if found.change is not None:
                    columns = plans[unit].kept[now[unit]].to(found.change.device)
                    self._apply(ffn, place, columns, found.change, done)
        for ffn in ffns:
            for place, unit in enumerate(ffn.units):
                weight = ffn.down_weight(place)
                removed = torch.ones(ffn.width, dtype=torch.bool, device=weight.device)
                removed[plans[unit].kept.to(weight.device)] = False
                weight[:, removed] = 0

    @staticmethod
    def _apply(ffn: Ffn, place: int, columns: torch.Tensor, change: torch.Tensor, done: MendedLayer) -> None:
        """Add a change [D, K] of some columns, and of the bias where there is one [D, K + 1], in double precision."""
        weight, bias = ffn.down_weight(place), ffn.down_bias(place)
        path = ffn.site.down if ffn.stacked else f"{ffn.site.down}.weight"
        expert = place if ffn.stacked else None
        done.note(path, Change(change[:, : len(columns)], columns, ffn.transposed, expert))
        if bias is not None and ffn.bias_name is not None:
            done.note(ffn.bias_name, Change(change[:, -1], expert=expert))
            bias.copy_((bias.to(change) + change[:, -1]).to(bias.dtype))
        weight[:, columns] = (weight[:, columns].to(change) + change[:, : len(columns)]).to(weight.dtype)

    def _ffn_moments(
        self,
        number: int,
        layer: nn.Module,
        additive: bool,
        chunks: dict[str, slice],
        originals: dict[str, tuple[torch.Tensor, torch.Tensor | None]],
        last: bool,
    ) -> dict[str, Pair]:
        """(train, held out) moments of a part of every FFN's kept channels, and of the outputs wanted of them.

        An FFN is to put out what it did before it was touched (`originals`, once it has been), or in an additive layer
        what leads to the dense stream. An expert that no token reaches has none, and is left as it is.
        """
        plans = self.plan.layers[number].ffns
        ffns = self.model.ffns(number)
        places = {unit: (ffn, place) for ffn in ffns for place, unit in enumerate(ffn.units)}
        found: dict[str, Pair] = {}

        def use(part: slice, output: torch.Tensor, seen: Seen) -> None:
            aim = self.dense.leaving.get(0, part, self.model.device)
            for unit, tokens, u, y in seen:
                if unit not in chunks:
                    continue
                ffn, place = places[unit]
                kept = plans[unit].kept.to(u.device)
                bias = ffn.down_bias(place)
                if unit not in found:
                    constant, size = self.mean_only or bias is not None, len(kept[chunks[unit]])
                    first, second = (Moments.zeros(y.shape[-1], size, y.device, constant) for _ in range(2))
                    found[unit] = (first, second)
                if additive:
                    wanted = y.view_as(output) + (aim - output)
                elif unit in originals:
                    weight, shift = originals[unit]
                    wanted = u @ weight.T if shift is None else u @ weight.T + shift
                else:
                    wanted = y
                wanted = wanted if bias is None else wanted - bias
                columns = ffn.down_weight(place)[:, kept]
                self.add(found[unit], part, u[..., kept], wanted, columns, aim, tokens, chunks[unit])
            if additive and last:  # all that is needed to go on without running the layer again
                flow = seen[0][2][..., kept]  # some families hand their FFN flattened blocks
                self.dense.channels(len(kept)).put(0, part, flow.view(*output.shape[:2], -1))
                self.pruned.store.put(0, part, output - seen[0][3].view_as(output))

        run_observed(self.pruned, number, layer, use)
        return found

    def add(
        self,
        moments: Pair,
        part: slice,
        inputs: torch.Tensor,
        wanted: torch.Tensor,
        weight: torch.Tensor,
        stream: torch.Tensor,
        tokens: torch.Tensor | None = None,
        chunk: slice = slice(None),
    ) -> None:
        """Account for a micro-batch, training and held-out blocks apart."""
        weights = token_weights(stream).flatten()
        if self.mean_only:
            weights = torch.ones_like(weights)  # FLAP's mean is over tokens as they are
        if tokens is not None:
            weights = weights[tokens]
        u, r = inputs.reshape(-1, inputs.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
        border = (self.first_held - part.start) * stream.shape[1]  # tokens from here on are held out
        if border >= stream.shape[:2].numel() or border <= 0:
            moments[border <= 0].add(u, r, weight, weights, chunk)
            return
        places = torch.arange(len(u), device=u.device) if tokens is None else tokens
        for mine, chosen in zip(moments, (places < border, places >= border), strict=True):
            mine.add(u[chosen], r[chosen], weight, weights[chosen], chunk)


class LayerCutter:
    """What makes a resident layer compute what it will as written; to be called with each layer, in order.

    Removed channels are masked and, where the plan repairs, what stays is mended on calibration blocks `ids` [N, T].
    `streams` are the tokens on their way, all there is to know to go on after any layer.
    """

    def __init__(self, model: StreamedModel, plan: ResizePlan, ids: torch.Tensor, costs: CutCosts) -> None:
        self.mask = mask_channels(plan, model.skeleton.ffns)
        self.streams: list[TokenStream] = []
        self.mender: Mender | None = None
        if plan.repair != "none":
            dense = dense_stream(model, ids, costs)
            self.mender = mender(dense, plan, costs)
            self.streams = [dense.stream, *([self.mender.pruned] if self.mender.accumulate else [])]

    def __call__(self, number: int, layer: nn.Module) -> MendedLayer | None:
        """Cut a layer; returns what was mended, None where nothing was to be."""
        if self.mender is None:
            self.mask(number, layer)
            return None
        self.mender.dense.run(number, layer)
        done = self.mender.layer(number, layer)
        self.mender.dense.step()
        return done


def dense_stream(model: StreamedModel, ids: torch.Tensor, costs: CutCosts) -> DenseStream:
    """Calibration blocks `ids` [N, T] before the first layer."""
    return DenseStream(model, ids, costs.micro_batch, costs.hidden_on)


def mender(dense: DenseStream, plan: ResizePlan, costs: CutCosts) -> Mender:
    """What carries out a plan's repair."""
    accumulate, mean_only = plan.repair == "lstsq-acc", plan.repair == "bias"
    return Mender(dense, plan, accumulate, costs.matrix_bytes, mean_only)
