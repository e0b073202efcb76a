"""Build the document of a report from one index, several indexes, or a folder of `surgeon prune`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery import __version__
from surgery.checkpoint.manifest import MANIFEST
from surgery.errors import ReportError
from surgery.index.channel_index import JSON_FILE, ChannelIndex
from surgery.index.open_index import open_index
from surgery.report.channels import channel_sections, index_facts
from surgery.report.comparison import comparison_section
from surgery.report.document import Document, Section
from surgery.report.healed import heal_sections
from surgery.report.pruned import provenance_section, pruned_sections
from surgery.report.revisions import revision_sections
from surgery.report.spikes import spike_sections


@dataclass(frozen=True)
class Extras:
    """What adds sections to a report of the same model: an index, also on the Hub, and a comparison."""

    index: str | Path | None = None
    comparison: Path | None = None


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint that surgeon wrote, pruned or quantised."""
    return (folder / MANIFEST).exists()


def index_folders(folders: list[Path]) -> list[Path]:
    """Index folders: folders that are indexes, and the indexes directly inside the other folders.

    Those inside are sorted by modification time, so that revisions indexed in turn come in the order of
    training.
    """
    found: list[Path] = []
    for folder in folders:
        inside = sorted(folder.glob(f"*/{JSON_FILE}"), key=lambda path: path.stat().st_mtime_ns)
        is_index = (folder / JSON_FILE).exists()
        found += [folder] if is_index or not inside else [path.parent for path in inside]
    return found


def named_indexes(paths: list[Path]) -> list[tuple[str, ChannelIndex]]:
    """(Name, index) of index folders, of the indexes in other folders, and of data sets on the Hub."""
    return [(path.name, open_index(path)) for path in index_folders(paths)]


def build_report(paths: list[Path], extras: Extras, samples: Section | None = None) -> Document:
    """The document of one index, several indexes or one pruned folder; ReportError for anything else."""
    if any(is_checkpoint(path) for path in paths):
        if len(paths) > 1:
            raise ReportError(
                "one pruned folder at a time", found=f"{len(paths)} folders", next_step="run report on each"
            )
        return pruned_report(paths[0], extras, samples)
    if extras.index is not None:
        raise ReportError("--index goes with a folder that `surgeon prune` wrote", where=paths[0].name)
    indexes = named_indexes(paths)
    if len(indexes) > 1:
        if extras.comparison is not None:
            raise ReportError("--compare goes with one index or one pruned folder")
        return indexes_report(indexes)
    return index_report(indexes[0][1], extras)


def index_report(index: ChannelIndex, extras: Extras) -> Document:
    """The document of one index."""
    source, calibration = index.source, index.calibration
    sections = [
        Section("model", "Model and calibration", facts=index_facts(index)),
        *channel_sections(index),
        *spike_sections(index),
        *comparison_sections(extras.comparison, source),
    ]
    subtitle = (
        f"Importance of its FFN channels and single weights, measured on {calibration['blocks']:,} × "
        f"{calibration['block_size']:,} tokens of {calibration['name']}"
    )
    return Document("index", name_and_revision(source), subtitle, __version__, sections)


def indexes_report(indexes: list[tuple[str, ChannelIndex]]) -> Document:
    """The document of several indexes, in the order given."""
    models = list(dict.fromkeys(index.source["name"] for _, index in indexes))
    title = models[0] if len(models) == 1 else f"{len(models)} models"
    subtitle = f"{len(indexes)} indexes side by side: {', '.join(name for name, _ in indexes)}"
    return Document("indexes", title, subtitle, __version__, revision_sections(indexes))


def pruned_report(folder: Path, extras: Extras, samples: Section | None = None) -> Document:
    """The document of a folder that `surgeon prune` wrote."""
    manifest = read_json(folder / MANIFEST)
    if "plan" not in manifest:
        raise ReportError(
            "this checkpoint was not pruned",
            where=folder.name,
            found="a quantised one" if "quantization" in manifest else f"a {MANIFEST} without a plan",
            next_step="name an index, or a folder that `surgeon prune` wrote",
        )
    index = None
    if extras.index is not None:
        index = open_index(extras.index)
        check_same(index.source, manifest["source"], Path(extras.index))
    sections = pruned_sections(manifest, index)
    sections += heal_sections(manifest)
    sections += comparison_sections(extras.comparison, manifest["source"])
    sections += [samples] if samples is not None else []
    sections.append(provenance_section(manifest))
    if index is not None:
        sections += [*channel_sections(index), *spike_sections(index)]
    plan = manifest["plan"]
    subtitle = (
        f"{name_and_revision(manifest['source'])} with {100 * plan['sparsity']:.0f}% of its FFN channels "
        f"removed, chosen by {plan['method']}, repair {plan.get('repair', 'none')}"
    )
    return Document("cut", folder.resolve().name, subtitle, __version__, sections)


def comparison_sections(folder: Path | None, source: dict[str, Any]) -> list[Section]:
    """Perplexity against size from the folder that `surgeon compare` wrote, nothing without one.

    Raises ReportError for a comparison of another model.
    """
    if folder is None:
        return []
    fields = read_json(folder / "compare.json")
    check_same(fields["source"], source, folder)
    return [comparison_section(fields["rows"])]


def check_same(one: dict[str, Any], other: dict[str, Any], folder: Path) -> None:
    """Raise ReportError unless two sources have tensors of the same names and shapes, and not two commits."""
    if one["shape_digest"] != other["shape_digest"]:
        raise ReportError(
            "these belong to different models", where=folder.name, expected=other["name"], found=one["name"]
        )
    if one["revision"] and other["revision"] and one["revision"] != other["revision"]:
        raise ReportError(
            "these belong to different commits of the model",
            where=folder.name,
            expected=name_and_revision(other),
            found=name_and_revision(one),
        )


def name_and_revision(source: dict[str, Any]) -> str:
    """A model's name, with its revision if it has one."""
    return f"{source['name']} at {source['revision']}" if source["revision"] else str(source["name"])


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file. Raises ReportError when it can't be read."""
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(
            f"no readable {path.name}", where=path.parent.name, found=type(error).__name__
        ) from error
    return fields
