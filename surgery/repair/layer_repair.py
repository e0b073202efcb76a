"""LayerRepair: refits what a cut leaves of each layer, from a dense and a pruned stream of calibration
tokens.

The dense stream runs each layer as it was. The pruned stream runs it once with all its channels, to collect
moments; the output of the kept and refitted channels is then added without another run. The attention's
output projection is refitted before the FFN, by the same least squares: it is the first place where the
damage of earlier layers can be made up for. Where the matrices of all channels exceed the memory budget,
channels are solved for in column blocks: one pass and one smaller matrix for each block, every block making
up for what the blocks before it left (block Gauss-Seidel).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from surgery.budget.prune_cost import PruneCost
from surgery.budget.repair_cost import EXPERT_PASSES, column_blocks, pass_schedule
from surgery.cut.groups import Cut
from surgery.cut.slice_edits import mask_cut, mask_members, sublayer_groups
from surgery.engine import distributed
from surgery.engine.device import wide_dtype
from surgery.engine.final_norm import find_final_norm
from surgery.engine.hooks import FfnCall
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream, check_finite
from surgery.model.ffn import Ffn
from surgery.plan.kind_plan import ATTENTION, KV_HEADS, WHOLE_FFN
from surgery.repair.attention import repair_attention
from surgery.repair.dense_reference import DenseReference
from surgery.repair.least_squares import Moments, Refit, SplitMoments, refit, summed
from surgery.repair.methods import RepairMethod
from surgery.repair.mixture import run_routed, shares
from surgery.repair.norm_scale import PROBED, ScaledNorm, fit_norm_scale
from surgery.repair.stored_weights import LayerRepairResult, WeightDelta

Weights = tuple[torch.Tensor, torch.Tensor | None]  # of a down projection: W [D, F] and its bias [D]


class LayerRepair:
    """Repairs the layers of one cut beside a dense reference; call `layer` for each layer the reference has
    run.

    With a method that targets the residual stream, inputs are those of the pruned model and targets what
    brings its residual stream to the dense one's; otherwise each layer is repaired by itself, on the dense
    model's inputs. `budget` is in bytes, for matrices; None for no limit.
    """

    def __init__(
        self, dense: DenseReference, cut: Cut, method: RepairMethod, budget: int | None = None
    ) -> None:
        self.model = dense.model
        self.dense = dense
        self.method = method
        self.budget = distributed.first_value(budget) if dense.shared else budget
        self.kept = cut.kept
        self.mask, self.reroute = mask_members(cut.groups, cut.kept), cut.reroute
        others = sublayer_groups(cut)
        self.mask_others = mask_members(others, cut.kept)
        self.head_columns = {
            group.layer: group.consumers[0].indices(cut.kept[group.key], group.size)
            for group in others
            if group.name == KV_HEADS
        }
        self.gone = {group for group, kept in cut.kept.items() if not len(kept)}
        blocks = len(dense.stream.ids)
        follows = method.follows_pruned
        self.pruned = dense.stream.fork(blocks, 0, place=dense.place) if follows else dense.stream
        self.keeps_deltas = self.model.meta_model.casts_stored_weights

    @property
    def streams(self) -> list[TokenStream]:
        """The hidden states that an interrupted repair resumes from."""
        return [self.dense.stream, *([self.pruned] if self.method.follows_pruned else [])]

    def final_norm(self) -> ScaledNorm | None:
        """The final norm scaled, after the last layer and within `other_weights`.

        None where the method does not scale it, the model has no norm that can be scaled, or that gains
        nothing.
        """
        if not (self.method.follows_pruned and self.method.scales_final_norm):
            return None
        norm = find_final_norm(self.model, self.pruned.last_hidden(slice(0, 1))[0, :PROBED])
        return None if norm is None else fit_norm_scale(norm, self.dense, self.pruned)

    @torch.no_grad()
    def layer(self, number: int, layer: nn.Module) -> LayerRepairResult:
        """Repair the resident layer in place, its removed channels set to zero, and move the pruned stream
        through it.
        """
        result = LayerRepairResult(keeps_deltas=self.keeps_deltas)
        additive = self.before_ffn(number, layer, result)
        if (number, WHOLE_FFN) in self.gone:
            if self.method.follows_pruned:
                self.pruned.forward(number, layer)
            return result
        self._repair_ffns(number, layer, additive, result)
        if additive:
            self.add_ffn_output(number)
        elif self.method.follows_pruned:
            if self.dense.mixture:
                self._repair_experts(number, layer, result)
            self.pruned.forward(number, layer)
        return result

    def before_ffn(self, number: int, layer: nn.Module, result: LayerRepairResult) -> bool:
        """Mask what goes of the resident layer besides FFN channels, and repair its attention.

        Returns whether the layer's FFN is to bring the pruned stream to the dense one (`DenseReference`).
        """
        if self.reroute is not None:
            self.reroute(number, layer)
        additive = self.method.follows_pruned and self.dense.additive
        self.mask_others(number, layer)
        fits = self.method.fits_attention and (number, ATTENTION) not in self.gone
        if additive and fits and self.dense.attention is not None:
            repair_attention(
                self.method,
                self.dense,
                self.pruned,
                number,
                layer,
                self.budget,
                result,
                self.head_columns.get(number),
                last=(number, WHOLE_FFN) in self.gone,
            )
        return additive

    def add_ffn_output(self, number: int) -> None:
        """Move the pruned stream through the FFN: the output of its kept channels is added to the stream
        before it.
        """
        (ffn,) = self.model.ffns(number)
        kept = self.kept[number, ffn.name].to(self.model.device)
        weight, bias = ffn.down_weight()[:, kept], ffn.down_bias()
        finite = torch.ones((), dtype=torch.bool, device=self.model.device)
        channels = self.dense.channels(len(kept))
        for part in self.pruned.slices:
            u = channels.get(0, part, self.model.device, len(kept))
            output = self.pruned.store.get(0, part, self.model.device) + functional.linear(u, weight, bias)
            finite &= output.isfinite().all()
            self.pruned.store.put(0, part, output)
        check_finite(finite, number)

    def _repair_ffns(self, number: int, layer: nn.Module, additive: bool, result: LayerRepairResult) -> None:
        """Refit the kept columns of every FFN, a column block in each pass, and zero the removed ones.

        Where an FFN is to put out what it did, one that keeps all its channels stays as it is.
        """
        ffns = {
            ffn.name: ffn
            for ffn in self.model.ffns(number)
            if additive or len(self.kept[number, ffn.name]) < ffn.width
        }
        passes = self._schedule(number, ffns)
        originals: dict[str, Weights] = {}
        if len(passes) > 1 and not additive:
            originals = {name: _weights(ffn) for name, ffn in ffns.items()}
        for turn, columns in enumerate(passes):
            last = turn == len(passes) - 1
            moments = self.ffn_moments(number, layer, additive, columns, originals if turn else {}, last)
            for name, found in self._refit_all(number, ffns, moments, columns, result).items():
                result.ffns.setdefault(name, []).append(found)
        self.mask(number, layer)

    def _schedule(self, number: int, ffns: dict[str, Ffn]) -> list[dict[str, slice]]:
        """Which of the kept columns of which FFN are solved for in which pass over the layer."""
        outputs = max((len(ffn.down_weight()) for ffn in ffns.values()), default=0)
        blocks = {name: column_blocks(len(self.kept[number, name]), outputs, self.budget) for name in ffns}
        return pass_schedule(blocks, outputs, self.budget)

    def _repair_experts(self, number: int, layer: nn.Module, result: LayerRepairResult) -> None:
        """Refit the kept columns of all routed experts together, towards the dense stream (`mixture`)."""
        ffns = {ffn.name: ffn for ffn in self.model.ffns(number) if ffn.stacked}
        schedule = self._schedule(number, ffns)
        changed = set[str]()
        for _ in range(EXPERT_PASSES):
            helped = set[str]()
            for turn, columns in enumerate(schedule):
                moments, lacking = self._expert_moments(number, layer, ffns, columns)
                if turn == 0:
                    result.lacking.append(lacking)
                done = self._refit_all(number, ffns, moments, columns, result)
                helped |= {name for name, found in done.items() if found.ridge is not None}
            changed |= helped
            if not helped:
                break  # another pass would find the same
        result.experts_changed = len(changed)

    def _refit_all(
        self,
        number: int,
        ffns: dict[str, Ffn],
        moments: dict[str, SplitMoments],
        columns: dict[str, slice],
        result: LayerRepairResult,
    ) -> dict[str, Refit]:
        """Change every FFN by its moments; returns how well that does on held-out blocks."""
        done = {}
        for name, collected in moments.items():
            ffn = ffns[name]
            found = refit(collected, partial(self._solve, ffn.bias_name is not None))
            done[name] = found.without_change()
            if found.change is not None:
                kept = self.kept[number, name][columns[name]].to(found.change.device)
                apply_change(ffn, kept, found.change, result)
        return done

    def _solve(self, has_bias: bool, moments: Moments, ridge: float) -> torch.Tensor:
        return self.method.solved(moments, ridge, has_bias)

    def ffn_moments(
        self,
        number: int,
        layer: nn.Module,
        additive: bool,
        columns: dict[str, slice],
        originals: dict[str, Weights],
        last: bool,
    ) -> dict[str, SplitMoments]:
        """Moments of the kept channels in `columns` of every FFN, and of the outputs wanted of them.

        An FFN is to put out what it did before it was changed (`originals`, once it has been), or in an
        additive layer what leads to the dense stream. An expert that no token reaches has no moments and
        stays as it is. In an additive layer `last` leaves the pruned stream before the FFN and stores the
        channels, for `add_ffn_output`.
        """
        ffns = {ffn.name: ffn for ffn in self.model.ffns(number)}
        found: dict[str, SplitMoments] = {}

        def use(part: slice, output: torch.Tensor, calls: list[FfnCall]) -> None:
            aim = self.dense.leaving.get(0, part, self.model.device)
            weights = self.method.weights(aim)
            for call in calls:
                name = call.ffn
                if name not in columns:
                    continue
                ffn, u = ffns[name], call.u
                kept = self.kept[number, name].to(u.device)
                bias = ffn.down_bias()
                if name not in found:
                    found[name] = self._no_moments(number, ffn, columns[name])
                wanted = call.y
                if additive:
                    wanted = wanted.view_as(output) + (aim - output)
                elif name in originals:
                    wanted = functional.linear(u, *originals[name])
                wanted = wanted if bias is None else wanted - bias
                present = ffn.down_weight()[:, kept]
                found[name].add(part, u[..., kept], wanted, present, weights, call.tokens, columns[name])
            if additive and last:  # what moves the pruned stream on without running the layer again
                (call,) = calls
                kept = self.kept[number, call.ffn].to(call.u.device)
                flow = call.u[..., kept].view(
                    *output.shape[:2], -1
                )  # some families flatten blocks before the FFN
                self.dense.channels(len(kept)).put(0, part, flow)
                self.pruned.store.put(0, part, output - call.y.view_as(output))

        self.pruned.run_observed(number, layer, use)
        return self._of_all(number, found, ffns, columns) if self.dense.shared else found

    def _expert_moments(
        self, number: int, layer: nn.Module, ffns: dict[str, Ffn], columns: dict[str, slice]
    ) -> tuple[dict[str, SplitMoments], float]:
        """Moments of the kept channels in `columns` of routed experts, and of their shares of what is missing
        in the pruned stream after the layer; and how much that is, as `LayerRepairResult.lacking`.
        """
        found: dict[str, SplitMoments] = {}
        pruned, device = self.pruned, self.model.device
        lacking = torch.zeros((), dtype=wide_dtype(device), device=device)
        for part, calls in zip(pruned.slices, pruned.calls, strict=True):
            entering = pruned.store.get(0, part, device)
            run = partial(self.model.run_layer, layer, entering, calls[number])
            output, routed = run_routed(list(ffns.values()), run)
            aim = self.dense.leaving.get(0, part, device)
            weights = self.method.weights(aim)
            missing = (aim - output).flatten(0, -2)
            held = torch.arange(part.start, part.stop, device=device) >= self.dense.first_held
            left = missing.float().square().sum(-1).view_as(weights) * weights
            lacking += left[held].sum()
            for one, share, power in shares(routed, missing):
                call = one.call
                if call.ffn not in columns:
                    continue
                own = ffns[call.ffn]
                if call.ffn not in found:
                    found[call.ffn] = self._no_moments(number, own, columns[call.ffn])
                u = call.u[:, self.kept[number, call.ffn].to(device)]
                scaled = weights.flatten().clone()
                scaled[one.tokens] *= power
                nothing = u.new_zeros(share.shape[1], u.shape[1])  # e is the share itself
                at = columns[call.ffn]
                found[call.ffn].add(part, u, share, nothing, scaled.view_as(weights), one.tokens, at)
        if self.dense.shared:
            distributed.all_reduce_sum(lacking)
            found = self._of_all(number, found, ffns, columns)
        return found, float(lacking) / self.dense.held_out_tokens

    def _no_moments(self, number: int, ffn: Ffn, columns: slice) -> SplitMoments:
        constant = self.method.constant or ffn.down_bias() is not None
        size = len(self.kept[number, ffn.name][columns])
        outputs, device = len(ffn.down_weight()), self.model.device
        return SplitMoments.zeros(outputs, size, device, self.dense.first_held, constant)

    def _of_all(
        self,
        number: int,
        found: dict[str, SplitMoments],
        ffns: dict[str, Ffn],
        columns: dict[str, slice],
    ) -> dict[str, SplitMoments]:
        """The moments of all processes; those of an expert that no token of any reaches are left out."""
        every = {}
        for name, part in columns.items():
            own = found.pop(name, None) or self._no_moments(number, ffns[name], part)
            moments = summed(own)
            if float(moments.train.power + moments.held_out.power) > 0:
                every[name] = moments
        return every


def _weights(ffn: Ffn) -> Weights:
    """Copies of a down projection's weight and bias."""
    bias = ffn.down_bias()
    return ffn.down_weight().clone(), None if bias is None else bias.clone()


