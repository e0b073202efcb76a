"""Finds super weights: single scalars of down_proj that create an activation spike the model depends on.

The method is that of The Super Weight in Large Language Models (arXiv 2411.07191, section 3.1): in the layer
where both the input and the output of down_proj spike, output channel j and input channel k identify the
weight W[j, k]. Thresholds here are relative to the layer's median, because absolute thresholds miss super
weights of some models and report false ones in others. A spike counts only if it persists in the residual
stream. Late layers spike too, to cancel the first spike; their weights are called *echoes*.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from surgery.engine.open_model import Model
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.index.masked_spikes import MaskedSearch
from surgery.index.spikes import (
    MAX_PER_LAYER,
    SPIKE_RATIO,
    Activations,
    RowSpike,
    creates_spike,
    ffn_activations,
    largest_spike,
)
from surgery.index.super_weights import SuperWeight, published_coordinates
from surgery.model.ffn import ffn_named

PROMPT = "Apple Inc. is a worldwide tech company."
PROMPTS = (
    PROMPT,
    "The cat sat on the mat and looked out of the window.",
    "In 1969, people walked on the Moon for the first time.",
    "def add(a, b):\n    return a + b",
    "Summer is hot. Winter is cold.",
)
MIN_PERSISTENCE = 0.5  # share of the layers above in which the spike keeps its size within a factor of two
MIN_DEPTH = 0.25  # the same as a share of all layers, because late layers have few layers above them
MIN_OF_LARGEST = 0.25  # output of a further weight in the same FFN, relative to the first and largest
MIN_SHARE = 0.3  # share of a spike made by a further weight in the same row (weights can share a spike)
MIN_PROMPTS = 0.5  # share of the prompts in which a weight must be found


class SuperWeightDetector:
    """Detects super weights during a forward pass over the layers, with several prompts (token ids [T]).

    Call `forward` with each resident layer, and `finish` after the last one. A super weight must be found in
    a share of at least MIN_PROMPTS of the prompts.
    """

    def __init__(self, model: StreamedModel, prompts: list[torch.Tensor]) -> None:
        self.each = [PromptDetector(model, ids, number) for number, ids in enumerate(prompts)]

    @property
    def maxima(self) -> list[dict[str, float]]:
        """Largest |input| and |output| of the down projections, per layer, of the first prompt."""
        return self.each[0].maxima

    def forward(self, number: int, layer: nn.Module) -> list[SuperWeight]:
        """Run all prompts through the resident layer and search it for super weights; returns candidates."""
        found: dict[tuple[int, str, int, int], SuperWeight] = {}
        for detector in self.each:
            for candidate in detector.forward(number, layer):
                found.setdefault(candidate.place, candidate)
        return list(found.values())

    def finish(self, config: dict[str, Any]) -> tuple[list[SuperWeight], list[SuperWeight]]:
        """(lasting, passing): candidates that persist in enough prompts, and all other candidates."""
        lasting: dict[Any, list[SuperWeight]] = {}
        passing: dict[Any, list[SuperWeight]] = {}
        for detector in self.each:
            weights, echoes = detector.finish()
            for kind, entries in ((lasting, weights), (passing, echoes)):
                for entry in entries:
                    kind.setdefault(entry.place, []).append(entry)
        tried = len(self.each)
        agreed = {place for place, found in lasting.items() if len(found) >= MIN_PROMPTS * tried}
        chosen: list[SuperWeight] = []
        others: list[SuperWeight] = []
        for place in sorted({*lasting, *passing}):
            found = lasting[place] if place in agreed else [*lasting.get(place, []), *passing.get(place, [])]
            clearest = max(found, key=lambda w: abs(w.output))
            (chosen if place in agreed else others).append(
                replace(clearest, prompts=len(found), prompts_tried=tried)
            )
        published = published_coordinates(config)
        return [_named(w, chosen, published) for w in chosen], [_named(w, chosen, published) for w in others]

    def rows(self) -> list[RowSpike]:
        """Rows whose spike no single weight explains, in enough of the prompts, sorted by place."""
        seen: dict[Any, list[RowSpike]] = {}
        for detector in self.each:
            for place, spike in {spike.place: spike for spike in reversed(detector.rows)}.items():
                seen.setdefault(place, []).append(spike)
        tried = len(self.each)
        return [
            replace(max(found, key=lambda one: abs(one.output)), prompts=len(found), prompts_tried=tried)
            for _, found in sorted(seen.items())
            if len(found) >= MIN_PROMPTS * tried
        ]


def _named(
    weight: SuperWeight, chosen: list[SuperWeight], published: dict[tuple[int, int, int], str]
) -> SuperWeight:
    """Set `published` and `catalogue` from published coordinates, `structure` from other super weights."""
    place = (weight.layer, weight.row, weight.column)
    near = [
        source
        for (layer, row, column), source in published.items()
        if (layer == weight.layer and (row == weight.row or column == weight.column))
        or (abs(layer - weight.layer) == 1 and (row, column) == place[1:])
    ]
    catalogue = "match" if place in published else "near" if near else "new"
    peers = [w for w in chosen if (w.layer, w.ffn) == (weight.layer, weight.ffn) and w.place != weight.place]
    shared = [f"column {weight.column}"] if any(w.column == weight.column for w in peers) else []
    shared += [f"row {weight.row}"] if any(w.row == weight.row for w in peers) else []
    source = published.get(place) or (near[0] if near else None)
    return replace(weight, published=source, catalogue=catalogue, structure=", ".join(shared))


class PromptDetector:
    """Detects super weights during a forward pass over the layers, with one prompt (token ids [T]).

    Call `forward` with each resident layer, and `finish` after the last one.
    """

    def __init__(self, model: StreamedModel, ids: torch.Tensor, prompt: int = 0) -> None:
        self.model = model
        self.prompt = prompt
        self.stream = TokenStream(model, ids[None], micro_batch=1)
        self.candidates: list[SuperWeight] = []
        self.masked: list[SuperWeight] = []
        self.rows: list[RowSpike] = []
        self.second = MaskedSearch(model)
        self.traces: list[list[float]] = []
        self.maxima: list[dict[str, float]] = []

    def forward(self, number: int, layer: nn.Module) -> list[SuperWeight]:
        """Run the prompt through the resident layer and search it for super weights; returns the candidates.

        The search repeats: as long as the largest output is a spike that a single product explains, the
        weight is recorded and set to zero. All weights are restored at the end.
        """
        before = self.stream.fork(1, number)
        activations = ffn_activations(self.model, number, layer, self.stream)
        self.maxima.append(
            {
                "input": max((float(x.abs().max()) for x, _, _ in activations.values()), default=0.0),
                "output": max((float(y.abs().max()) for _, y, _ in activations.values()), default=0.0),
            }
        )
        residual = self.stream.store.get(0, slice(0, 1), self.model.device)[0]
        for trace, known in zip(self.traces, self.candidates, strict=True):
            trace.append(abs(float(residual[known.token, known.row])))
        found = []
        for name in list(activations):
            found += self._search(number, layer, name, activations[name], before, residual)
        self.candidates += found
        self.traces += [[abs(candidate.residual)] for candidate in found]
        creators: list[SuperWeight | RowSpike] = [w for w in found if w.residual * w.output > 0]
        creators += self._row_spikes(number, activations, residual)
        for one in (*creators, *self.second.forward(number, layer, before, creators)):
            if isinstance(one, RowSpike):
                self.rows.append(replace(one, prompt=self.prompt))
            elif one.round > 1:
                self.masked.append(replace(one, prompt=self.prompt))
        return found

    def _row_spikes(
        self, number: int, activations: dict[str, Activations], residual: torch.Tensor
    ) -> list[RowSpike]:
        """Rows of the layer whose output spikes without a single weight that explains it."""
        found: list[RowSpike] = []
        for name, (x, y, positions) in activations.items():
            weight, left = ffn_named(self.model.ffns(number), name).down_weight(), y.clone()
            for _ in range(MAX_PER_LAYER):
                spike = largest_spike(number, name, (x, left, positions), weight, weight)
                if spike is None:
                    break
                if isinstance(spike, RowSpike) and creates_spike(spike, residual):
                    found.append(spike)
                left[:, spike.row] = 0
        return found

    def _search(
        self,
        number: int,
        layer: nn.Module,
        name: str,
        activations: Activations,
        before: TokenStream,
        residual: torch.Tensor,
    ) -> list[SuperWeight]:
        """Candidates in one FFN: zeroes the weight behind the largest spike until no spike is left."""
        weight = ffn_named(self.model.ffns(number), name).down_weight()
        original = weight.clone()
        found: list[SuperWeight] = []
        while len(found) < MAX_PER_LAYER:
            candidate = largest_spike(number, name, activations, weight, original)
            if not isinstance(candidate, SuperWeight):
                break
            if found and abs(candidate.output) < MIN_OF_LARGEST * abs(found[0].output):
                break
            if found and found[-1].row == candidate.row and found[-1].token == candidate.token:
                # The rest of a spike whose main weight is zeroed is not a separate spike.
                intact = next(w.output for w in found if w.row == candidate.row)
                if abs(candidate.input * candidate.value) < MIN_SHARE * abs(intact):
                    break
            peak = float(residual[candidate.token, candidate.row])
            if abs(peak) < SPIKE_RATIO * float(residual.abs().median()):
                break
            weight[candidate.row, candidate.column] = 0
            without = before.fork(1, number)
            activations = ffn_activations(self.model, number, layer, without)[name]
            left = without.store.get(0, slice(0, 1), self.model.device)[0][candidate.token, candidate.row]
            found.append(replace(candidate, residual=peak, residual_without=float(left)))
        weight.copy_(original)
        return found

    def finish(self) -> tuple[list[SuperWeight], list[SuperWeight]]:
        """(lasting, passing): candidates whose spike persists, and all others.

        A masked spike is among the others: it is seen only while those that mask it are out.
        """
        weights: list[SuperWeight] = []
        echoes: list[SuperWeight] = []
        for candidate, trace in zip(self.candidates, self.traces, strict=True):
            above = trace[1:]
            held = 0
            while held < len(above) and trace[0] / 2 <= above[held] <= trace[0] * 2:
                held += 1
            persistence = held / len(above) if above else 0.0
            lasting = persistence >= MIN_PERSISTENCE and held >= MIN_DEPTH * len(self.model.layers)
            entry = replace(candidate, persistence=persistence, prompt=self.prompt)
            # The output has the sign of the residual where it creates the spike, the opposite sign where it
            # cancels the spike.
            creates = candidate.residual * candidate.output > 0
            (weights if lasting and creates else echoes).append(entry)
        seen = {candidate.place for candidate in self.candidates}
        return weights, [*echoes, *(w for w in self.masked if w.place not in seen)]


def prompt_ids(tokenizer: Any, prompts: tuple[str, ...], calibration: torch.Tensor) -> list[torch.Tensor]:
    """Token ids [T] of each prompt, and of the start of the calibration blocks [N, T].

    Each prompt is tokenised without BOS and, where the tokenizer has one, with BOS. Prompts of fewer than two
    tokens are left out.
    """
    found = []
    starts = [[], [tokenizer.bos_token_id]] if tokenizer.bos_token_id is not None else [[]]
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        found += [torch.tensor([*start, *ids]) for start in starts if start or ids]
    found.append(calibration[0, : max(2, len(found[0]))].long())
    return [ids for ids in found if len(ids) > 1]


@torch.no_grad()
def find_super_weights(opened: Model, prompts: list[torch.Tensor]) -> list[SuperWeight]:
    """Super weights of a model, found in one forward pass of the prompts (token ids [T])."""
    model = StreamedModel(opened)
    with model.other_weights():
        detector = SuperWeightDetector(model, prompts)
    for number, layer in model.stream_layers(range(len(model.layers))):
        detector.forward(number, layer)
    return detector.finish(model.checkpoint.config)[0]
