"""Measures what removing candidate structures costs, and calls super what the model does not do without.

The size of a spike does not say what it is worth, and parts can mask each other: removing one of two spares
changes nothing. So every candidate scalar, column and row is removed by itself, then every two candidates,
then groups that could act together; of very many candidates, the less clear ones only all together. A group
that costs more than any measured part of it is made smaller for as long as the cost stays. The cost is the
difference of the next-token loss in nats per token, with an interval over blocks (`paired_bootstrap`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from surgery.budget.index_cost import PROOF_CONDITIONS, proof_cost
from surgery.engine.branches import run_branches
from surgery.engine.layer_edits import Edits
from surgery.engine.loss import next_token_loss
from surgery.engine.open_model import Model
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.index.controls import control_edits
from surgery.index.findings import Finding
from surgery.index.paired_bootstrap import Interval, paired_interval
from surgery.index.structures import Candidates, Structure, pairs
from surgery.model.families import EXPERT
from surgery.progress import Progress, no_progress

MIN_EFFECT = math.log(1.5)  # nats per token: perplexity half as large again
KEPT_SHARE = 0.8  # of a group's effect, which a smaller group must keep to replace it


class Measurements:
    """Loss of the first blocks of a model without each of many structures; each is measured once.

    `ids` [N, T] are the blocks.
    """

    def __init__(self, opened: Model, ids: torch.Tensor, progress: Progress[Any] = no_progress) -> None:
        self.opened, self.ids, self.progress = opened, ids, progress
        self.dense: torch.Tensor | None = None  # [N] nats per token
        self.effects: dict[Any, torch.Tensor] = {}  # [N] nats per token more than dense
        self.proved: list[Structure] = []  # what matters, groups made as small as they get

    def measure(self, wanted: dict[Any, Edits]) -> None:
        """Measure what is not known yet; `wanted` maps a key to its edits."""
        new = [(key, edits) for key, edits in wanted.items() if key not in self.effects]
        for start in range(0, len(new), PROOF_CONDITIONS):
            self._run(new[start : start + PROOF_CONDITIONS])

    def _run(self, conditions: list[tuple[Any, Edits]]) -> None:
        """One pass over the layers. Raises MemoryBudgetError."""
        blocks, size = self.ids.shape
        cost = proof_cost(self.opened.meta_model, blocks, size, self.opened.run, len(conditions))
        model, place = StreamedModel(self.opened), cost.hidden_on
        dense = TokenStream(model, self.ids.long(), micro_batch=cost.blocks_together(size), place=place)
        run = run_branches(model, dense, [e for _, e in conditions], place, self.progress, "structures")
        losses: dict[TokenStream, torch.Tensor] = {}
        with model.other_weights():
            for stream in (dense, *run.streams()):
                if stream not in losses:
                    losses[stream] = next_token_loss(stream) / (size - 1)
        self.dense = losses[dense]
        for (key, _), stream in zip(conditions, run.streams(), strict=True):
            self.effects[key] = losses[stream] - losses[dense]

    def interval(self, key: Any) -> Interval:
        """The measured effect of a structure."""
        return paired_interval(self.effects[key])

    def gain(self, structure: Structure) -> Interval:
        """What a structure costs more than the costliest part of it (more than nothing, of none).

        Its parts are the singles and pairs inside it. A group with one part taken out is not counted: where
        many parts share a work, each of them adds little. A pair or group proved of the same spikes counts
        as a part of another: the columns behind two spikes, say, where that one is their two rows.
        """
        parts = [
            key
            for key in self.effects
            if isinstance(key, Structure)
            and (
                (structure.contains(key) and len(key.parts) <= 2)
                or (
                    min(len(key.parts), len(structure.parts)) > 1
                    and key in self.proved
                    and structure.repeats(key)
                )
            )
        ]
        best = max(parts, key=lambda part: float(self.effects[part].mean()), default=None)
        own = self.effects[structure]
        return paired_interval(own if best is None else own - self.effects[best].clamp(min=0))

    def matters(self, structure: Structure) -> bool:
        """Whether its effect, and its gain over its parts, are more than MIN_EFFECT with their intervals."""
        return min(self.interval(structure).low, self.gain(structure).low) > MIN_EFFECT


@torch.no_grad()
def prove(
    opened: Model, candidates: Candidates, ids: torch.Tensor, progress: Progress[Any] = no_progress
) -> list[Finding]:
    """Measure all candidates of a model on blocks `ids` [N, T]; findings by measured effect, largest first.

    Raises MemoryBudgetError.
    """
    singles = candidates.singles()
    if not singles:
        return []
    known = Measurements(opened, ids, progress)
    known.measure({one: one.edits() for one in singles})
    units = _units(candidates, known)
    together = [*pairs(units), *candidates.groups(), *candidates.rest()]
    known.measure({one: one.edits() for one in together})
    known.proved += [one for one in singles if known.matters(one)]
    _shrink(together, known)
    findings = [_finding(one, known) for one in dict.fromkeys([*singles, *candidates.rest(), *known.proved])]
    return _compared(findings, known)


def _units(candidates: Candidates, known: Measurements) -> list[Structure]:
    """One structure for each candidate column: the column, or a scalar in it that costs more by itself."""
    found = []
    for column in candidates.columns():
        inside = [one for one in candidates.singles() if column.contains(one)]
        costly = [one for one in inside if known.gain(one).low > MIN_EFFECT]
        found.append(max([column, *costly], key=lambda one: float(known.effects[one].mean())))
    return found


def _shrink(groups: list[Structure], known: Measurements) -> None:
    """Put into `known.proved` the smallest structures inside groups that matter, small groups first."""
    for group in sorted(groups, key=lambda one: len(one.parts)):
        if known.matters(group):
            small = _smallest(group, known)
            if known.matters(small) and small not in known.proved:
                known.proved.append(small)


def _smallest(group: Structure, known: Measurements) -> Structure:
    """Take parts out of a group, the least needed first, for as long as KEPT_SHARE of its effect stays."""
    needed = KEPT_SHARE * float(known.effects[group].mean())
    while len(group.parts) > 2:
        without = [Structure(group.parts[:i] + group.parts[i + 1 :]) for i in range(len(group.parts))]
        known.measure({one: one.edits() for one in without})
        order = sorted(range(len(without)), key=lambda i: -float(known.effects[without[i]].mean()))
        nested = [
            Structure(tuple(p for i, p in enumerate(group.parts) if i not in order[: taken + 1]))
            for taken in range(len(order) - 1)
        ]
        known.measure({one: one.edits() for one in nested})
        kept = [
            one
            for one in nested
            if float(known.effects[one].mean()) >= needed and known.interval(one).low > MIN_EFFECT
        ]
        if not kept:
            return group
        group = min(kept, key=lambda one: len(one.parts))
    return group


def _finding(one: Structure, known: Measurements) -> Finding:
    """A measured structure, not yet compared with its controls and its mean."""
    assert known.dense is not None
    dense, without = known.dense.mean(), (known.dense + known.effects[one]).mean()
    blocks, size = known.ids.shape
    return Finding(
        structure=one,
        effect=known.interval(one),
        gain=known.gain(one),
        perplexity=math.exp(float(dense)),
        perplexity_without=math.exp(min(700.0, float(without))),
        blocks=blocks,
        tokens=blocks * (size - 1),
    )


def _compared(findings: list[Finding], known: Measurements) -> list[Finding]:
    """Measure the mean and the controls of every finding whose interval excludes no effect; rank all."""
    wanted: dict[Any, Edits] = {}
    for found in findings:
        if found.effect.low > 0:
            if not any(part.ffn.startswith(EXPERT) for part in found.structure.parts):
                wanted[found.structure, "mean"] = found.structure.edits(mean=True)
            wanted |= {
                (found.structure, like): edits for like, edits in control_edits(found.structure).items()
            }
    known.measure(wanted)
    compared = []
    for found in findings:
        own = {
            key[1]: known.effects[key]
            for key in wanted
            if isinstance(key, tuple) and key[0] == found.structure
        }
        mean = paired_interval(own.pop("mean")) if "mean" in own else None
        controls = {like: float(effect.mean()) for like, effect in own.items()}
        proved = found.effect.low > MIN_EFFECT and found.effect.low > max(controls.values(), default=0.0)
        is_super = proved and found.gain.low > MIN_EFFECT
        compared.append(replace(found, mean=mean, controls=controls, is_super=is_super))
    return sorted(compared, key=lambda one: -one.effect.mean)
