"""Super weights: single scalars of down_proj that create a spike the rest of the network lives on.

Found as in The Super Weight in Large Language Models (arXiv 2411.07191, section 3.1): at the layer where both the
input and the output of down_proj spike, output channel j and input channel k name the weight W[j, k]. Thresholds
here are relative to the layer's own median, since absolute ones miss some models and invent weights in others, and a
spike counts only when it stays in the residual stream (late layers spike too, to take it away: *echoes*).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.ffn import Ffn, observed
from surgery.stream import StreamedModel
from surgery.tokens import TokenStream

if TYPE_CHECKING:
    from surgery.checkpoint import Checkpoint
    from surgery.indexing import RunOptions

Activations = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x [T, F], y [T, D], positions [T]
PROMPT = "Apple Inc. is a worldwide tech company."
PROMPTS = (
    PROMPT,
    "The cat sat on the mat and looked out of the window.",
    "In 1969, people walked on the Moon for the first time.",
    "def add(a, b):\n    return a + b",
    "Summer is hot. Winter is cold.",
)
SPIKE_RATIO = 100.0  # |output| over the median |output| of the layer
MIN_EXPLAINED = 0.5  # share of the output spike that the one product accounts for
MIN_PERSISTENCE = (
    0.5  # share of the layers above through which the spike keeps its size, within a factor of two
)
MIN_DEPTH = 0.25  # share of all layers in which it must do so: late layers have few above them
MIN_OF_LARGEST = 0.25  # output of a further weight in the same layer, over the layer's first and largest
MIN_SHARE = 0.3  # of a spike, by a further weight in the same row: several may make one together
MIN_PROMPTS = 0.5  # share of the prompts in which a weight must be found
MAX_PER_LAYER = 6  # the most any published model has


@dataclass(frozen=True)
class SuperWeight:
    """One scalar W[row, column] of a layer's down_proj.

    `value` the weight; `input`, `output` the activations at the spike's token; `explained` = input * value / output;
    `ratio` = |output| over the layer's median |output|; `residual` the hidden state at (token, row) after the layer;
    `persistence` the share of the layers above it through which that hidden state keeps its size within a factor of two;
    `rank` the place of |value| in its matrix (1 = largest); `published` the catalogue entry it agrees with;
    `residual_without` the same once this weight (and those found before it in the layer) is zeroed; `ffn` the FFN of the
    layer it belongs to ("dense", "shared", "expert.3"); `ablation` perplexity with and without the weight on the same
    blocks; `prompts` in how many of `prompts_tried` it was found; `catalogue` match, near or new beside what is published
    of this model; `structure` the column or row it shares with another one.
    """

    layer: int
    row: int
    column: int
    value: float
    input: float
    output: float
    explained: float
    ratio: float
    rank: int
    token: int
    ffn: str = "dense"
    residual: float = 0.0
    persistence: float = 0.0
    published: str | None = None
    ablation: dict[str, float] = field(default_factory=dict)
    residual_without: float = 0.0
    prompts: int = 1
    prompts_tried: int = 1
    catalogue: str = "new"
    structure: str = ""

    @property
    def place(self) -> tuple[int, str, int, int]:
        """(layer, FFN, row, column)."""
        return self.layer, self.ffn, self.row, self.column

    def as_json(self) -> dict[str, Any]:
        """The entry of index.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> SuperWeight:
        """Inverse of `as_json`; unknown keys are ignored."""
        return cls(**{k: v for k, v in fields.items() if k in cls.__dataclass_fields__})


