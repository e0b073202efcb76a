"""Mutated checkpoints: every command ends in success or in one line, and leaves nothing behind.

SURGEON_FUZZ=2000 runs that many mutations instead of a few; SURGEON_FUZZ_SEED begins at another one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from helpers.tiny_models import CALIBRATION, byte_tokenizer, tiny_model

from surgery.cli.main import main

COUNT = int(os.environ.get("SURGEON_FUZZ", "16"))
FIRST = int(os.environ.get("SURGEON_FUZZ_SEED", "0"))
VALUES: list[Any] = [
    None,
    "",
    "x",
    -1,
    0,
    1,
    3,
    10**12,
    1.5,
    True,
    [],
    {},
    [1],
    {"a": 1},
    "NaN",
    "../x",
    [None],
]
CARD = "---\nlicense: llama3.1\nlanguage:\n- en\n- no\ntags: [a, b]\n---\n# Tiny\n"
SMALL = {"num_hidden_layers": 2, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A dense model in one file, a sharded one, and a mixture of experts."""
    root = tmp_path_factory.mktemp("sources")
    made = []
    for name, family, shard in (
        ("dense", "llama", None),
        ("shards", "qwen3", "40KB"),
        ("experts", "qwen3_moe", None),
    ):
        folder = root / name
        model = tiny_model(family, **SMALL)
        model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
        byte_tokenizer().save_pretrained(folder)
        (folder / "generation_config.json").write_text('{"max_length": 20, "do_sample": false}')
        (folder / "README.md").write_text(CARD)
        made.append(folder)
    return made


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values in parsed JSON."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutate_json(text: str, draw: random.Random) -> str:
    """Parsed JSON with one value replaced, removed or renamed."""
    content = json.loads(text)
    found = list(places(content))[:400]
    *path, key = draw.choice(found)
    inner = content
    for step in path:
        inner = inner[step]
    kind = draw.randrange(4)
    if kind == 0 or isinstance(inner, list):
        inner[key] = draw.choice(VALUES)
    elif kind == 1:
        del inner[key]
    elif kind == 2:
        inner[f"{key}x"] = inner.pop(key)
    else:
        inner[key] = inner[draw.choice(list(inner))]
    return json.dumps(content)


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """The data with some bytes changed, put in or cut off, mostly near its start."""
    at = draw.randrange(max(1, min(len(data), draw.choice([16, 600, len(data) or 1]))))
    kind = draw.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9))) + data[at:]
    if kind == 2:
        return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
    return data[:at] + data[at + draw.randrange(1, 40) :] if kind == 3 else b""


def mutate_header(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header has one value changed."""
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(data[8 : 8 + length].decode(), draw).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def mutate(folder: Path, draw: random.Random) -> str:
    """Change one file of a checkpoint; returns what was changed."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"]
    known = [path for path in files if path.suffix in (".json", ".md", ".jinja")]
    path = draw.choice([folder / "config.json"] * 6 + known * 2 + weights)
    data = path.read_bytes()
    if draw.randrange(30) == 0:
        path.unlink()
        return f"{path.name} deleted"
    try:
        if path.suffix == ".json" and draw.randrange(4):
            path.write_text(mutate_json(data.decode(), draw))
            return path.name
        if path.suffix == ".safetensors" and draw.randrange(3):
            path.write_bytes(mutate_header(data, draw))
            return path.name
    except ValueError:  # an earlier mutation of the same file
        pass
    path.write_bytes(mutate_bytes(data, draw))
    return path.name


def outcome(result: Result) -> str:
    """Why a result is neither success nor one line; empty where it is."""
    if result.exit_code == 0:
        return ""
    if not isinstance(result.exception, SystemExit):
        return f"traceback: {result.exception!r}"
    shown = [line for line in result.stderr.splitlines() if line.startswith(("Error:", "Usage:"))]
    after = result.stderr[result.stderr.find("Error:") :].strip().splitlines()
    if len(shown) != 1 or len(after) > 2:
        return f"not one line: {result.stderr[-500:]}"
    return ""


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_a_mutated_checkpoint_ends_in_success_or_one_line(
    seed: int,
    sources: list[Path],
    tmp_path: Path,
    license_text: str,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    draw = random.Random(seed)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(draw.choice(sources), "m")
    Path("text.txt").write_text(license_text)
    changed = [mutate(Path("m"), draw) for _ in range(draw.choice([1, 1, 1, 2]))]
    options = [*CALIBRATION[:2], "--blocks", "2", "--block-size", "16"]
    cut = ["--multiple-of", "8", "--repair", draw.choice(["none", "lstsq"]), *options]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = CliRunner().invoke(main, ["prune", "m", "--dry-run", *cut])
        done = CliRunner().invoke(main, ["prune", "m", "--out", "cut", *cut])
    record_property("changed", changed)
    for result in (plan, done):
        assert outcome(result) == "", f"{changed}: {outcome(result)}"
    assert (plan.exit_code == 0) == (done.exit_code == 0), f"{changed}: {plan.stderr}{done.stderr}"
    left = sorted(path.name for path in tmp_path.iterdir())
    journals = [name for name in left if name.startswith(".")]
    assert not journals, f"{changed}: {left}"
    assert ("cut" in left) == (done.exit_code == 0)
