"""`surgeon push` and `surgeon card`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from surgery.checkpoint.manifest import read_manifest
from surgery.cli.common import read_template, say
from surgery.cli.help import GroupedCommand
from surgery.cli.options import PATH, PushOptions, push_options


@click.command(cls=GroupedCommand)
@click.argument("folder", metavar="DIR", type=PATH)
@click.argument("repo")
@push_options
@click.option(
    "--base-model",
    metavar="REPO",
    help="Repo of what DIR was made from, for the card. [default: the source on the Hub, or where the folder "
    "it was made from was pushed to]",
)
@click.option("--overwrite", is_flag=True, help="Replace a repo that surgeon did not write.")
@click.option("--dry-run", is_flag=True, help="Print files, sizes and the card; publish nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="Suppress messages.")
def push(
    folder: Path,
    repo: str,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    push_options: PushOptions,
    base_model: str | None,
) -> None:
    """Publish the finished folder DIR to the Hub repo REPO, in one commit, after verification.

    A folder of `surgeon index` becomes a data set, for --index and `surgeon find`. A packed or GGUF form of a
    model belongs into a repo of its own; a collection ties them.

    \b
    surgeon push smaller me/smaller --collection Smaller
    surgeon push smaller-int4 me/smaller-int4 --collection Smaller
    """
    from surgery.card.eval_results import eval_results
    from surgery.card.publish import name_repo, published_base
    from surgery.checkpoint.push import push_folder, pushed_files

    if (folder / "index.json").exists():
        push_index_folder(folder, repo, push_options, overwrite, dry_run, as_json, quiet)
        return
    manifest = read_manifest(folder)
    beside = eval_results(manifest)
    if dry_run:
        sizes = pushed_files(folder) | {name: len(content) for name, content in beside.items()}
        if as_json:
            click.echo(json.dumps({"repo": repo, "files": sizes}))
            return
        show_files(sizes, repo)
        click.echo((folder / "README.md").read_text(encoding="utf-8"), nl=False)
        return
    target = push_options.target(repo, overwrite)
    verify(folder, manifest)
    if "adapter" not in manifest:
        base = base_model or published_base(folder)
        name_repo(folder, repo, base)
        if base is None and "/" not in manifest["source"]["name"]:
            say("The card names no base model: give it with --base-model", quiet)
    report = push_folder(
        folder,
        target,
        f"Upload {folder.name} with surgeon",
        lambda text: say(text, quiet),
        beside=beside,
    )
    if as_json:
        fields = {"url": report.url, "collection": report.collection, "files": report.files}
        click.echo(json.dumps(fields))
        return
    click.echo(report.url)
    if report.collection is not None:
        say(f"In the collection {report.collection}", quiet)


def verify(folder: Path, manifest: dict[str, Any]) -> None:
    """Check a folder by what it holds before it is published: a checkpoint loads, a GGUF file or an adapter
    is whole. Raises CheckpointError.
    """
    from surgery.adapt.peft_folder import read_adapter
    from surgery.checkpoint.gguf_file import GgufFile
    from surgery.pruning.verify import verify_folder
    from surgery.quantize.compressed_tensors import check_packed_loads

    if "gguf" in manifest:
        GgufFile(folder / Path(manifest["gguf"]["file"]).name)
    elif "adapter" in manifest:
        read_adapter(folder)
    elif manifest.get("quantization", {}).get("packed"):
        check_packed_loads(folder)
    else:
        verify_folder(folder)


def push_index_folder(
    folder: Path,
    repo: str,
    options: PushOptions,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Publish an index folder, or print the files and the card that this would publish."""
    import tempfile

    from surgery.card.index_dataset import card_of, check_publishable, push_index, write_index_dataset
    from surgery.engine.open_model import open_checkpoint
    from surgery.index.channel_index import ChannelIndex

    index = ChannelIndex.load(folder)
    source = index.source
    check_publishable(source["name"], source["revision"])
    target = None if dry_run else options.target(repo, overwrite, "dataset")
    model_card = card_of(open_checkpoint(source["name"], revision=source["revision"], range_reads=True))
    if target is not None:
        report = push_index(index, target, model_card, lambda text: say(text, quiet))
        fields = {"url": report.url, "files": report.files}
        click.echo(json.dumps(fields) if as_json else report.url)
        return
    with tempfile.TemporaryDirectory(prefix="surgeon-index-") as name:
        write_index_dataset(index, Path(name), repo, model_card)
        sizes = {path.name: path.stat().st_size for path in sorted(Path(name).iterdir())}
        card_text = (Path(name) / "README.md").read_text(encoding="utf-8")
    if as_json:
        click.echo(json.dumps({"repo": repo, "files": sizes}))
        return
    show_files(sizes, repo)
    click.echo(card_text, nl=False)


def show_files(sizes: dict[str, int], repo: str) -> None:
    """Print the files that would be published, with their sizes in bytes."""
    for name, size in sizes.items():
        click.echo(f"{size:>14,}  {name}")
    click.echo(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files, to {repo}\n")


@click.command(cls=GroupedCommand)
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--card-template", type=PATH, help="jinja2 template to use in place of surgeon's.")
@click.option("--stdout", is_flag=True, help="Print the card; write nothing.")
def card(folder: Path, card_template: Path | None, stdout: bool) -> None:
    """Write the model card of DIR again, from its surgeon.json.

    \b
    surgeon card smaller --stdout
    """
    from surgery.card.render import render_card

    manifest = read_manifest(folder)
    existing = folder / "README.md"
    source_card = existing.read_text(encoding="utf-8") if existing.exists() else None
    text = render_card(manifest, source_card, read_template(card_template))
    if stdout:
        click.echo(text, nl=False)
    else:
        existing.write_text(text, encoding="utf-8")
        say(f"Card written to {existing}", False)
