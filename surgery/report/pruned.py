"""Sections about a pruned folder, from its surgeon.json: size and quality, channels removed, provenance."""

from __future__ import annotations

from typing import Any

from surgery.card.perplexity_change import perplexity_change
from surgery.card.render import lp_interval_note
from surgery.chart import LAYER_AXIS, LP_SHARE_AXIS, Axis, Figure, Series, layer_line
from surgery.index.channel_index import ChannelIndex
from surgery.index.intervals import why_no_sums
from surgery.plan.layer_rows import cut_lines, layer_rows
from surgery.plan.methods import METHODS
from surgery.report.document import Fact, Section, Table, Unit
from surgery.report.method_overlap import survivals
from surgery.report.page import interval_text


def pruned_sections(manifest: dict[str, Any], index: ChannelIndex | None) -> list[Section]:
    """Size and quality, removed channels by layer and, with an index, what other methods would have kept."""
    sections = [_sizes(manifest), _layers(manifest, index)]
    if index is not None:
        sections.append(_survival(manifest, index))
    return sections


def _sizes(manifest: dict[str, Any]) -> Section:
    plan, source, result = manifest["plan"], manifest["source"], manifest["result"]
    lines: list[tuple[str, Unit, Any, Any]] = [
        ("parameters", "millions", source["parameters"], result["parameters"]),
        ("size", "bytes", source["bytes"], result["bytes"]),
    ]
    for key, change in widths(plan).items():
        widest = ", widest layer" if "per_layer" in change else ""
        lines.append((f"{key}{widest}", "count", change["before"], change["after"]))
    measured = manifest["measurements"]
    between = None
    note = "Perplexity was not measured: `surgeon prune --eval` measures it before and after."
    if "dense" in measured and "pruned" in measured:
        for key, name in (("perplexity", "perplexity"), ("bits_per_byte", "bits per byte")):
            lines.append((name, "number", measured["dense"][key], measured["pruned"][key]))
        pruned = measured["pruned"]
        factor = perplexity_change(measured["dense"], pruned)
        between = factor.interval
        note = (
            f"Perplexity on {pruned['text']}, {pruned['tokens']:,} predicted tokens: {pruned['convention']}. "
            f"{factor.note}"
        )
    table = Table(
        "dense-pruned",
        "Dense and pruned",
        [
            ("", "text"),
            ("dense", "row"),
            ("pruned", "row"),
            ("pruned / dense", "percent"),
            ("95% interval", "text"),
        ],
        [
            [name, dense, pruned, pruned / dense, interval_text(between) if name == "perplexity" else ""]
            for name, _, dense, pruned in lines
        ],
        note=note,
        row_units=[unit for _, unit, *_ in lines],
    )
    tables = [table, *_tasks(measured)]
    return Section("sizes", "Size and quality", tables=tables)


