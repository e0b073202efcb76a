"""Write the model card of a finished folder, and update card and manifest together."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from surgery.checkpoint.manifest import MANIFEST, dump_manifest, read_manifest
from surgery.checkpoint.output_folder import replace_text
from surgery.checkpoint.reader import Checkpoint
from surgery.errors import SurgeonWarning, UsageError


def write_card(
    folder: Path, manifest: dict[str, Any], checkpoint: Checkpoint, template: str | None = None
) -> None:
    """Write README.md, the model card, from the manifest and the card of the source `checkpoint`."""
    source_card = None
    if "README.md" in checkpoint.file_names:
        size = checkpoint.source.size("README.md")
        source_card = bytes(checkpoint.source.read("README.md", 0, size)).decode("utf-8", errors="replace")
    (folder / "README.md").write_text(_rendered(manifest, source_card, template), encoding="utf-8")


def check_template(template: str | None) -> None:
    """Raise UsageError for a card template that is not jinja2."""
    import jinja2

    try:
        jinja2.Environment().parse(template or "")
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(
            "the card template is not jinja2", where=f"--card-template, line {error.lineno}", found=str(error)
        ) from error


def _rendered(manifest: dict[str, Any], source_card: str | None, template: str | None) -> str:
    """The card; by surgeon's template where the one given fails, which must not cost a checkpoint."""
    import jinja2

    from surgery.card.render import render_card

    try:
        return render_card(manifest, source_card, template)
    except jinja2.TemplateError as error:
        if template is None:
            raise
        reason = " ".join(str(error).split())
        warnings.warn(
            SurgeonWarning(f"the card template failed ({reason}): surgeon's own is used"), stacklevel=2
        )
        return render_card(manifest, source_card)


def name_repo(folder: Path, repo: str, base_model: str | None = None) -> None:
    """Record in surgeon.json and the card of a finished folder the Hub id it is published under, and that of
    its base model where it was made from a local folder.
    """
    manifest = read_manifest(folder)
    named = {"repo": repo, **({"base_model": base_model} if base_model else {})}
    if any(manifest.get(key) != value for key, value in named.items()):
        _rewrite(folder, manifest | named)


def published_base(folder: Path) -> str | None:
    """The Hub id of the folder that a folder was made from, where it lies beside it and was published."""
    beside = folder.absolute().parent / read_manifest(folder)["source"]["name"]
    if not (beside / MANIFEST).is_file():
        return None
    found = read_manifest(beside).get("repo")
    return str(found) if found else None


def record_tasks(folder: Path, found: dict[str, Any]) -> None:
    """Add task results to surgeon.json and the card; results of other tasks stay."""
    manifest = read_manifest(folder)
    measurements = manifest.setdefault("measurements", {})
    earlier = measurements.get("tasks", {})
    merged = {key: {**earlier.get(key, {}), **found[key]} for key in ("settings", "results")}
    measurements["tasks"] = {**found, **merged}
    _rewrite(folder, manifest)


def record_bench(folder: Path, found: dict[str, Any]) -> None:
    """Put the figures of `surgeon bench` into surgeon.json and the card, in place of earlier ones."""
    manifest = read_manifest(folder)
    manifest["bench"] = found
    _rewrite(folder, manifest)


def _rewrite(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace surgeon.json and the card; the metadata in the existing card stays."""
    from surgery.card.render import render_card

    card = folder / "README.md"
    existing = card.read_text(encoding="utf-8") if card.exists() else None
    text = render_card(manifest, existing)
    replace_text(folder / MANIFEST, dump_manifest(manifest))
    replace_text(card, text)
