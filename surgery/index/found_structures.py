"""What an index says of super weights: detected in a pass of the prompts, then proved by removal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from surgery.budget.index_cost import PROOF_BLOCKS, PROOF_TOKENS, proof_cost
from surgery.engine.open_model import Model
from surgery.engine.resume import Journal
from surgery.engine.streamed_model import StreamedModel
from surgery.index.calibration import Calibration
from surgery.index.findings import Finding, sort_weights, with_sightings
from surgery.index.prove import prove
from surgery.index.spike_detector import SuperWeightDetector
from surgery.index.structures import Candidates
from surgery.index.super_weights import SuperWeight
from surgery.progress import Progress


@dataclass(frozen=True)
class FoundStructures:
    """Measured structures, the scalars among them, and the largest activations of the first prompt, by layer.

    `super_weights` are scalars of structures that are super, `echoes` all other spikes.
    """

    structures: list[Finding]
    super_weights: list[SuperWeight]
    echoes: list[SuperWeight]
    maxima: list[dict[str, float]]

    def as_json(self) -> dict[str, Any]:
        """Its fields, for the journal of a run."""
        return {
            "structures": [one.as_json() for one in self.structures],
            "super_weights": [one.as_json() for one in self.super_weights],
            "echoes": [one.as_json() for one in self.echoes],
            "maxima": self.maxima,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> FoundStructures:
        """Inverse of `as_json`."""
        return cls(
            [Finding.from_json(one) for one in fields["structures"]],
            [SuperWeight.from_json(one) for one in fields["super_weights"]],
            [SuperWeight.from_json(one) for one in fields["echoes"]],
            fields["maxima"],
        )


def find_structures(
    opened: Model,
    model: StreamedModel,
    calibration: Calibration,
    finished: Journal | None,
    progress: Progress[Any],
) -> FoundStructures:
    """Search the prompts for spikes and measure what they are worth.

    They are measured on the first PROOF_TOKENS tokens of the first PROOF_BLOCKS calibration blocks.
    `finished` is a journal that holds the result already. Raises MemoryBudgetError, before any pass.
    """
    if finished is not None:
        return FoundStructures.from_json(finished.load("structures")[0])
    ids = calibration.blocks.ids[:PROOF_BLOCKS, :PROOF_TOKENS]
    proof_cost(opened.meta_model, len(ids), ids.shape[1], opened.run)
    with model.other_weights():
        detector = SuperWeightDetector(model, calibration.prompts)
    count = len(model.layers)
    for number, layer in progress(model.stream_layers(range(count)), "spikes", count):
        detector.forward(number, layer)
    lasting, passing = detector.finish(model.checkpoint.config)
    candidates = Candidates.of([*lasting, *passing], detector.rows())
    findings = prove(opened, candidates, ids, progress)
    findings = with_sightings(findings, candidates.found)
    weights, echoes = sort_weights([*candidates.weights, *candidates.other_weights], findings)
    return FoundStructures(
        findings,
        sorted(weights, key=lambda weight: weight.place),
        sorted(echoes, key=lambda weight: weight.place),
        detector.maxima,
    )