class SuperWeightDetector:
    """Rides several prompts along a forward walk: `forward` with each resident layer, `finish` after the last.

    `prompts` are token ids [T]. A spike that one prompt makes is no proof: most prompts must agree.
    """

    def __init__(self, model: StreamedModel, prompts: list[torch.Tensor]) -> None:
        self.each = [PromptDetector(model, ids) for ids in prompts]

    @property
    def maxima(self) -> list[dict[str, float]]:
        """Largest |input| and |output| of the down projections, per layer, of the first prompt."""
        return self.each[0].maxima

    def forward(self, number: int, layer: nn.Module) -> list[SuperWeight]:
        """Look for super weights in the resident layer and move all prompts through it; returns what is new."""
        found: dict[tuple[int, str, int, int], SuperWeight] = {}
        for detector in self.each:
            for candidate in detector.forward(number, layer):
                found.setdefault(candidate.place, candidate)
        return list(found.values())

    def finish(self, config: dict[str, Any]) -> tuple[list[SuperWeight], list[SuperWeight]]:
        """(super weights, echoes): what persists in most prompts, and all else that was found."""
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
            mine = lasting[place] if place in agreed else [*lasting.get(place, []), *passing.get(place, [])]
            clearest = max(mine, key=lambda w: abs(w.output))
            (chosen if place in agreed else others).append(
                replace(clearest, prompts=len(mine), prompts_tried=tried)
            )
        published = published_coordinates(config)
        return [_named(w, chosen, published) for w in chosen], [_named(w, chosen, published) for w in others]


def _named(
    weight: SuperWeight, chosen: list[SuperWeight], published: dict[tuple[int, int, int], str]
) -> SuperWeight:
    """With what the catalogue and the other super weights of its layer say about it."""
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
    """Rides one prompt along a forward walk: `forward` before each layer runs, `finish` after the last.

    `ids` [T] are the prompt's tokens.
    """

    def __init__(self, model: StreamedModel, ids: torch.Tensor) -> None:
        self.model = model
        self.stream = TokenStream(model, ids[None], micro_batch=1)
        self.candidates: list[SuperWeight] = []
        self.traces: list[list[float]] = []
        self.maxima: list[dict[str, float]] = []

    def forward(self, number: int, layer: nn.Module) -> list[SuperWeight]:
        """Look for super weights in the resident layer, then move the prompt through it; returns what was found.

        Removal is iterated while the layer is resident: as long as the largest output is a spike that one product
        explains, that weight is noted and set to zero; all are put back at the end.
        """
        before = self.stream.fork(1, number)
        activations = self._activations(number, layer, self.stream)
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
        for unit in list(activations):
            found += self._search(number, layer, unit, activations[unit], before, residual)
        self.candidates += found
        self.traces += [[abs(candidate.residual)] for candidate in found]
        return found

    def _search(
        self,
        number: int,
        layer: nn.Module,
        unit: str,
        activations: Activations,
        before: TokenStream,
        residual: torch.Tensor,
    ) -> list[SuperWeight]:
        """Super weights of one FFN: remove the weight behind the largest spike for as long as there is one."""
        weight = down_of(self.model.ffns(number), unit)
        original = weight.clone()
        found: list[SuperWeight] = []
        while len(found) < MAX_PER_LAYER:
            candidate = _spike(number, unit, activations, weight, original)
            if candidate is None:
                break
            if found and abs(candidate.output) < MIN_OF_LARGEST * abs(found[0].output):
                break
            if found and found[-1].row == candidate.row and found[-1].token == candidate.token:
                # What is left of a spike after its main weight went was never a spike of its own.
                intact = next(w.output for w in found if w.row == candidate.row)
                if abs(candidate.input * candidate.value) < MIN_SHARE * abs(intact):
                    break
            peak = float(residual[candidate.token, candidate.row])
            if abs(peak) < SPIKE_RATIO * float(residual.abs().median()):
                break
            weight[candidate.row, candidate.column] = 0
            without = before.fork(1, number)
            activations = self._activations(number, layer, without)[unit]
            left = without.store.get(0, slice(0, 1), self.model.device)[0][candidate.token, candidate.row]
            found.append(replace(candidate, residual=peak, residual_without=float(left)))
        weight.copy_(original)
        return found

    def _activations(self, number: int, layer: nn.Module, stream: TokenStream) -> dict[str, Activations]:
        """Run the prompt through the layer; per FFN the input [T, F] and output [T, D] of its down projection."""
        seen: dict[str, Activations] = {}

        def keep(unit: str, tokens: torch.Tensor | None, u: torch.Tensor, y: torch.Tensor) -> None:
            places = torch.arange(len(self.stream.ids[0])) if tokens is None else tokens
            u, y = u.reshape(-1, u.shape[-1]).float(), y.reshape(-1, y.shape[-1]).float()
            seen[unit] = (u, y, places)

        with observed(self.model.ffns(number), keep):
            stream.forward(number, layer)
        return seen

    def finish(self) -> tuple[list[SuperWeight], list[SuperWeight]]:
        """(super weights, echoes): candidates whose spike persists, and those whose does not."""
        weights: list[SuperWeight] = []
        echoes: list[SuperWeight] = []
        for candidate, trace in zip(self.candidates, self.traces, strict=True):
            above = trace[1:]
            held = 0
            while held < len(above) and trace[0] / 2 <= above[held] <= trace[0] * 2:
                held += 1
            persistence = held / len(above) if above else 0.0
            lasting = persistence >= MIN_PERSISTENCE and held >= MIN_DEPTH * len(self.model.layers)
            entry = replace(candidate, persistence=persistence)
            # A layer that made the spike pushes the residual the way it points; one that undoes it pushes against.
            made = candidate.residual * candidate.output > 0
            (weights if lasting and made else echoes).append(entry)
        return weights, echoes


