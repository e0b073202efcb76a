"""One row for each layer of the source: what stays of it, for tables, cards and reports of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GONE, WHOLE = "removed", "kept"


@dataclass(frozen=True)
class LayerRow:
    """What a plan leaves of the source's layer `number`.

    after: its number in the result; None where it goes. attention: "kept", "removed", or how many key/value
    heads stay. channels: FFN channels that stay.
    """

    number: int
    after: int | None
    attention: str
    channels: int


def layer_rows(plan: dict[str, Any]) -> list[LayerRow]:
    """The rows of a plan as surgeon.json has it."""
    cuts = plan.get("cuts", {})
    layers = cuts.get("layers", {}).get("removed", [])
    attention = cuts.get("attention", {}).get("removed", [])
    heads = cuts.get("kv", {}).get("kept", {})
    experts = cuts.get("experts", {}).get("layers", {})
    rows: list[LayerRow] = []
    for number, entry in enumerate(plan["layers"]):
        left = WHOLE
        if str(number) in heads:
            left = f"{len(heads[str(number)])} key/value heads"
        if number in attention or number in layers:
            left = GONE
        ffns = entry.get("ffns", {"dense": entry})
        gone = _gone_experts(ffns, experts.get(str(number)))
        parts = [part for name, part in ffns.items() if name not in gone]
        after = None if number in layers else sum(row.after is not None for row in rows)
        rows.append(LayerRow(number, after, left, sum(len(part["kept"]) for part in parts)))
    return rows


def _gone_experts(ffns: dict[str, Any], facts: dict[str, Any] | None) -> set[str]:
    """Names of the routed experts of a layer that go."""
    routed = {name for name in ffns if name.startswith("expert.")}
    return routed - {f"expert.{number}" for number in facts["kept"]} if facts else set()


def cut_lines(plan: dict[str, Any]) -> list[str]:
    """What goes besides FFN channels, a sentence for each kind; empty where nothing else goes."""
    cuts = plan.get("cuts", {})
    lines = []
    if "layers" in cuts:
        lines.append(f"Whole layers removed: {_listed(cuts['layers']['removed'])}")
    if "attention" in cuts:
        lines.append(f"Attention removed in layers {_listed(cuts['attention']['removed'])}")
    if "whole-ffn" in cuts:
        lines.append(f"FFN removed in layers {_listed(cuts['whole-ffn']['removed'])}")
    if "kv" in cuts:
        lines.append(f"Key/value heads kept in each layer: {cuts['kv']['heads']}")
    if "experts" in cuts:
        facts = cuts["experts"]
        mean = {key: _mean(facts["layers"], key) for key in ("tokens_kept", "lp_kept")}
        lines.append(
            f"Routed experts {facts['before']} → {facts['after']} in {len(facts['layers'])} layers, by "
            f"{'REAP' if facts['score'] == 'reap' else 'their loss proxy'}: they had "
            f"{100 * mean['tokens_kept']:.1f}% of the router's choices, {100 * mean['lp_kept']:.1f}% of the "
            "experts' loss proxy"
        )
    if "vocab" in cuts:
        facts = cuts["vocab"]
        lines.append(f"Vocabulary {facts['before']:,} → {facts['after']:,} tokens{_texts(facts['texts'])}")
    return lines


def _mean(layers: dict[str, dict[str, Any]], key: str) -> float:
    return sum(float(layer[key]) for layer in layers.values()) / len(layers)


def _texts(texts: list[dict[str, Any]]) -> str:
    parts = (
        f"{100 * one['covered']:.1f}% of {one['name']}'s stay, and it takes "
        f"{100 * (one['lengthening'] - 1):.1f}% more"
        for one in texts
    )
    return f": {'; '.join(parts)}" if texts else ""


def search_line(plan: dict[str, Any]) -> str | None:
    """What the searches for the mixture and for widths found, in sentences; None where there was none."""
    found = []
    for key, what in (
        ("search", "mixtures were cut, repaired"),
        ("width_search", "sets of widths were cut, refitted"),
    ):
        steps = plan.get(key, {}).get("steps") or []
        if steps:
            least = min(step["kl"] for step in steps)
            found.append(
                f"Searched: {len(steps)} {what} and measured on {plan[key]['tokens']:,} held-out calibration "
                f"tokens; KL to the dense model {steps[0]['kl']:.3f} nats a token for the first, {least:.3f} "
                "for the best"
            )
    return ". ".join(found) or None


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
