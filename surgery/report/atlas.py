"""The atlas: many indexes in one page and one table, whatever their models' shapes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from surgery import __version__
from surgery.bootstrap import Interval
from surgery.errors import SurgeonError
from surgery.index.channel_index import ChannelIndex
from surgery.index.findings import Finding
from surgery.index.intervals import halo_share, median_top_share, model_outlier_overlap, why_none
from surgery.report.document import Document, Section, Table, Unit
from surgery.report.page import between, shown
from surgery.report.revisions import Named, revision_sections, same_shape, shares
from surgery.report.spikes import EFFECT_COLUMNS, EFFECT_NOTE, effect_cells

if TYPE_CHECKING:
    import pyarrow

Failure = tuple[str, SurgeonError]
SPIKES = 5  # of each index that are listed


def atlas_document(members: Named, failures: list[Failure]) -> Document:
    """The page: models and texts, concentration, shared supernodes, super weights, and what failed."""
    table, concentration, _ = revision_sections(members)
    sections = [table, _concentrated(members), concentration, *_shared(members), _structures(members)]
    if failures:
        sections.append(_failures(failures))
    models = dict.fromkeys(index.source["name"] for _, index in members)
    of = "1 model" if len(models) == 1 else f"{len(models)} models"
    subtitle = f"{len(members)} {'index' if len(members) == 1 else 'indexes'} of {of}: {', '.join(models)}"
    return Document("indexes", "Atlas", subtitle, __version__, sections)


def _shared(members: Named) -> list[Section]:
    """One section for each shape that several models have."""
    sections = []
    for number, group in enumerate(groups := same_shapes(members)):
        shared = revision_sections(group)[2]
        index = group[0][1]
        title = f"{shared.title}: {len(index.layers)} layers of {index.layers[0].width} channels"
        names = f"shared-{number}" if len(groups) > 1 else "shared"
        sections.append(Section(names, title, shared.text, figures=shared.figures))
    if not groups:
        text = "No two of these models have the same shape, so their channels can't be matched."
        sections.append(Section("shared", "Supernodes that indexes share", text))
    return sections


def same_shapes(members: Named) -> list[Named]:
    """The groups of two or more members whose models have the same widths."""
    groups: list[Named] = []
    for name, index in members:
        group = next((group for group in groups if same_shape(group[0][1], index)), None)
        if group is None:
            groups.append([(name, index)])
        else:
            group.append((name, index))
    return [group for group in groups if len(group) > 1]


def _concentrated(members: Named) -> Section:
    """Concentration, overlaps and halo of each index, over all its layers, with 95% intervals."""
    rows: list[list[Any]] = []
    for name, index in members:
        own = [value for value in shares(index) if value is not None]
        found = _with_intervals(index)
        exact = _without_intervals(index, own) if None in found else []
        cells = [
            shown(exact[place], "percent")
            if one is None
            else f"{shown(one.estimate, 'percent')} {between(one.bounds, 'percent')}"
            for place, one in enumerate(found)
        ]
        rows.append([name, cells[0], min(own), max(own), *cells[1:]])
    notes = [f"{name}: {reason}" for name, index in members if (reason := why_none(index))]
    columns: list[tuple[str, Unit]] = [
        *(("index", "text"), ("LP in the top 1%, median layer", "text")),
        *(("smallest layer", "percent"), ("largest layer", "percent")),
        ("supernodes among the largest by activation power", "text"),
        *(("by weight norm", "text"), ("LP in the halo, mean layer", "text")),
    ]
    note = "With 95% intervals over calibration blocks. The halo is the tenth of the other channels closest "
    note += "to the supernodes by connectivity. " + " ".join(notes)
    table = Table("concentration", "Concentration, overlap with outliers, halo", columns, rows, note.strip())
    return Section("concentration", "Concentration, overlap and halo", tables=[table])


def _with_intervals(index: ChannelIndex) -> list[Interval | None]:
    """Concentration, overlap by activation power and by weight norm, and halo of an index."""
    return [
        median_top_share(index),
        model_outlier_overlap(index, "activation_power"),
        model_outlier_overlap(index, "weight_norm"),
        halo_share(index),
    ]


def _without_intervals(index: ChannelIndex, own: list[float]) -> list[float | None]:
    """The same where block sums are missing: from each layer's summary."""
    summaries = [layer.summary() for layer in index.layers if layer.ffns]

    def weighted(key: str) -> float | None:
        pairs = [(s["overlap"][key], len(s["supernodes"])) for s in summaries if key in s["overlap"]]
        total = sum(count for _, count in pairs)
        return sum(value * count for value, count in pairs) / total if total else None

    proxies = [[(f.statistics["loss_proxy"], f.halo) for f in layer.main] for layer in index.layers]
    halo = [
        float(sum(lp[members].sum() for lp, members in layer) / total)
        for layer in proxies
        if (total := sum(lp.sum() for lp, _ in layer))
    ]
    return [
        statistics.median(own),
        weighted("activation_power"),
        weighted("weight_norm"),
        statistics.fmean(halo),
    ]