def widths(plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Config key -> its width before and after, from a manifest's plan."""
    one = {"intermediate_size": {"before": plan["width_before"], "after": plan["width_after"]}}
    found: dict[str, dict[str, Any]] = plan.get("widths") or one
    return found


def _tasks(measured: dict[str, Any]) -> list[Table]:
    if "tasks" not in measured:
        return []
    rows: list[list[Any]] = []
    for task, values in measured["tasks"]["results"].items():
        for metric, value in values.items():
            if metric != "samples" and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr")
                known = error if isinstance(error, float) else None
                rows.append([task, metric, value, known, values["samples"]])
    columns: list[tuple[str, Unit]] = [("task", "text"), ("metric", "text"), ("value", "number")]
    columns += [("± standard error", "number"), ("examples", "count")]
    return [Table("tasks", f"Tasks of the pruned model ({measured['tasks']['harness']})", columns, rows)]


def _layers(manifest: dict[str, Any], index: ChannelIndex | None) -> Section:
    plan, layers = manifest["plan"], manifest["plan"]["layers"]
    figures = [_channels(plan, index)]
    own = [layer if layer.get("supernodes") else {} for layer in layers]
    figures.append(
        Figure(
            "lp-kept",
            "Share of each layer's loss proxy held by the kept channels",
            "lines",
            LAYER_AXIS,
            LP_SHARE_AXIS,
            series=[
                _held("kept channels", own, "lp_kept", "core"),
                _held("supernodes (top 1%)", own, "lp_share_top", "control"),
            ],
            text="Loss proxies of the index, from before pruning: an estimate, not the measured loss. "
            + lp_interval_note(plan),
        )
    )
    figures.append(_repair(manifest))
    kept, total = (sum(layer[key] for layer in layers) for key in ("supernodes_kept", "supernodes"))
    facts = [
        Fact("method", _named(plan["method"], plan.get("method_label"))),
        Fact(
            "allocation", plan.get("allocation", "uniform") + (", zero-padded" if plan.get("padded") else "")
        ),
        Fact("repair", _named(plan.get("repair", "none"), manifest.get("repair_label"))),
        *([Fact("final norm", f"times {norm['scale']:.3f}")] if (norm := manifest.get("final_norm")) else []),
        Fact("FFN channels removed", plan["sparsity"], "percent"),
        Fact("supernodes kept", f"{kept:,} of {total:,}"),
        Fact("super weights kept", _super_weights_kept(manifest)),
    ]
    return Section(
        "layers",
        "Channels removed, by layer",
        facts=facts,
        tables=[*_kinds(plan), *_moved(manifest)],
        figures=[figure for figure in figures if figure is not None],
    )


def _held(name: str, layers: list[dict[str, Any]], key: str, style: str) -> Series:
    """A share of LP by layer, with its interval."""
    spread = [layer.get(f"{key}_interval") for layer in layers]
    return layer_line(name, [layer.get(key) for layer in layers], style, spread)


def _named(name: str, label: str | None) -> str:
    """A method or a repair as on the command line, with its label where the manifest has one."""
    return name if label in (None, "", name) else f"{name}: {label}"


def _super_weights_kept(manifest: dict[str, Any]) -> str:
    weights = manifest["super_weights"]
    return f"{sum(w['column'] is not None for w in weights)} of {len(weights)}"


def _channels(plan: dict[str, Any], index: ChannelIndex | None) -> Figure | None:
    """Channels kept, protected and removed by layer.

    None where only the index, which isn't given, knows how many channels there were.
    """
    kept, protected, removed = [], [], []
    for number, entry in enumerate(plan["layers"]):
        parts = list(entry["ffns"].values()) if "ffns" in entry else [entry]
        if index is not None:
            before = sum(ffn.width for ffn in index.layers[number].ffns.values())
        elif len(parts) <= 1:
            before = plan["width_before"] * len(parts)
        else:
            return None
        count = sum(len(part["kept"]) for part in parts)
        protected.append(sum(len(part["protected"]) for part in parts))
        kept.append(count - protected[-1])
        removed.append(before - count)
    return Figure(
        "channels",
        "FFN channels protected, kept and removed, by layer",
        "stacked",
        LAYER_AXIS,
        Axis("FFN channels"),
        series=[
            Series("protected (supernodes, super-weight columns)", values=protected, style="points"),
            Series("kept by score", values=kept, style="core"),
            Series("removed", values=removed, style="control"),
        ],
        categories=[str(number) for number in range(len(plan["layers"]))],
    )


def _repair(manifest: dict[str, Any]) -> Figure | None:
    """Unexplained share of each FFN's target on held-out blocks, before and after the refit.

    None where no layer with a single FFN was repaired.
    """
    entries = manifest.get("repair") or []
    if not any(len(entry["ffns"]) == 1 for entry in entries):
        return None
    own = [next(iter(e["ffns"].values())) if len(e["ffns"]) == 1 else {} for e in entries]
    return Figure(
        "repair",
        "Error of each FFN on held-out blocks, before and after repair",
        "lines",
        LAYER_AXIS,
        Axis("unexplained share (%, log)", log=True, percent=True),
        series=[
            layer_line("before repair", [part.get("held_out_before") or None for part in own], "control"),
            layer_line("after repair", [part.get("held_out_after") or None for part in own], "core"),
        ],
        text="The share of the refit's target that the FFN's output does not explain. The held-out blocks "
        "are part of the calibration text; the ridge of the refit was chosen on them.",
    )


def _kinds(plan: dict[str, Any]) -> list[Table]:
    """What stays of each layer, where more than FFN channels goes; and the mixtures that were tried."""
    if "cuts" not in plan:
        return _widths_tried(plan)
    rows: list[list[Any]] = [
        [row.number, "removed" if row.after is None else row.after, row.attention, row.channels]
        for row in layer_rows(plan)
    ]
    columns: list[tuple[str, Unit]] = [("layer of the source", "figure"), ("now layer", "figure")]
    columns += [("attention", "text"), ("FFN channels", "count")]
    tables = [Table("kinds", "What stays of each layer", columns, rows, note=". ".join(cut_lines(plan)))]
    steps = plan.get("search", {}).get("steps") or []
    if steps:
        tried: list[list[Any]] = [
            [_removed(step["removed"]), step["width"], step["kl"], step["gain"]] for step in steps
        ]
        headings: list[tuple[str, Unit]] = [("removed beside channels", "text"), ("FFN width", "count")]
        headings += [("KL to the dense model", "number"), ("better by", "number")]
        note = "KL in nats a token, after repair, on held-out calibration blocks."
        tables.append(
            Table("search", "Mixtures of cuts that were tried, in order", headings, tried, note=note)
        )
    return tables + _widths_tried(plan)


def _widths_tried(plan: dict[str, Any]) -> list[Table]:
    """What a search for widths of layers tried."""
    steps = plan.get("width_search", {}).get("steps") or []
    if not steps:
        return []
    rows: list[list[Any]] = [[step["name"], step["kl"], "yes" if step["kept"] else "no"] for step in steps]
    columns: list[tuple[str, Unit]] = [("widths of layers", "text"), ("KL to the dense model", "number")]
    columns += [("better", "text")]
    note = "KL in nats a token, repaired, on held-out calibration blocks."
    return [Table("widths", "Widths of layers that were tried, in order", columns, rows, note=note)]


def _removed(removed: dict[str, list[int]]) -> str:
    """Layers of a tried mixture, by kind."""
    counted = {"kv": "key/value heads a layer", "experts": "experts a layer"}
    parts = [
        f"{numbers[0]} {counted[kind]}" if kind in counted else f"{kind} {', '.join(map(str, numbers))}"
        for kind, numbers in removed.items()
        if numbers
    ]
    return "; ".join(parts) or "nothing"


def _moved(manifest: dict[str, Any]) -> list[Table]:
    weights = manifest["super_weights"]
    if not weights:
        return []
    rows = [
        [
            w["layer"],
            w["row"],
            w["column_before"],
            "removed" if w["column"] is None else w["column"],
            w["value"],
        ]
        for w in weights
    ]
    columns: list[tuple[str, Unit]] = [("layer", "figure"), ("row", "figure"), ("column before", "figure")]
    columns += [("column now", "figure"), ("weight", "number")]
    return [Table("moved", "Super weights and their new columns", columns, rows)]


def _survival(manifest: dict[str, Any], index: ChannelIndex) -> Section:
    plan = manifest["plan"]
    found = survivals(index, manifest)
    rows: list[list[Any]] = [
        [
            s.method + (" (used here)" if s.method == plan["method"] else ""),
            "yes" if METHODS[s.method].protects else "no",
            s.supernodes_kept,
            s.supernodes_kept / s.supernodes if s.supernodes else None,
            f"{s.super_weights_kept} of {s.super_weights}",
            s.lp_kept,
            interval_text(s.lp_interval),
        ]
        for s in found
    ]
    actual, total = (sum(layer[key] for layer in plan["layers"]) for key in ("supernodes_kept", "supernodes"))
    table = Table(
        "survival",
        f"What each method would keep, of {total:,} supernodes and {len(index.super_weights)} super weights",
        [
            ("method", "text"),
            ("protects by default", "text"),
            ("supernodes kept", "count"),
            ("share", "percent"),
            ("super weights kept", "text"),
            ("LP kept, mean of layers", "percent"),
            ("95% interval", "text"),
        ],
        rows,
        note=f"This model kept {actual:,} of {total:,} supernodes and {_super_weights_kept(manifest)} super "
        "weights. The table shows the ranking alone, with nothing protected. A method that protects by "
        "default keeps all supernodes and super weights when it is used. "
        + (why_no_sums(index) or "Two methods differ in LP kept where their intervals part."),
    )
    share = [s.supernodes_kept / s.supernodes if s.supernodes else 0.0 for s in found]
    series = [
        Series("supernodes", values=share, style="core"),
        Series(
            "loss proxy, mean of layers",
            values=[s.lp_kept for s in found],
            style="control",
            spread=[s.lp_interval for s in found] if any(s.lp_interval for s in found) else [],
        ),
    ]
    if index.super_weights:
        kept = [s.super_weights_kept / s.super_weights for s in found]
        series.append(Series("super weights", values=kept, style="points"))
    figure = Figure(
        "survival",
        "Supernodes, loss proxy and super weights that each method would keep at these widths",
        "bars",
        Axis("kept (%)", percent=True),
        Axis("method"),
        series=series,
        categories=[s.method for s in found],
        text="Computed from the index, with nothing protected.",
    )
    return Section("survival", "What other methods would have kept", tables=[table], figures=[figure])


def provenance_section(manifest: dict[str, Any]) -> Section:
    """Source, calibration text, versions and command of a pruned folder."""
    source, calibration, versions = manifest["source"], manifest["calibration"], manifest["versions"]
    verification = manifest["measurements"].get("verification")
    facts = [
        Fact("source", source["name"]),
        *([Fact("revision", source["revision"])] if source["revision"] else []),
        *([Fact("read from", source["stored_form"])] if source.get("stored_form") else []),
        Fact("digest of the source's config", source["config_digest"]),
        Fact("digest of its tensor names and shapes", source["shape_digest"]),
        Fact("calibration text", calibration["name"]),
        Fact("blocks", calibration["blocks"], "count"),
        Fact("tokens per block", calibration["block_size"], "count"),
        Fact("sha256 of the token ids", calibration["sha256"]),
        Fact("seed", calibration["seed"], "figure"),
        Fact("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    if verification:
        facts.append(
            Fact(
                f"verification: relative difference of the logits, {verification['dtype']}",
                verification["relative_difference"],
                "percent",
            )
        )
    return Section(
        "provenance",
        "How it was made",
        facts=facts,
        code=f"$ {manifest['command']}" if manifest.get("command") else "",
    )
