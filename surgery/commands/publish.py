"""`surgeon push` and `surgeon card`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from surgery.commands.help import GroupedCommand
from surgery.commands.options import push_options
from surgery.commands.session import read_template, say
from surgery.errors import CheckpointError


@click.command(cls=GroupedCommand)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo")
@push_options
@click.option("--overwrite", is_flag=True, help="Replace a repo that surgeon did not write.")
@click.option("--dry-run", is_flag=True, help="Print files, sizes and the card; touch nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No talk.")
def push(
    folder: Path,
    repo: str,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Publish the finished folder DIR to the Hub repo REPO, in one commit, after the load gate.

    \b
    surgeon push smaller me/smaller
    """
    from surgery.gate import check_folder
    from surgery.packing import check_packed_loads
    from surgery.prune import name_repo
    from surgery.push import PushTarget, check_push, push_folder
    from surgery.sources import LocalFolder

    manifest = read_manifest(folder)
    if dry_run:
        sizes = {name: (folder / name).stat().st_size for name in LocalFolder(folder).files()}
        if as_json:
            click.echo(json.dumps({"repo": repo, "files": sizes}))
            return
        for name, size in sizes.items():
            click.echo(f"{size:>14,}  {name}")
        click.echo(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files, to {repo}\n")
        click.echo((folder / "README.md").read_text(encoding="utf-8"), nl=False)
        return
    target = PushTarget(repo, options["private"], options["push_revision"], options["create_pr"], overwrite)
    check_push(target)
    if manifest.get("quantization", {}).get("packed"):
        check_packed_loads(folder)
    else:
        check_folder(folder)
    name_repo(folder, repo)
    report = push_folder(folder, target, f"Upload {folder.name} with surgeon", lambda text: say(text, quiet))
    if as_json:
        click.echo(json.dumps({"url": report.url, "files": report.files}))
    else:
        click.echo(report.url)


@click.command(cls=GroupedCommand)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--card-template", type=click.Path(path_type=Path), help="jinja2 text to use instead.")
@click.option("--stdout", is_flag=True, help="Print the card; write nothing.")
def card(folder: Path, card_template: Path | None, stdout: bool) -> None:
    """(Re)write the model card of DIR from its surgeon.json.

    \b
    surgeon card smaller --stdout
    """
    from cards import render_card

    manifest = read_manifest(folder)
    existing = folder / "README.md"
    source_card = existing.read_text(encoding="utf-8") if existing.exists() else None
    text = render_card(manifest, source_card, read_template(card_template))
    if stdout:
        click.echo(text, nl=False)
    else:
        existing.write_text(text, encoding="utf-8")
        say(f"Card written to {existing}", False)


def read_manifest(folder: Path) -> dict[str, Any]:
    """surgeon.json of a folder. Raises CheckpointError when there is none."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "surgeon.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "no readable surgeon.json",
            where=folder.name,
            found=str(error).partition(":")[0],
            next_step="name a folder that `surgeon prune` wrote",
        ) from error
    return manifest