def prompt_ids(tokenizer: Any, prompts: tuple[str, ...], calibration: torch.Tensor) -> list[torch.Tensor]:
    """Token ids [T] of each prompt, without and with BOS where the tokenizer has one, and of the calibration's start."""
    found = []
    starts = [[], [tokenizer.bos_token_id]] if tokenizer.bos_token_id is not None else [[]]
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        found += [torch.tensor([*start, *ids]) for start in starts if start or ids]
    found.append(calibration[0, : max(2, len(found[0]))].long())
    return [ids for ids in found if len(ids) > 1]


@torch.no_grad()
def find_super_weights(
    checkpoint: Checkpoint, prompts: list[torch.Tensor], options: RunOptions
) -> list[SuperWeight]:
    """Super weights of a checkpoint, in one forward walk of prompts (ids [T])."""
    model = StreamedModel(checkpoint, options.device, options.dtype, memory=options.memory)
    with model.outside():
        detector = SuperWeightDetector(model, prompts)
    for number, layer in model.walk(range(len(model.layers))):
        detector.forward(number, layer)
    return detector.finish(checkpoint.config)[0]


def down_of(ffns: list[Ffn], unit: str) -> torch.Tensor:
    """W_down [D, F], as a view, of one of a layer's FFNs."""
    for ffn in ffns:
        if unit in ffn.units:
            return ffn.down_weight(ffn.units.index(unit))
    raise KeyError(unit)


def _spike(
    number: int, unit: str, activations: Activations, weight: torch.Tensor, original: torch.Tensor
) -> SuperWeight | None:
    """The weight behind an FFN's largest output, when that is a spike which one product explains."""
    x_TF, y_TD, places = activations
    magnitude = y_TD.abs()
    token, row = divmod(int(magnitude.argmax()), y_TD.shape[1])
    output = float(y_TD[token, row])
    median = float(magnitude.median())
    if median == 0 or abs(output) < SPIKE_RATIO * median:
        return None
    products = x_TF[token] * weight[row].float()
    column = int((products * (1 if output > 0 else -1)).argmax())
    explained = float(products[column]) / output
    if explained < MIN_EXPLAINED:
        return None
    value = original[row, column]
    return SuperWeight(
        layer=number,
        row=row,
        column=column,
        value=float(value),
        input=float(x_TF[token, column]),
        output=output,
        explained=explained,
        ratio=abs(output) / median,
        rank=1 + int((original.abs() > value.abs()).sum()),
        token=int(places[token]),
        ffn=unit,
    )


def published_coordinates(config: dict[str, Any]) -> dict[tuple[int, int, int], str]:
    """(layer, row, column) -> source, of the published super weights of the model whose config this is."""
    text = (
        resources.files("surgery").joinpath("data/published_super_weights.json").read_text(encoding="utf-8")
    )
    catalogue = json.loads(text)
    found = {}
    for entry in catalogue["models"]:
        if all(config.get(key) == value for key, value in entry["shape"].items()):
            for layer, row, column in entry["coordinates"]:
                found[layer, row, column] = f"{entry['model']}: {catalogue['sources'][entry['source']]}"
    return found
