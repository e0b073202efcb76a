"""SuperWeight, the entry of an index, and the coordinates of published super weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any

from surgery.checkpoint.reader import config_digest


@dataclass(frozen=True)
class SuperWeight:
    """One scalar W[row, column] of a layer's down_proj.

    value: the weight.
    input, output: the activations at the spike's token.
    explained: input * value / output.
    ratio: |output| over the median |output| of the FFN.
    rank: rank of |value| in its matrix (1 = largest).
    token: position of the spike in the prompt.
    ffn: the FFN of the layer it belongs to ("dense", "shared", "expert.3").
    residual: the hidden state at (token, row) after the layer.
    persistence: share of the layers above in which that hidden state keeps its size within a factor of two.
    published: source of the published coordinates that match or are near.
    ablation: perplexity with and without the weight, on the same blocks.
    residual_without: `residual` after this weight and those found before it in the layer are set to zero.
    prompts: number of prompts, of `prompts_tried`, in which it was found.
    catalogue: "match", "near" or "new", compared with the coordinates published for this model.
    structure: the column or row that it shares with another super weight.
    round: 1 where the model as it is shows the spike, 2 where it shows only without those of round 1.
    prompt: number of the prompt, from 0, in which the spike is largest.
    kind: the structure by whose measured effect it is called super ("scalar", "column", "row", "pair",
      "joint"), or "spike".
    effect: what removing it alone adds to the loss, in nats per token; `interval` [low, high] of it, at 95%,
      with null for an end that is not known.
    mean_effect: the same with its contribution set to its mean over tokens; None where not measured.
    controls: the effects of matched controls, by what is matched.
    parts: the parts of the structure it belongs to.
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
    round: int = 1
    prompt: int = 0
    kind: str = "spike"
    effect: float | None = None
    interval: list[float | None] = field(default_factory=list)
    mean_effect: float | None = None
    controls: dict[str, float] = field(default_factory=dict)
    parts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def place(self) -> tuple[int, str, int, int]:
        """(layer, FFN, row, column)."""
        return self.layer, self.ffn, self.row, self.column

    def as_json(self) -> dict[str, Any]:
        """Its entry in index.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> SuperWeight:
        """Inverse of `as_json`; unknown keys are ignored."""
        return cls(**{k: v for k, v in fields.items() if k in cls.__dataclass_fields__})


def published_coordinates(
    config: dict[str, Any], catalogue: str | None = None
) -> dict[tuple[int, int, int], str]:
    """Sources of the published super weights of the model with this config, by (layer, row, column).

    `catalogue` is the text of another catalogue than the one surgeon ships, as an atlas writes it.
    """
    text = catalogue or (
        resources.files("surgery").joinpath("data/published_super_weights.json").read_text(encoding="utf-8")
    )
    fields = json.loads(text)
    found, digest = {}, config_digest(config)
    for entry in fields["models"]:
        known = entry.get("config_digest", digest) == digest
        if known and all(config.get(key) == value for key, value in entry["shape"].items()):
            for layer, row, column in entry["coordinates"]:
                found[layer, row, column] = f"{entry['model']}: {fields['sources'][entry['source']]}"
    return found
