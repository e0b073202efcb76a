"""Finding: one structure, what its removal was measured to cost, and what it is compared with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from surgery.index.paired_bootstrap import Interval
from surgery.index.spikes import RowSpike
from surgery.index.structures import Part, Structure
from surgery.index.super_weights import SuperWeight


@dataclass(frozen=True)
class Finding:
    """A structure and its measured effect, in nats per token that its removal adds to the loss.

    effect: with all its weights at zero; `mean` with their contribution at its mean over tokens, None where
      not measured.
    gain: what it costs more than the costliest measured part of it.
    perplexity, perplexity_without: on the same `tokens` predicted tokens of `blocks` blocks.
    controls: effects of matched controls, by what is matched.
    is_super: whether effect and gain are more than MIN_EFFECT with their intervals, and more than every
      control. Anything else is a spike.
    seen: where the detector saw it: prompt, position in it, round and criterion.
    """

    structure: Structure
    effect: Interval
    gain: Interval
    perplexity: float
    perplexity_without: float
    blocks: int
    tokens: int
    mean: Interval | None = None
    controls: dict[str, float] = field(default_factory=dict)
    is_super: bool = False
    seen: list[dict[str, Any]] = field(default_factory=list)

    @property
    def factor(self) -> float:
        """Perplexity without it over perplexity with it."""
        return self.perplexity_without / self.perplexity

    @property
    def ablation(self) -> dict[str, float]:
        """The entry `ablation` of a super weight."""
        return {
            "perplexity": self.perplexity,
            "perplexity_without": self.perplexity_without,
            "factor": self.factor,
            "tokens": self.tokens,
        }

    def as_json(self) -> dict[str, Any]:
        """Its entry of `structures` in index.json."""
        return {
            "name": self.structure.name,
            "kind": self.structure.kind,
            "super": self.is_super,
            "parts": self.structure.as_json(),
            "effect": self.effect.mean,
            "interval": self.effect.as_json(),
            "gain": self.gain.mean,
            "gain_interval": self.gain.as_json(),
            "mean_effect": None if self.mean is None else self.mean.mean,
            "mean_interval": None if self.mean is None else self.mean.as_json(),
            "controls": self.controls,
            "ablation": self.ablation,
            "blocks": self.blocks,
            "seen": self.seen,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Finding:
        """Inverse of `as_json`."""

        ablation, mean = fields["ablation"], fields["mean_effect"]
        return cls(
            structure=Structure(tuple(Part(**part) for part in fields["parts"])),
            effect=Interval.from_json(fields["effect"], fields["interval"]),
            gain=Interval.from_json(fields["gain"], fields["gain_interval"]),
            perplexity=ablation["perplexity"],
            perplexity_without=ablation["perplexity_without"],
            blocks=fields["blocks"],
            tokens=ablation["tokens"],
            mean=None if mean is None else Interval.from_json(mean, fields["mean_interval"]),
            controls=fields["controls"],
            is_super=fields["super"],
            seen=fields["seen"],
        )


def with_sightings(findings: list[Finding], spikes: Iterable[SuperWeight | RowSpike]) -> list[Finding]:
    """Findings with `seen`: the sightings of the candidates inside each."""
    sightings = [(_place(spike), _sighting(spike)) for spike in spikes]
    return [
        replace(
            found,
            seen=[seen for place, seen in sightings if any(p.covers(place) for p in found.structure.parts)],
        )
        for found in findings
    ]


def _place(spike: SuperWeight | RowSpike) -> Part:
    return Part(spike.layer, spike.ffn, spike.row, spike.column if isinstance(spike, SuperWeight) else None)


def _sighting(spike: SuperWeight | RowSpike) -> dict[str, Any]:
    """Where a candidate was seen, and by which criterion."""
    share = f"one product makes {spike.explained:.0%} of it"
    if isinstance(spike, RowSpike):
        share = f"no product makes more than {spike.explained:.0%} of it"
    criterion = f"output {spike.output:.4g}, {spike.ratio:.3g} times the median; {share}"
    return {
        "layer": spike.layer,
        "row": spike.row,
        "column": spike.column if isinstance(spike, SuperWeight) else None,
        "prompt": spike.prompt,
        "position": spike.token,
        "round": spike.round,
        "prompts": spike.prompts,
        "prompts_tried": spike.prompts_tried,
        "criterion": criterion,
    }


def sort_weights(
    weights: list[SuperWeight], findings: list[Finding]
) -> tuple[list[SuperWeight], list[SuperWeight]]:
    """(super weights, spikes), each with its own measured effect and the structure it is super by.

    A weight is super by itself, or as part of a column, a pair or a joint structure that is. A row that is
    super does not make its weights so, and neither does a pair or group with a super part: the spare of a
    weight that is kept is not missed.
    """
    own = {found.structure: found for found in findings}
    every = [found for found in findings if found.is_super]
    proved = [one for one in every if not any(one.structure.contains(part.structure) for part in every)]
    chosen: list[SuperWeight] = []
    others: list[SuperWeight] = []
    for weight in weights:
        place = _place(weight)
        alone = own.get(Structure((place,)))
        by = next(
            (
                found.structure
                for found in sorted(proved, key=lambda one: len(one.structure.parts))
                if any(p.column is not None and p.covers(place) for p in found.structure.parts)
            ),
            None,
        )
        measured = replace(weight, kind="spike" if by is None else by.kind)
        if by is not None:
            measured = replace(measured, parts=by.as_json())
        if alone is not None:
            measured = replace(
                measured,
                ablation=alone.ablation,
                effect=alone.effect.mean,
                interval=alone.effect.as_json(),
                mean_effect=None if alone.mean is None else alone.mean.mean,
                controls=alone.controls,
            )
        (others if by is None else chosen).append(measured)
    return chosen, others
