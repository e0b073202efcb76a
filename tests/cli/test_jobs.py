"""What `--jobs` refuses: what only this machine has, and uses that would run or keep nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from surgery.card.publish import published_base
from surgery.checkpoint.manifest import MANIFEST
from surgery.cli.prune import prune
from surgery.cli.prune_jobs import JobOptions, job_command
from surgery.errors import UsageError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dry-run", "--jobs"), "local model"),
        (("--jobs",), "--dry-run --jobs"),
        (("--dry-run", "--bucket", "me/runs"), "--bucket is for jobs"),
        (("--dry-run", "--jobs", "--bucket", "runs"), "ACCOUNT/NAME"),
    ],
)
def test_what_a_job_can_not_do_is_refused(
    options: tuple[str, ...], message: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    save_tiny("llama")
    before = sorted(Path.cwd().iterdir())
    assert message in surgeon("prune", "tiny", "--intermediate-size", "24", *options, code=2).stderr
    assert sorted(Path.cwd().iterdir()) == before


def command_of(*options: str) -> tuple[list[str], list[str]]:
    """Words and volumes of the job that `surgeon prune org/tiny` with these options is turned into."""
    model: Any = SimpleNamespace(folder=None, name="org/tiny", checkpoint=SimpleNamespace(revision="abc"))
    with prune.make_context("prune", ["org/tiny", "--sparsity", "0.5", *options]) as context:
        return job_command(context, model, JobOptions(jobs=True, bucket=None))


def test_a_local_index_is_mounted_and_a_published_one_is_named(tmp_path: Path) -> None:
    words, volumes = command_of("--index", "me/tiny-index@v1")
    assert words[words.index("--index") + 1] == "me/tiny-index@v1" and not volumes
    words, volumes = command_of("--index", str(tmp_path))
    assert words[words.index("--index") + 1] == "/surgeon/index"
    assert volumes == [f"{tmp_path.as_posix()}:/surgeon/index"]


@pytest.mark.parametrize(
    "options", [("--calibration",), ("--eval",), ("--keep-vocabulary", "9000", "--vocabulary-text")]
)
def test_a_text_of_this_machine_is_refused(options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(UsageError, match="can't see a local file"):
        command_of(*options, str(tmp_path / "text.txt"))


def test_the_base_of_a_folder_is_looked_for_beside_it(tmp_path: Path) -> None:
    for name, text in (("cut", '{"repo": "me/cut"}'), ("packed", '{"source": {"name": "cut"}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text(text)
    assert published_base(tmp_path / "packed") == "me/cut"
    (tmp_path / "cut" / MANIFEST).write_text('{"repo": null}')
    assert published_base(tmp_path / "packed") is None
