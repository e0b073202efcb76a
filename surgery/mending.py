"""Repair on the way through the layers: a dense and a pruned stream of calibration tokens, one layer resident.

Each layer is run by the dense stream; then, by the pruned one, once with all its channels to collect moments, and once
more as it will be written. Its attention output projection is mended before its FFN, by the same least squares: it is
the first place where the damage of earlier layers can be made up for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.devices import micro_batch
from surgery.ffn import Ffn, observed
from surgery.hidden import HiddenStore
from surgery.plan import ResizePlan
from surgery.repair import HELD_OUT, Moments, Repair, repair, token_weights
from surgery.resize import mask_channels
from surgery.skeleton import Skeleton
from surgery.stream import LayerCall, StreamedModel
from surgery.super_weights import down_of
from surgery.tokens import TokenStream

if TYPE_CHECKING:
    from surgery.indexing import RunOptions

ADDITIVE_ERROR = (
    0.05  # unexplained share of what a module's output adds to the stream; rounding stays far below
)
Seen = list[tuple[str, torch.Tensor | None, torch.Tensor, torch.Tensor]]


class _Reached(Exception):
    """Carries a tensor out of a layer's forward."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@dataclass
class MendedLayer:
    """What became of one layer: repairs by FFN, that of the attention's output, and changed parameters by name.

    `parameters` are paths inside the layer whose values in memory are no longer the checkpoint's.
    """

    ffns: dict[str, Repair] = field(default_factory=dict)
    attention: Repair | None = None
    parameters: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The entry of `repair` in surgeon.json."""
        return {
            "ffns": {unit: found.as_json() for unit, found in self.ffns.items()},
            "attention": self.attention.as_json() if self.attention else None,
        }


class Mender:
    """Carries both streams; `layer` is called once for each resident layer, in order.

    With `accumulate`, targets are what brings the pruned residual stream to the dense one; without, each layer is
    mended by itself, on the dense model's inputs.
    """

    def __init__(
        self,
        model: StreamedModel,
        plan: ResizePlan,
        ids: torch.Tensor,
        micro_batch: int,
        accumulate: bool,
        host_bytes: int | None = None,
    ) -> None:
        self.model = model
        self.plan = plan
        self.accumulate = accumulate
        third = None if host_bytes is None else host_bytes // 3
        self.dense = TokenStream(model, ids, micro_batch=micro_batch, host_bytes=third)
        self.pruned = self.dense.fork(len(ids), 0, third) if accumulate else self.dense
        shape = (1, *ids.shape, self.dense.store.shape[-1])
        self.before_ffn = HiddenStore(shape if accumulate else (0,), self.dense.store.dtype, third)
        self.first_held = len(ids) - max(1, len(ids) // HELD_OUT)

    @torch.no_grad()
    def layer(self, number: int, layer: nn.Module) -> MendedLayer:
        """Mend the resident layer in place, its removed channels set to zero, and move both streams through it."""
        ffns = self.model.ffns(number)
        done = MendedLayer()
        additive = self.accumulate and self._ffn_is_additive(number, layer, ffns)
        if not self.accumulate:
            moments = self._ffn_moments(number, layer, ffns, additive=False)
            self.dense.forward(number, layer)
        else:
            self._dense_pass(number, layer, ffns, additive)
            if additive:
                self._mend_attention(number, layer, done)
            moments = self._ffn_moments(number, layer, ffns, additive)
        for ffn in ffns:
            self._mend_ffn(number, ffn, moments, done)
        if self.accumulate:
            self.pruned.forward(number, layer)
        return done

    # -- the streams ------------------------------------------------------------------------------------------------

    def _run(
        self, stream: TokenStream, number: int, layer: nn.Module, ffns: list[Ffn], use: Callable[..., None]
    ) -> None:
        """Run every micro-batch and call `use(part, entering, output, seen)`; the stream stays where it is."""
        seen: Seen = []
        with observed(ffns, lambda *flow: seen.append(flow)):
            for part, calls in zip(stream.slices, stream.calls, strict=True):
                entering = stream.store.get(0, part, self.model.device)
                output = self.model.run_layer(layer, entering, calls[number])
                use(part, entering, output, seen)
                seen.clear()

    def _dense_pass(self, number: int, layer: nn.Module, ffns: list[Ffn], additive: bool) -> None:
        """Move the dense stream on; of an additive layer also keep what the residual stream is before the FFN."""

        def use(part: slice, _: torch.Tensor, output: torch.Tensor, seen: Seen) -> None:
            if additive:
                self.before_ffn.put(0, part, output - seen[0][3].view_as(output))
            self.dense.store.put(0, part, output)

        self._run(self.dense, number, layer, ffns, use)

    def _ffn_is_additive(self, number: int, layer: nn.Module, ffns: list[Ffn]) -> bool:
        """Whether the layer adds its only FFN's output, as it is, to the residual stream: tried on a few blocks."""
        if len(ffns) != 1 or ffns[0].stacked:
            return False
        entering, output, added = self._try(number, layer)
        handle = ffns[0].module.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
        try:
            without = self.model.run_layer(layer, entering, self.pruned.calls[0][number])
        finally:
            handle.remove()
        return _adds(output - without, added, output)

    def _try(self, number: int, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What enters a layer with one FFN, what leaves it, and what its FFN puts out, on the first micro-batch."""
        part, calls = self.pruned.slices[0], self.pruned.calls[0]
        entering = self.pruned.store.get(0, part, self.model.device)
        seen: Seen = []
        with observed(self.model.ffns(number), lambda *flow: seen.append(flow)):
            output = self.model.run_layer(layer, entering, calls[number])
        return entering, output, seen[0][3].view_as(output)

    # -- attention --------------------------------------------------------------------------------------------------

    def _mend_attention(self, number: int, layer: nn.Module, done: MendedLayer) -> None:
        """Refit the module that writes the attention's output to the residual stream, where one can be told."""
        name = self._attention_output(number, layer)
        if name is None:
            return
        linear = layer.get_submodule(name)
        transposed = type(linear).__name__ == "Conv1D"
        parameter = linear.weight
        assert isinstance(parameter, torch.Tensor)
        weight = parameter.data.t() if transposed else parameter.data
        train, held = (Moments.zeros(weight.shape[0], weight.shape[1], self.model.device) for _ in range(2))
        bias = getattr(linear, "bias", None)
        for part, calls in zip(self.pruned.slices, self.pruned.calls, strict=True):
            entering = self.pruned.store.get(0, part, self.model.device)
            entered = self._input_of(linear, layer, entering, calls[number])
            target = self.before_ffn.get(0, part, self.model.device) - entering
            wanted = target if bias is None else target - bias
            stream = self.dense.store.get(0, part, self.model.device)
            self._add((train, held), part, entered, wanted, weight, stream)
        done.attention = repair(train, held, weight)
        if done.attention.ridge is not None:
            weight.copy_(done.attention.weight.to(weight.dtype))
            done.parameters.append(f"{name}.weight")

    def _input_of(
        self, linear: nn.Module, layer: nn.Module, entering: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        """What enters a module of the layer; the layer runs no further, which saves its FFN."""

        def stop(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            raise _Reached(arguments[0])

        handle = linear.register_forward_pre_hook(stop)
        try:
            self.model.run_layer(layer, entering, call)
        except _Reached as reached:
            return reached.tensor
        finally:
            handle.remove()
        raise AssertionError("the layer never ran its attention")

    def _attention_output(self, number: int, layer: nn.Module) -> str | None:
        """The linear outside the FFN whose output, added to what enters the layer, is the stream before the FFN."""
        site = self.model.ffns(number)[0].site
        inside = {*site.rows, site.down}
        outputs: dict[str, torch.Tensor] = {}
        handles = []
        for name, module in layer.named_modules():
            if name not in inside and type(module).__name__ in ("Linear", "Conv1D"):

                def keep(_: nn.Module, __: object, output: torch.Tensor, key: str = name) -> None:
                    outputs[key] = output

                handles.append(module.register_forward_hook(keep))
        try:
            entering, output, from_ffn = self._try(number, layer)
        finally:
            for handle in handles:
                handle.remove()
        added = output - from_ffn - entering
        for name, found in outputs.items():
            if found.numel() == added.numel() and _adds(added, found.view_as(added), output):
                return name
        return None

    # -- FFNs -------------------------------------------------------------------------------------------------------

    def _ffn_moments(
        self, number: int, layer: nn.Module, ffns: list[Ffn], additive: bool
    ) -> dict[str, tuple[Moments, Moments]]:
        """(train, held out) moments of every FFN's kept channels, and the outputs wanted of them."""
        plans = self.plan.layers[number].ffns
        found: dict[str, tuple[Moments, Moments]] = {}

        def use(part: slice, _: torch.Tensor, output: torch.Tensor, seen: Seen) -> None:
            aim = self.dense.store.get(0, part, self.model.device) if self.accumulate else output
            for unit, tokens, u, y in seen:
                kept = plans[unit].kept.to(u.device)
                if unit not in found:
                    first, second = (Moments.zeros(y.shape[-1], len(kept), y.device) for _ in range(2))
                    found[unit] = (first, second)
                wanted = y.view_as(output) + (aim - output) if additive else y
                bias = _bias_of(ffns, unit)
                wanted = wanted if bias is None else wanted - bias
                columns = down_of(ffns, unit)[:, kept]
                self._add(found[unit], part, u[..., kept], wanted, columns, aim, tokens)

        self._run(self.pruned, number, layer, ffns, use)
        return found

    def _mend_ffn(
        self, number: int, ffn: Ffn, moments: dict[str, tuple[Moments, Moments]], done: MendedLayer
    ) -> None:
        """Solve for the kept columns of every FFN of a site, and zero the removed ones."""
        for place, unit in enumerate(ffn.units):
            weight = ffn.down_weight(place)
            kept = self.plan.layers[number].ffns[unit].kept.to(weight.device)
            columns = weight[:, kept]
            if unit in moments:  # an expert no token reached is left as it is
                done.ffns[unit] = repair(*moments[unit], columns)
                columns = done.ffns[unit].weight.to(weight.dtype)
            weight.zero_()
            weight[:, kept] = columns
        done.parameters.append(ffn.site.down if ffn.stacked else f"{ffn.site.down}.weight")

    def _add(
        self,
        moments: tuple[Moments, Moments],
        part: slice,
        inputs: torch.Tensor,
        wanted: torch.Tensor,
        weight: torch.Tensor,
        stream: torch.Tensor,
        tokens: torch.Tensor | None = None,
    ) -> None:
        """Account for a micro-batch, training and held-out blocks apart."""
        weights = token_weights(stream).flatten()
        blocks = torch.arange(part.start, part.stop, device=weights.device)
        is_held = (blocks >= self.first_held).repeat_interleave(stream.shape[1])
        if tokens is not None:
            weights, is_held = weights[tokens], is_held[tokens]
        u, r = inputs.reshape(-1, inputs.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
        for mine, chosen in zip(moments, (~is_held, is_held), strict=True):
            if bool(chosen.any()):
                mine.add(u[chosen], r[chosen], weight, weights[chosen])


def layer_cutter(
    model: StreamedModel, plan: ResizePlan, ids: torch.Tensor, options: RunOptions
) -> Callable[[int, nn.Module], MendedLayer | None]:
    """What makes a resident layer compute what it will as written; to be called with each layer, in order.

    Removed channels are masked and, where the plan repairs, what stays is mended on calibration blocks `ids` [N, T].
    Returns what was mended, None where nothing was to be.
    """
    if plan.repair == "none":
        mask = mask_channels(plan, model.skeleton.ffns)

        def cut(number: int, layer: nn.Module) -> None:
            mask(number, layer)

        return cut
    step = micro_batch(ids.shape[1], options.device)
    return Mender(model, plan, ids, step, plan.repair == "lstsq-acc", options.memory).layer


def layer_tensors(skeleton: Skeleton) -> set[str]:
    """Names of the stored matrices of all layers: those a repair may change, which can't be written as they are read."""
    return {
        stored
        for assemblies in skeleton.inside
        for assembly in assemblies
        for stored in assembly.stored
        if len(skeleton.checkpoint.tensors[stored].shape) > 1
    }


def mended_tensors(
    skeleton: Skeleton,
    number: int,
    done: MendedLayer,
    late: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Take a layer's stored tensors out of `late`, with mended values where the layer has them, not cut yet."""
    prefix = f"{skeleton.layers_path}.{number}."
    mended = {prefix + name for name in done.parameters}
    found = {}
    for assembly in skeleton.inside[number]:
        for place, stored in enumerate(assembly.stored):
            tensor = late.pop(stored, None)
            if tensor is None:
                continue
            if assembly.targets[0] in mended:
                resident = skeleton.model.get_parameter(assembly.targets[0]).data
                part = resident[place] if "MergeModulelist" in assembly.steps else resident
                part = part.transpose(-1, -2) if "Transpose" in assembly.steps else part
                tensor = part.to(tensor.device, tensor.dtype).contiguous()
            found[stored] = tensor
    return found


def _bias_of(ffns: list[Ffn], unit: str) -> torch.Tensor | None:
    """The bias of an FFN's down projection, which is no part of what its channels must produce."""
    for ffn in ffns:
        if unit in ffn.units:
            if ffn.stacked:
                biases = getattr(ffn.module, "down_proj_bias", None)
                return None if biases is None else biases[ffn.units.index(unit)]
            bias = getattr(ffn.module, "bias", None)
            return bias if isinstance(bias, torch.Tensor) else None
    return None


def _adds(difference: torch.Tensor, contribution: torch.Tensor, stream: torch.Tensor) -> bool:
    """Whether a difference of residual streams is a module's output as it is, up to the stream's rounding."""
    weights = token_weights(stream)[..., None]
    error = (weights * (difference.float() - contribution.float()).square()).sum()
    return bool(error < ADDITIVE_ERROR * (weights * contribution.float().square()).sum())
