"""The atlas: many indexes in one page and one table, whatever their models' shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from surgery import __version__
from surgery.errors import SurgeonError
from surgery.index.channel_index import ChannelIndex
from surgery.report.document import Document, Section, Table
from surgery.report.revisions import Named, revision_sections, same_shape

if TYPE_CHECKING:
    import pyarrow

Failure = tuple[str, SurgeonError]


def atlas_document(members: Named, failures: list[Failure]) -> Document:
    """The page: models and texts, concentration, shared supernodes, super weights, and what failed."""
    table, concentration, _ = revision_sections(members)
    sections = [table, concentration, *_shared(members), _super_weights(members)]
    if failures:
        sections.append(_failures(failures))
    models = dict.fromkeys(index.source["name"] for _, index in members)
    subtitle = f"{len(members)} indexes of {len(models)} models: {', '.join(models)}"
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


def _super_weights(members: Named) -> Section:
    rows: list[list[Any]] = []
    for name, index in members:
        for weight in (entry.as_json() for entry in index.super_weights):
            effect = weight.get("ablation") or {}
            place = f"{weight['layer']} [{weight['row']}, {weight['column']}]"
            found = [effect.get(key) for key in ("perplexity", "perplexity_without", "factor")]
            rows.append([name, place, weight["value"], weight["output"], *found])
    columns = [
        ("index", "text"),
        ("layer [row, column]", "text"),
        ("value", "number"),
        ("output of the FFN", "number"),
        ("perplexity", "number"),
        ("without it", "number"),
        ("times", "number"),
    ]
    note = "Perplexity on the first calibration blocks of each index; empty where it was not measured."
    without = [name for name, index in members if not index.super_weights]
    text = f"None in {', '.join(without)}." if without else ""
    table = Table("super-weights", "Super weights and their effects", columns, rows, note)  # type: ignore[arg-type]
    return Section("super-weights", "Super weights", text, tables=[table] if rows else [])


def _failures(failures: list[Failure]) -> Section:
    rows = [[name, error.message, error.next_step] for name, error in failures]
    table = Table(
        "failed", "Not in the atlas", [("member", "text"), ("error", "text"), ("next", "text")], rows
    )
    return Section("failed", "What failed", tables=[table])


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
    return pa.schema(
        {
            **{"member": text, "model": text, "revision": text, "parameters": count, "calibration": text},
            **{"tokens": count, "perplexity": share, "layer": count, "width": count},
            **dict.fromkeys(("lp_share_0.001", "lp_share_0.01", "lp_share_0.05"), share),
            **{"overlap_activation_power": share, "overlap_weight_norm": share},
            "supernodes": pa.list_(count),
            "supernodes_shared": pa.list_(pa.struct({"member": text, "share": share})),
            "super_weights": pa.list_(pa.struct({**weight, **effects})),
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
        }


def _weight(fields: dict[str, Any]) -> dict[str, Any]:
    """A super weight's place, value and measured effect."""
    effect = fields.get("ablation") or {}
    places = {key: fields[key] for key in ("row", "column", "value", "output")}
    return {**places, **{key: effect.get(key) for key in ("perplexity", "perplexity_without", "factor")}}
