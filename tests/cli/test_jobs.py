"""What `--jobs` refuses: what only this machine has, and uses that would run or keep nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgery.card.publish import published_base
from surgery.checkpoint.manifest import MANIFEST


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


def test_the_base_of_a_folder_is_looked_for_beside_it(tmp_path: Path) -> None:
    for name, text in (("cut", '{"repo": "me/cut"}'), ("packed", '{"source": {"name": "cut"}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text(text)
    assert published_base(tmp_path / "packed") == "me/cut"
    (tmp_path / "cut" / MANIFEST).write_text('{"repo": null}')
    assert published_base(tmp_path / "packed") is None
