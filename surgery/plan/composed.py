"""Several cuts of one model, one after another, told as one: in channels of the model before the first."""

from __future__ import annotations

from typing import Any

CHANNELS = ("kept", "protected")  # entries that hold channel numbers


def composed_plan(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """The `plan` entry of a manifest for the cut `earlier` followed by the cut `later` of its result.

    Channel j of the later source is channel kept[j] of the earlier one, so kept = kept_earlier[kept_later];
    with sparsities s of both, the whole is 1 - (1 - s_earlier)(1 - s_later). What the index said of channels
    (supernodes, shares of the LP) is that of the later cut.
    """
    widths = {
        key: {**change, "before": earlier["widths"][key]["before"]} for key, change in later["widths"].items()
    }
    return {
        **later,
        "sparsity": 1 - (1 - earlier["sparsity"]) * (1 - later["sparsity"]),
        "width_before": earlier["width_before"],
        "widths": widths,
        "layers": [_layer(*pair) for pair in zip(earlier["layers"], later["layers"], strict=True)],
    }


def _layer(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    if "ffns" in later:
        return {
            **later,
            "ffns": {name: _layer(earlier["ffns"][name], ffn) for name, ffn in later["ffns"].items()},
        }
    return {**later, **{name: [earlier["kept"][j] for j in later[name]] for name in CHANNELS}}