def _structures(members: Named) -> Section:
    """What was removed of each model and what that cost: super weights, and the costliest spikes."""
    proved = [[name, *effect_cells(f)] for name, index in members for f in index.structures if f.is_super]
    spikes = [
        [name, *effect_cells(found)]
        for name, index in members
        for found in [one for one in index.structures if not one.is_super][:SPIKES]
    ]
    columns: list[tuple[str, Unit]] = [("index", "text"), *EFFECT_COLUMNS]
    tables = [
        Table("super-weights", "Super weights, by measured effect", columns, proved, EFFECT_NOTE),
        Table("spikes", f"The {SPIKES} costliest spikes of each", columns, spikes),
    ]
    text = "; ".join(
        f"{name}: {sum(f.is_super for f in index.structures)} of {len(index.structures)} structures are super"
        for name, index in members
    )
    return Section("super-weights", "Super weights", text, tables=[table for table in tables if table.rows])


def _failures(failures: list[Failure]) -> Section:
    rows = [[name, error.message, error.next_step] for name, error in failures]
    table = Table(
        "failed", "Not in the atlas", [("member", "text"), ("error", "text"), ("next", "text")], rows
    )
    return Section("failed", "What failed", tables=[table])


def atlas_catalogue(members: Named) -> dict[str, Any]:
    """Super weights in the form of the catalogue that surgeon ships, each with its measured effect.

    `models` are recognised by the digest of their config, as `published_coordinates` reads them.
    """
    sources, models = {}, []
    for name, index in members:
        calibration, weights = index.calibration, index.super_weights
        revision = f"@{index.source['revision']}" if index.source["revision"] else ""
        sources[name] = (
            f"surgeon {__version__}, {index.source['name']}{revision}, {calibration['blocks']} x "
            f"{calibration['block_size']} tokens of {calibration['name']}"
        )
        entry = {"model": index.source["name"], "shape": {}, "config_digest": index.source["config_digest"]}
        places = [[weight.layer, weight.row, weight.column] for weight in weights]
        models.append(
            {**entry, "source": name, "coordinates": places, "effects": [w.effect for w in weights]}
        )
    about = "Super weights proved by their removal: layer, row and column of down_proj, and nats per token."
    return {"about": about, "sources": sources, "models": models}


def atlas_table(members: Named) -> pyarrow.Table:
    """One row a layer of a member; the columns are in docs/files.md."""
    import pyarrow

    rows = [row for member in members for row in _rows(member, members)]
    return pyarrow.Table.from_pylist(rows, schema=_schema())


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    share, count, text = pa.float64(), pa.int64(), pa.string()
    weight = {"row": count, "column": count, "value": share, "output": share}
    effects = {"perplexity": share, "perplexity_without": share, "factor": share}
    structure = {
        "name": text,
        "kind": text,
        "super": pa.bool_(),
        "effect": share,
        "low": share,
        "high": share,
    }
    return pa.schema(
        {
            **{"member": text, "model": text, "revision": text, "parameters": count, "calibration": text},
            **{"tokens": count, "perplexity": share, "layer": count, "width": count},
            **dict.fromkeys(("lp_share_0.001", "lp_share_0.01", "lp_share_0.05"), share),
            **{"overlap_activation_power": share, "overlap_weight_norm": share},
            "supernodes": pa.list_(count),
            "supernodes_shared": pa.list_(pa.struct({"member": text, "share": share})),
            "super_weights": pa.list_(pa.struct({**weight, **effects})),
            "structures": pa.list_(pa.struct(structure)),
        }
    )


def _rows(member: tuple[str, ChannelIndex], members: Named) -> Iterable[dict[str, Any]]:
    name, index = member
    source, calibration = index.source, index.calibration
    about = {
        "member": name,
        "model": source["name"],
        "revision": source["revision"],
        "parameters": source["parameters"],
        "calibration": calibration["name"],
        "tokens": calibration["blocks"] * calibration["block_size"],
        "perplexity": index.loss["perplexity"],
    }
    alike = [other for other in members if other[1] is not index and same_shape(other[1], index)]
    for number, layer in enumerate(index.layers):
        entry = layer.summary()
        core = layer.supernodes if layer.ffns else torch.empty(0, dtype=torch.long)
        yield {
            **about,
            "layer": number,
            "width": entry["width"],
            **{f"lp_share_{key}": value for key, value in entry["lp_share"].items()},
            **{f"overlap_{key}": entry["overlap"].get(key) for key in ("activation_power", "weight_norm")},
            "supernodes": core.tolist(),
            "supernodes_shared": [
                {
                    "member": other,
                    "share": float(torch.isin(core, found.layers[number].supernodes).float().mean()),
                }
                for other, found in alike
                if len(core)
            ],
            "super_weights": [_weight(w.as_json()) for w in index.super_weights if w.layer == number],
            "structures": [
                _structure(one) for one in index.structures if one.structure.parts[0].layer == number
            ],
        }


def _structure(found: Finding) -> dict[str, Any]:
    """A measured structure, in the row of the first layer that it has a part in."""
    low, high = found.effect.as_json()
    return {
        "name": found.structure.name,
        "kind": found.structure.kind,
        "super": found.is_super,
        "effect": found.effect.mean,
        "low": low,
        "high": high,
    }


def _weight(fields: dict[str, Any]) -> dict[str, Any]:
    """A super weight's place, value and measured effect."""
    effect = fields.get("ablation") or {}
    places = {key: fields[key] for key in ("row", "column", "value", "output")}
    return {**places, **{key: effect.get(key) for key in ("perplexity", "perplexity_without", "factor")}}
