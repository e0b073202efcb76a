"""Sections about a pruned folder, from its surgeon.json: sizes and losses, what went where, how it was made."""

from __future__ import annotations

from typing import Any

from surgery.importance import METHODS
from surgery.index import ChannelIndex
from surgery.report.document import LAYER_AXIS, Axis, Fact, Figure, Section, Series, Table, Unit, layer_line
from surgery.report.survival import survivals

SHARE_OF_LP = Axis("share of the layer's loss proxy (%)", percent=True)


def cut_sections(manifest: dict[str, Any], index: ChannelIndex | None) -> list[Section]:
    """Dense against shrunk, what was removed layer by layer, and with an index what other scores would have removed."""
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
    note = "Its loss was not measured when it was written; surgeon prune --eval does that."
    if "dense" in measured:
        for key, name in (("perplexity", "perplexity"), ("bits_per_byte", "bits per byte")):
            lines.append((name, "number", measured["dense"][key], measured["shrunk"][key]))
        shrunk = measured["shrunk"]
        note = (
            f"Perplexity on {shrunk['text']}, {shrunk['tokens']:,} predicted tokens: {shrunk['convention']}."
        )
    table = Table(
        "dense-shrunk",
        "Dense and shrunk",
        [("", "text"), ("dense", "row"), ("shrunk", "row"), ("shrunk / dense", "percent")],
        [[name, dense, shrunk, shrunk / dense] for name, _, dense, shrunk in lines],
        note=note,
        row_units=[unit for _, unit, *_ in lines],
    )
    tables = [table, *_tasks(measured)]
    return Section("sizes", "What the cut cost", tables=tables)


