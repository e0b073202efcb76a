"""`surgeon report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery.commands.help import GroupedCommand
from surgery.commands.session import data_console, say
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.report.document import Section


@click.command(cls=GroupedCommand)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--index",
    "index_folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Of a pruned folder: the source's index, for what other scores would have kept.",
)
@click.option(
    "--compare",
    "comparison",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="What `surgeon compare` wrote, for loss against size.",
)
@click.option("--generate", metavar="MODEL", help="Of a pruned folder: let it and this dense model write.")
@click.option(
    "--prompt", "prompts", multiple=True, help="What they go on from; repeat for several. [default: three]"
)
@click.option("--tokens", type=click.IntRange(1), default=48, show_default=True, help="Tokens to write.")
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Page to write. [default: NAME-report.html]",
)
@click.option(
    "--figures",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Also write every figure as PNG and SVG into this folder.",
)
@click.option("--overwrite", is_flag=True, help="Replace page and figures if they exist.")
@click.option("--json", "as_json", is_flag=True, help="Print the page's numbers as JSON too.")
@click.option("--quiet", is_flag=True, help="No talk.")
def report(
    paths: tuple[Path, ...],
    index_folder: Path | None,
    comparison: Path | None,
    generate: str | None,
    prompts: tuple[str, ...],
    tokens: int,
    out: Path | None,
    figures: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """One HTML page about PATH: an index, several indexes, or a folder that `surgeon prune` wrote.

    The page needs no network. Its numbers are also written beside it, as FILE with the ending .json.

    \b
    surgeon report name-index --out name.html --figures name-figures
    """
    from surgery.destination import check_destination, check_file, complete_folder, replace_text
    from surgery.report.build import Extras, build_report
    from surgery.report.page import render_page

    page = out or Path(f"{paths[0].resolve().name}-report.html")
    if page.suffix not in (".html", ".htm"):
        raise UsageError("a report is an HTML page", where="--out", expected="FILE.html", found=page.name)
    data = page.with_suffix(".json")
    for file in (page, data):
        check_file(file, overwrite=overwrite)
    if figures is not None:
        check_destination(figures, overwrite=overwrite)
    samples = written_samples(paths, generate, prompts, tokens, quiet)
    document = build_report(list(paths), Extras(index_folder, comparison), samples)
    text = json.dumps(document.as_json(), ensure_ascii=False, allow_nan=False, indent=1)
    html = render_page(document, data.name)
    if figures is not None:
        from surgery.report.figures import save_report_figures

        with complete_folder(figures) as partial:
            names = save_report_figures(document, partial)
        say(f"{len(names)} figures written to {figures}", quiet)
    page.absolute().parent.mkdir(parents=True, exist_ok=True)
    replace_text(data, text + "\n")
    replace_text(page, html)
    if as_json:
        click.echo(text)
    say(f"Report written to {page} ({len(html.encode()) / 1e6:.2f} MB), its numbers to {data}", quiet)


def present_cut(folder: Path, as_json: bool) -> None:
    """Print what a pruned folder's surgeon.json says; as JSON, the file itself."""
    from surgery.report.build import Extras, cut_report
    from surgery.show_document import show_document

    if as_json:
        click.echo((folder / "surgeon.json").read_text(encoding="utf-8"), nl=False)
    else:
        show_document(cut_report(folder, Extras()), data_console())


def written_samples(
    paths: tuple[Path, ...], dense: str | None, prompts: tuple[str, ...], tokens: int, quiet: bool
) -> Section | None:
    """What the dense and the shrunk model write, where that was asked for."""
    if dense is None:
        if prompts:
            raise UsageError(
                "--prompt goes with --generate", next_step="name the dense model with --generate"
            )
        return None
    from surgery.prune import MANIFEST
    from surgery.report.build import is_cut, read_json
    from surgery.report.samples import PROMPTS, sample_section

    if len(paths) > 1 or not is_cut(paths[0]):
        raise UsageError("--generate goes with a folder that `surgeon prune` wrote", where=paths[0].name)
    say("Letting both models write", quiet)
    source = read_json(paths[0] / MANIFEST)["source"]
    revision = source["revision"] if source["name"] == dense else None
    return sample_section(dense, revision, paths[0], list(prompts or PROMPTS), tokens)
