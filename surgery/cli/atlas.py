"""`surgeon atlas`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.checkpoint.output_folder import complete_folder, replace_text
from surgery.cli.common import calibrate_for, discard_journal, local_path, make_index, say
from surgery.cli.help import GroupedCommand
from surgery.cli.options import (
    PATH,
    CalibrationOptions,
    ModelOptions,
    calibration_options,
    model_options,
    talk_options,
)
from surgery.errors import SurgeonError, UsageError

if TYPE_CHECKING:
    from surgery.index.channel_index import ChannelIndex
    from surgery.report.atlas import Failure
    from surgery.report.revisions import Named

SETTINGS = "settings.json"


@click.command(cls=GroupedCommand)
@click.argument("members", metavar="MEMBER...", nargs=-1, required=True)
@calibration_options
@click.option(
    "--out", type=PATH, default=Path("atlas"), show_default=True, help="Folder to write or go on with."
)
@model_options
@talk_options
def atlas(
    members: tuple[str, ...],
    text_options: CalibrationOptions,
    out: Path,
    how: ModelOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare many models in one page and one table: concentration, shared supernodes, super weights.

    MEMBER is a model (also ORG/NAME@REVISION), an index folder, or a published index. Models are indexed into
    --out; another run goes on where one ended and keeps their indexes. What fails is listed.

    \b
    surgeon atlas org/name@step1000 org/name me/other-index --out name-atlas
    """
    if how.revision:
        raise UsageError("a revision goes with its member here", next_step="write it as ORG/NAME@REVISION")
    if len(set(members)) < len(members):
        raise UsageError("a member is named twice")
    settings = {
        "calibration": text_options.words,
        "blocks": text_options.blocks,
        "block_size": text_options.block_size,
        "seed": text_options.seed,
        "dtype": how.dtype,
    }
    go_on(out, settings)
    found: Named = []
    failures: list[Failure] = []
    for number, member in enumerate(members):
        say(f"{number + 1} of {len(members)}: {member}", quiet)
        try:
            found.append((member, member_index(member, out, text_options, how, quiet)))
        except SurgeonError as error:
            say(f"Left out: {error.message}", quiet)
            failures.append((member, error))
    if found:
        write_atlas(out, found, failures, as_json)
        say(f"Page and table written to {out}", quiet)
    if failures:
        raise SurgeonError(
            f"{len(failures)} of {len(members)} members failed",
            found="; ".join(f"{name}: {error.message}" for name, error in failures),
            next_step=failures[0][1].next_step + " and run the same command again"
            if failures[0][1].next_step
            else "run the same command again",
        )


def go_on(out: Path, settings: dict[str, Any]) -> None:
    """Start an atlas, or check that the one in the folder was made with the same settings."""
    file = out / SETTINGS
    text = json.dumps(settings, indent=1) + "\n"
    if out.exists() and not file.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("the folder is no atlas", where=str(out), next_step="name another with --out")
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise UsageError(
            "the atlas was made with other settings",
            where=str(out),
            expected=" ".join(file.read_text(encoding="utf-8").split()),
            found=" ".join(text.split()),
            next_step="name another folder with --out, or give the same calibration options",
        )
    out.mkdir(parents=True, exist_ok=True)
    replace_text(file, text)


def member_index(
    member: str, out: Path, text: CalibrationOptions, how: ModelOptions, quiet: bool
) -> ChannelIndex:
    """The index of a member: read where it is one, kept from an earlier run, or made now."""
    from surgery.index.channel_index import JSON_FILE, ChannelIndex
    from surgery.index.open_index import is_index, open_index

    if is_index(member):
        return open_index(member)
    local = local_path(member) or Path(member).expanduser().exists()
    name, _, revision = (member, "", "") if local else member.partition("@")
    model = replace(how, revision=(revision,) if revision else ()).open(name)
    folder = out / "indexes" / slug(member)
    if (folder / JSON_FILE).exists():
        index = ChannelIndex.load(folder)
        index.check_source(model.checkpoint)
        return index
    index = make_index(model, calibrate_for(model, text), destination=folder, quiet=quiet)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with complete_folder(folder) as partial:
        index.save(partial)
    discard_journal(folder)
    return index


def slug(member: str) -> str:
    """A folder name for a member: its Hub id and revision, or its path from here."""
    return "--".join(part for part in Path(member).parts if part not in ("/", "..", "."))


def write_atlas(out: Path, found: Named, failures: list[Failure], as_json: bool) -> None:
    """Write page, numbers, tables and catalogue into the folder, each complete or as it was."""
    from pyarrow import parquet

    from surgery.report.atlas import atlas_catalogue, atlas_document, atlas_table
    from surgery.report.markdown import markdown_tables
    from surgery.report.page import render_page

    document = atlas_document(found, failures)
    numbers = json.dumps(document.as_json(), ensure_ascii=False, allow_nan=False, indent=1)
    page = render_page(document, "atlas.json")
    partial = out / ".atlas.parquet"
    parquet.write_table(atlas_table(found), partial, compression="zstd")
    partial.replace(out / "atlas.parquet")
    replace_text(out / "atlas.json", numbers + "\n")
    replace_text(out / "atlas.html", page)
    replace_text(out / "atlas.md", markdown_tables(document))
    replace_text(out / "super_weights.json", json.dumps(atlas_catalogue(found), indent=1) + "\n")
    if as_json:
        click.echo(numbers)
