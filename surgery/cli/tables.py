"""Terminal tables of an index, a comparison of indexes or pruned models, and a plan."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from surgery.cli.structure_table import show_structures
from surgery.cli.terminal import BAR_WIDTH, ROOMY, WIDE, bar, bare_table, short_number
from surgery.errors import IndexMismatchError
from surgery.index.channel_index import ChannelIndex
from surgery.model.meta_model import MetaModel
from surgery.plan.layer_rows import cut_lines, search_line
from surgery.plan.prune_plan import PrunePlan

if TYPE_CHECKING:
    from surgery.evaluate.compare import ComparisonRow


def show_index(index: ChannelIndex, console: Console) -> None:
    """Print model, calibration, LP concentration per layer, overlaps and super weights."""
    fields = index.as_json()
    source, calibration = fields["source"], fields["calibration"]
    revision = f" at {source['revision']}" if source["revision"] else ""
    console.print(
        f"[bold]{source['name']}[/bold]{revision}: {source['parameters'] / 1e6:,.1f} M parameters, "
        f"{len(index.layers)} layers of {describe_widths(index)}"
    )
    console.print(
        f"Calibrated on {calibration['blocks']} x {calibration['block_size']} tokens of "
        f"{calibration['name']} (perplexity {index.loss['perplexity']:.2f}), computed in "
        f"{fields['run']['dtype']}"
    )
    shares = [layer["lp_share"]["0.01"] for layer in fields["layers"] if layer["width"]]
    console.print(
        f"\nShare of a layer's loss proxy held by its top 1% of channels (supernodes): median "
        f"{100 * statistics.median(shares):.1f}%, min {100 * min(shares):.1f}%, max {100 * max(shares):.1f}%"
    )
    console.print(_layers(fields["layers"], console.width))
    show_structures(fields, console)


def _layers(layers: list[dict[str, Any]], width: int) -> Table:
    """One row per layer, with as many columns as fit into `width`."""
    headings = ["layer", "LP of top 1%", "", "also top by activation", "by weight norm"]
    if width < ROOMY:
        headings = ["layer", "top 1%", "", "also by u²", "by norm"]
    elif width >= WIDE:
        headings += ["top 0.1%", "top 5%", "max |in|", "max |out|"]
    table = bare_table(tuple(headings), left=("",))
    cells = max(4, min(BAR_WIDTH, width - 32))
    for number, layer in enumerate(layers):
        if not layer["width"]:
            table.add_row(str(number), "no FFN")
            continue
        share, overlap, maxima = layer["lp_share"], layer["overlap"], layer.get("prompt_max") or {}
        row = [
            str(number),
            f"{100 * share['0.01']:.1f}%",
            bar(share["0.01"], cells),
            f"{100 * overlap['activation_power']:.0f}%",
            f"{100 * overlap['weight_norm']:.0f}%",
            *(f"{100 * share[key]:.1f}%" for key in ("0.001", "0.05")),
            *(f"{maxima[way]:,.1f}" if way in maxima else "" for way in ("input", "output")),
        ]
        table.add_row(*row[: len(headings)])
    return table


def describe_widths(index: ChannelIndex) -> str:
    """The width of the FFNs, and the number of experts if there are any."""
    experts = max((len(layer.experts) for layer in index.layers), default=0)
    if not experts and len(index.widths) == 1:
        return f"{index.layers[0].width} FFN channels"
    silent = sum(expert.tokens == 0 for layer in index.layers for expert in layer.experts)
    total = sum(len(layer.experts) for layer in index.layers)
    widths = ", ".join(f"{key} {width}" for key, width in index.widths.items())
    return f"up to {experts} experts ({widths}); {silent} of {total} experts saw no calibration token"


def show_ffns(meta_model: MetaModel, console: Console) -> None:
    """Print which FFNs a model has and which config keys hold their widths, known or inferred."""
    checkpoint = meta_model.checkpoint
    console.print(
        f"{checkpoint.name}: {checkpoint.parameters / 1e6:,.1f} M parameters, "
        f"{checkpoint.nbytes / 2**20:,.0f} MiB, {len(meta_model.layers)} layers at {meta_model.layers_path}"
    )
    origin = "inferred from the model's shapes" if meta_model.inferred else "from the table of families"
    console.print(f"FFNs of {checkpoint.config['model_type']}, {origin}:")
    for site in meta_model.family.sites:
        layers = [[ffn for ffn in ffns if ffn.site == site] for ffns in meta_model.ffns]
        layers = [ffns for ffns in layers if ffns]
        if not layers:
            continue
        first = layers[0][0]
        shape = "gate and up fused" if site.fused else "gated" if len(site.in_projections) == 2 else "no gate"
        count = f", {len(layers[0])} experts per layer" if first.stacked else ""
        console.print(
            f"  {site.kind}: {', '.join(site.in_projections)} → {site.down} ({shape}), width {first.width} "
            f"from {site.width_key}, in {len(layers)} layers{count}"
        )
    if meta_model.family.not_prunable:
        console.print(f"  can't be pruned: {meta_model.family.not_prunable}")


def compare_indexes(indexes: list[tuple[str, ChannelIndex]]) -> dict[str, Any]:
    """Several indexes of one architecture side by side, in the order given: LP concentration and supernodes.

    `supernodes_shared` is the share of an index's supernodes that are also supernodes of the last index, over
    all layers. Raises IndexMismatchError when layers or widths differ.
    """
    last = indexes[-1][1]
    rows = []
    for name, index in indexes:
        if [layer.width for layer in index.layers] != [layer.width for layer in last.layers]:
            raise IndexMismatchError(
                "these indexes are of models of different shape",
                where=name,
                expected=f"{len(last.layers)} layers of {last.layers[0].width}",
                found=f"{len(index.layers)} layers of {index.layers[0].width}",
            )
        shares = [layer["lp_share"]["0.01"] for layer in index.as_json()["layers"] if layer["width"]]
        pairs = list(zip(index.layers, last.layers, strict=True))
        shared = sum(int(torch.isin(a.supernodes, b.supernodes).sum()) for a, b in pairs if a.ffns)
        rows.append(
            {
                "name": name,
                "revision": index.source["revision"],
                "perplexity": index.loss["perplexity"],
                "lp_share_median": statistics.median(shares),
                "lp_share_min": min(shares),
                "lp_share_max": max(shares),
                "supernodes_shared": shared / sum(len(a.supernodes) for a, _ in pairs if a.ffns),
                "super_weights": [[w.layer, w.row, w.column] for w in index.super_weights],
            }
        )
    return {"model": last.source["name"], "calibration": last.calibration, "indexes": rows}


def show_comparison(indexes: list[tuple[str, ChannelIndex]], console: Console) -> None:
    """Print `compare_indexes` as a table."""
    fields = compare_indexes(indexes)
    console.print(
        f"[bold]{fields['model']}[/bold], share of a layer's loss proxy held by its top 1% of channels"
    )
    headings = (
        "index",
        "perplexity",
        "median",
        "min",
        "max",
        "supernodes shared with last",
        "super weights",
    )
    table = bare_table(headings, left=("index", "super weights"))
    for row in fields["indexes"]:
        cells = [
            row["name"],
            short_number(row["perplexity"]),
            *(f"{100 * row[key]:.1f}%" for key in ("lp_share_median", "lp_share_min", "lp_share_max")),
            f"{100 * row['supernodes_shared']:.0f}%",
            ", ".join(f"{layer} \\[{r}, {c}]" for layer, r, c in row["super_weights"]) or "none",
        ]
        if console.width < ROOMY:
            pairs = zip(headings[1:], cells[1:], strict=True)
            console.print(f"{cells[0]}: " + ", ".join(f"{heading} {cell}" for heading, cell in pairs))
        table.add_row(*cells)
    if console.width >= ROOMY:
        console.print(table)


def show_rows(rows: list[ComparisonRow], console: Console) -> None:
    """Print what `surgeon compare` measured, one line per pruned model and text."""
    searched = any(row.cuts not in ("", "ffn") or row.gone for row in rows)
    headings = ("method", "repair", "allocation", *(("may go", "gone") if searched else ("removed",)))
    table = bare_table(
        (*headings, "text", "perplexity", "bits/byte", "KL", "parameters", "seconds"),
        left=("method", "repair", "allocation", "may go", "gone", "text"),
    )
    for row in rows:
        table.add_row(
            *(row.method, row.repair, row.allocation),
            *((row.cuts, row.gone) if searched else (f"{100 * row.sparsity:.0f}%",)),
            *(row.text, short_number(row.perplexity), f"{row.bits_per_byte:.3f}", f"{row.kl:.3f}"),
            *(f"{row.parameters / 1e6:,.1f} M", f"{row.seconds:.0f}"),
        )
    console.print(table)


def width_text(plan: PrunePlan) -> str:
    """The width after pruning, or the range of widths."""
    own = [width for width in plan.widths[0].per_layer if width is not None]
    if not own:
        return str(plan.width_after)
    return f"{min(own)} to {max(own)}" + (f", padded to {plan.width_after}" if plan.padded else "")


def show_plan(plan: PrunePlan, sizes: dict[str, int], console: Console) -> None:
    """Print what a plan does; `sizes` holds parameters and bytes before and after."""
    fields = plan.as_json()
    console.print(
        f"Method {plan.method}, {plan.allocation} width {plan.width_before} → "
        f"[bold]{width_text(plan)}[/bold] ({100 * plan.sparsity:.1f}% of FFN channels removed)"
    )
    if len(plan.widths) > 1:
        console.print(", ".join(f"{c.key} {c.before} → {c.after}" for c in plan.widths))
    for line in [*cut_lines(fields), *filter(None, [search_line(fields)])]:
        console.print(line)
    console.print(
        f"Parameters {sizes['parameters_before'] / 1e6:,.1f} M → {sizes['parameters_after'] / 1e6:,.1f} M, "
        f"bytes {sizes['bytes_before'] / 2**20:,.0f} MiB → {sizes['bytes_after'] / 2**20:,.0f} MiB"
    )
    parts = [ffn for layer in plan.layers for ffn in layer.ffns.values()]
    kept = sum(part.supernodes_kept for part in parts)
    total = sum(part.supernodes for part in parts)
    protected = sum(len(part.protected) for part in parts)
    console.print(f"Protected channels: {protected}; supernodes kept: {kept} of {total}")
    silent = sum(part.ranked_by != plan.method for part in parts)
    if silent:
        console.print(
            f"{silent} experts saw no calibration token: their channels are ranked by weight magnitude"
        )
    for weight in plan.super_weights:
        result = "removed" if weight["column"] is None else f"now in column {weight['column']}"
        console.print(
            f"Super weight layer {weight['layer']} [{weight['row']}, {weight['column_before']}]: {result}"
        )
    if plan.needs_loader:
        how = "in width" if plan.per_layer_widths else "in having an attention or an FFN"
        console.print(
            f"Layers differ {how}: loading needs `import surgery.loading` or trust_remote_code=True"
        )
        return
    fits = [
        f"groups of {group} with TP {', '.join(map(str, tp))}"
        for group, tp in fields["divides"].items()
        if tp
    ]
    console.print("Width splits into " + ("; ".join(fits) if fits else "no common quantisation group"))