def apply_change(ffn: Ffn, kept: torch.Tensor, change: torch.Tensor, result: LayerRepairResult) -> None:
    """Add a change [D, K] of the `kept` columns, or [D, K + 1] with a change of the bias, in double
    precision.
    """
    weight, bias = ffn.down_weight(), ffn.down_bias()
    columns = change[:, : len(kept)]
    result.note(ffn.down_name, WeightDelta(columns, kept, ffn.transposed, ffn.expert))
    if bias is not None and ffn.bias_name is not None:
        result.note(ffn.bias_name, WeightDelta(change[:, -1], expert=ffn.expert))
        bias.copy_((bias.to(change) + change[:, -1]).to(bias.dtype))
    weight[:, kept] = (weight[:, kept].to(change) + columns).to(weight.dtype)


class LayerPruner:
    """Makes a resident layer compute what it will as written; call it with each layer, in order.

    Removed channels are masked and, where the method repairs, what stays is refitted on calibration blocks
    `ids` [N, T], which all processes share out. A layer that goes as a whole is only run by the dense stream.
    `streams` are this process's hidden states, which an interrupted pass resumes from.
    """

    def __init__(
        self, model: StreamedModel, cut: Cut, method: RepairMethod, ids: torch.Tensor, cost: PruneCost
    ) -> None:
        self.mask = mask_cut(cut)
        self.skipped = cut.skipped
        self.repair: LayerRepair | None = None
        if method.changes_weights:
            dense = dense_reference(model, ids, cost, shared=True)
            self.repair = LayerRepair(dense, cut, method, cost.matrix_bytes)

    @property
    def streams(self) -> list[TokenStream]:
        """Hidden states between layers; none where nothing is repaired."""
        return [] if self.repair is None else self.repair.streams

    def final_norm(self) -> ScaledNorm | None:
        """As of LayerRepair; None where nothing is repaired."""
        return None if self.repair is None else self.repair.final_norm()

    def __call__(self, number: int, layer: nn.Module) -> LayerRepairResult | None:
        """Prune a layer; returns what was repaired, None where nothing is to be."""
        if self.repair is None:
            self.mask(number, layer)
            return None
        self.repair.dense.run(number, layer)
        skipped = number in self.skipped
        result = LayerRepairResult() if skipped else self.repair.layer(number, layer)
        self.repair.dense.step()
        return result


def dense_reference(
    model: StreamedModel, ids: torch.Tensor, cost: PruneCost, *, shared: bool = False
) -> DenseReference:
    """Calibration blocks `ids` [N, T] at the input of the first layer; `shared` as for DenseReference."""
    return DenseReference(model, ids, cost.micro_batch, cost.hidden_on, shared=shared)
