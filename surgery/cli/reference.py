"""The command-line reference: `python -m surgery.cli.reference > surgery/data/cli.md` writes it."""

from __future__ import annotations

from typing import Any

import click

from surgery.cli.help import grouped_options


def reference() -> str:
    """All commands with their options, as Markdown."""
    from surgery.cli.main import main

    context = click.Context(main, info_name="surgeon")
    parts = ["# surgeon: commands and options", "Generated from the commands by `make format`."]
    for name, command in main.commands.items():
        parts.append(_command(name, command, context))
    return "\n\n".join(parts) + "\n"


def _command(name: str, command: click.Command, parent: click.Context) -> str:
    context = click.Context(command, info_name=name, parent=parent)
    arguments = [p.make_metavar(context) for p in command.params if isinstance(p, click.Argument)]
    text, _, example = (command.help or "").partition("\b\n")
    parts = [f"## surgeon {' '.join([name, *arguments])}", " ".join(text.split())]
    parts.append(f"```console\n$ {example.strip()}\n```")
    for title, options in grouped_options(command, context).items():
        rows = [_option(option) for option in options if isinstance(option, click.Option)]
        rows = [row for row in rows if row]
        if rows:
            parts.append("\n".join([f"| {title} | |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def _option(option: click.Option) -> str:
    """One row: names and value of an option, its help and its default."""
    if "--help" in option.opts:
        return ""
    names = ", ".join([*option.opts, *option.secondary_opts])
    takes = "" if option.is_flag or option.count else f" {option.metavar or _takes(option.type)}"
    words = " ".join((option.help or "").split())
    if isinstance(option.type, click.Choice) and not option.metavar:
        words = f"{words} One of {', '.join(map(str, option.type.choices))}.".strip()
    if option.show_default and "[default" not in words:
        default = (
            option.default if not isinstance(option.default, tuple) else ", ".join(map(str, option.default))
        )
        if option.is_flag and option.secondary_opts:
            default = (option.opts if option.default else option.secondary_opts)[0].lstrip("-")
        words += f" [default: {default}]"
    cells = [f"`{names}{takes}`", words]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _takes(kind: Any) -> str:
    """The placeholder for an option's value."""
    if isinstance(kind, click.Choice):
        return "NAME"
    if isinstance(kind, click.types.IntParamType):
        return "N"
    return "NUMBER" if isinstance(kind, click.types.FloatParamType) else str(kind.name).upper()


if __name__ == "__main__":
    click.echo(reference(), nl=False)