def widths(plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Config keys of a plan with their widths before and after."""
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
    return [Table("tasks", f"Tasks of the shrunk model ({measured['tasks']['harness']})", columns, rows)]


def _layers(manifest: dict[str, Any], index: ChannelIndex | None) -> Section:
    plan, layers = manifest["plan"], manifest["plan"]["layers"]
    figures = [_channels(plan, index)]
    own = [layer if layer.get("supernodes") else {} for layer in layers]
    figures.append(
        Figure(
            "lp-kept",
            "Share of each layer's loss proxy that the kept channels hold",
            "lines",
            LAYER_AXIS,
            SHARE_OF_LP,
            series=[
                layer_line("kept channels", [layer.get("lp_kept") for layer in own], "core"),
                layer_line(
                    "of them supernodes (top 1%)", [layer.get("lp_share_top") for layer in own], "control"
                ),
            ],
            text="As scored before the cut: what the loss proxy foretells, not what was lost.",
        )
    )
    figures.append(_repair(manifest))
    kept, total = (sum(layer[key] for layer in layers) for key in ("supernodes_kept", "supernodes"))
    facts = [
        Fact("method", plan["method"]),
        Fact(
            "allocation", plan.get("allocation", "uniform") + (", zero-padded" if plan.get("padded") else "")
        ),
        Fact("repair", plan.get("repair", "none")),
        Fact("FFN channels removed", plan["sparsity"], "percent"),
        Fact("supernodes kept", f"{kept:,} of {total:,}"),
        Fact("super weights kept", _super_weights_kept(manifest)),
    ]
    return Section(
        "layers",
        "What went, layer by layer",
        facts=facts,
        tables=_moved(manifest),
        figures=[figure for figure in figures if figure is not None],
    )


def _super_weights_kept(manifest: dict[str, Any]) -> str:
    weights = manifest["super_weights"]
    return f"{sum(w['column'] is not None for w in weights)} of {len(weights)}"


def _channels(plan: dict[str, Any], index: ChannelIndex | None) -> Figure | None:
    """Channels kept, protected and removed; None where the manifest alone doesn't say how many there were."""
    kept, protected, removed = [], [], []
    for number, entry in enumerate(plan["layers"]):
        parts = list(entry["ffns"].values()) if "ffns" in entry else [entry]
        if index is not None:
            before = sum(ffn.width for ffn in index.layers[number].ffns.values())
        elif len(parts) <= 1:
            before = plan["width_before"] * len(parts)
        else:
            return None
        stay = sum(len(part["kept"]) for part in parts)
        held = sum(len(part["protected"]) for part in parts)
        kept.append(stay - held)
        protected.append(held)
        removed.append(before - stay)
    return Figure(
        "channels",
        "FFN channels protected, kept and removed, layer by layer",
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
    """Unexplained share of each FFN's target on held-out blocks, before the refit and after."""
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
        text="The target is what the layer should write for the model to be as before. The held-out blocks are of the "
        "calibration text; the refit's ridge was chosen on them.",
    )


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
    return [Table("moved", "Super weights under their new columns", columns, rows)]


def _survival(manifest: dict[str, Any], index: ChannelIndex) -> Section:
    plan = manifest["plan"]
    found = survivals(index, manifest)
    rows: list[list[Any]] = [
        [
            s.method + (" (this cut's)" if s.method == plan["method"] else ""),
            "yes" if METHODS[s.method].protects else "no",
            s.supernodes_kept,
            s.supernodes_kept / s.supernodes if s.supernodes else None,
            f"{s.super_weights_kept} of {s.super_weights}",
            s.lp_kept,
        ]
        for s in found
    ]
    actual, total = (sum(layer[key] for layer in plan["layers"]) for key in ("supernodes_kept", "supernodes"))
    table = Table(
        "survival",
        f"What each score alone keeps, of {total:,} supernodes and {len(index.super_weights)} super weights",
        [
            ("score", "text"),
            ("protects by default", "text"),
            ("supernodes kept", "count"),
            ("share", "percent"),
            ("super weights kept", "text"),
            ("LP kept, mean of layers", "percent"),
        ],
        rows,
        note=f"The cut itself kept {actual:,} of {total:,} supernodes and {_super_weights_kept(manifest)} super weights. Where a "
        "score protects by default, surgeon keeps them all whatever the score says; here nothing is protected.",
    )
    share = [s.supernodes_kept / s.supernodes if s.supernodes else 0.0 for s in found]
    series = [
        Series("supernodes", values=share, style="core"),
        Series("loss proxy, mean of layers", values=[s.lp_kept for s in found], style="control"),
    ]
    if index.super_weights:
        kept = [s.super_weights_kept / s.super_weights for s in found]
        series.append(Series("super weights", values=kept, style="points"))
    figure = Figure(
        "survival",
        "Supernodes, loss proxy and super weights that each score alone would keep at these widths",
        "bars",
        Axis("kept (%)", percent=True),
        Axis("score"),
        series=series,
        categories=[s.method for s in found],
        text="Computed from the index, with nothing protected.",
    )
    return Section("survival", "What other scores would have removed", tables=[table], figures=[figure])


def provenance_section(manifest: dict[str, Any]) -> Section:
    """Where a cut comes from, and the command that makes it again."""
    source, calibration, versions = manifest["source"], manifest["calibration"], manifest["versions"]
    gate = manifest["measurements"].get("gate")
    facts = [
        Fact("source", source["name"]),
        *([Fact("revision", source["revision"])] if source["revision"] else []),
        *([Fact("read from", source["stored_form"])] if source.get("stored_form") else []),
        Fact("digest of its config", source["config_digest"]),
        Fact("digest of its tensors' names and shapes", source["shape_digest"]),
        Fact("calibration text", calibration["name"]),
        Fact("blocks", calibration["blocks"], "count"),
        Fact("tokens in a block", calibration["block_size"], "count"),
        Fact("sha256 of the token ids", calibration["sha256"]),
        Fact("seed", calibration["seed"], "figure"),
        Fact("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    if gate:
        facts.append(
            Fact(f"logits loaded back differ by, {gate['dtype']}", gate["relative_difference"], "percent")
        )
    return Section(
        "provenance",
        "How it was made",
        facts=facts,
        code=f"$ {manifest['command']}" if manifest.get("command") else "",
    )
