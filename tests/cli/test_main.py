"""The command line's own manners: help, examples, completion, the generated reference."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from typing import Any

import click
import pytest
from click.testing import CliRunner
from helpers.tiny_models import ROOT

from surgery.cli.help import COMMANDS, grouped_options
from surgery.cli.main import main
from surgery.cli.reference import reference

RUN = "from surgery.cli.main import main; main(prog_name='surgeon')"


def context_of(name: str) -> click.Context:
    return click.Context(main.commands[name], info_name=name, parent=click.Context(main, info_name="surgeon"))


@pytest.mark.parametrize("name", main.commands)
def test_help_has_headings_and_an_example_that_parses(name: str) -> None:
    shown = CliRunner().invoke(main, [name, "--help"]).output
    groups = grouped_options(main.commands[name], context_of(name))
    assert "Other" not in groups
    for title, options in groups.items():
        assert f"\n{title}:\n" in shown
        for option in options:
            assert option.opts[0] in shown.partition(f"\n{title}:\n")[2]
    _, found, text = (main.commands[name].help or "").partition("\b\n")
    examples = [line.strip() for line in text.splitlines() if line.strip()]
    assert found and examples and all(example in shown for example in examples)
    for example in examples:
        words = shlex.split(example)
        assert words[:2] == ["surgeon", name]
        main.commands[name].make_context(name, words[2:])  # refuses options and values it doesn't know


def test_every_command_is_listed_once() -> None:
    listed = [name for names in COMMANDS.values() for name in names]
    assert sorted(listed) == sorted(main.commands)
    shown = CliRunner().invoke(main, ["--help"]).output
    for name in listed:
        assert f"\n  {name} " in shown
    assert not any(line.endswith("...") for line in shown.splitlines()[1:])


def test_options_of_one_name_are_spelled_alike() -> None:
    spelled: dict[str, set[tuple[str, ...]]] = {}
    for name, command in main.commands.items():
        for option in command.get_params(context_of(name)):
            if isinstance(option, click.Option) and "--help" not in option.opts:
                spelled.setdefault(option.name or "", set()).add(tuple(option.opts))
    differing = {name: ways for name, ways in spelled.items() if len(ways) > 1}
    # eval had these under their short names
    assert differing == {
        "text_blocks": {("--text-blocks",), ("--text-blocks", "--blocks")},
        "text_block_size": {("--text-block-size",), ("--text-block-size", "--block-size")},
    }


def test_the_reference_is_up_to_date() -> None:
    written = (ROOT / "surgery" / "data" / "cli.md").read_text(encoding="utf-8")
    assert written == reference(), "run `make format`"
    assert "`surgeon report`" not in written and "## surgeon report PATH..." in written


def complete(**environment: str) -> str:
    run: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
    return subprocess.run([sys.executable, "-c", RUN], env={**os.environ, **environment}, **run).stdout


def test_shells_can_complete() -> None:
    assert "_SURGEON_COMPLETE=bash_complete" in complete(_SURGEON_COMPLETE="bash_source")
    words = {"COMP_WORDS": "surgeon re", "COMP_CWORD": "1", "_SURGEON_COMPLETE": "bash_complete"}
    assert complete(**words).split() == ["plain,report"]
    words["COMP_WORDS"], words["COMP_CWORD"] = "surgeon prune model --repair lstsq", "4"
    assert complete(**words).split() == ["plain,lstsq", "plain,lstsq-acc"]


def test_help_of_every_command_imports_nothing_heavy() -> None:
    code = (
        "import sys; from surgery.cli.main import main\n"
        "for name in main.commands: main([name, '--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'jinja2', 'rich'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.splitlines()[-1] == "[]"
