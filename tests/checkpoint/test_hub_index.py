"""An index published on a loopback Hub: written, found, used by byte ranges, refused for another commit."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.hub_world import World
from helpers.loopback_hub import Repo
from helpers.tiny_models import CALIBRATION

INDEX = ["index", "org/tiny", "--quiet", *CALIBRATION]
CUT = [
    "--method",
    "lp-hybrid",
    "--sparsity",
    "0.5",
    "--multiple-of",
    "8",
    "--eval",
    "none",
    "--repair",
    "none",
    "--quiet",
]


def kept(folder: Path) -> list[list[int]]:
    """The channels that a pruned folder keeps, by layer."""
    layers = json.loads((folder / "surgeon.json").read_text())["plan"]["layers"]
    return [layer["kept"] for layer in layers]


def header_of(files: dict[str, bytes]) -> tuple[int, dict[str, Any]]:
    """Length and content of the header of index.safetensors."""
    data = files["index.safetensors"]
    length = int.from_bytes(data[:8], "little")
    return length, json.loads(data[8 : 8 + length])


def header_bytes(files: dict[str, bytes]) -> int:
    """Bytes that reading the header takes: the start of the file, then the header itself."""
    return 64 + header_of(files)[0]


def stored(files: dict[str, bytes], last_word: str) -> int:
    """Bytes of all tensors whose names end in a word."""
    _, header = header_of(files)
    spans = [entry["data_offsets"] for name, entry in header.items() if name.rpartition(".")[2] == last_word]
    return sum(stop - start for start, stop in spans)


ROUND = ["quantize", "org/tiny", "--out", "int8", "--per-channel", "--simulate", "--no-clip", "--quiet"]


def test_an_index_is_published_found_used_and_refused(world: World) -> None:
    hub = world.hub
    made = world.several(
        [*INDEX, "--save-samples", "--out", "own", "--push", "me/tiny-index"],
        ["prune", "org/tiny", "--index", "own", "--out", "from-folder", *CUT],
        ["find", "org/tiny", "--json"],
        ["find", "org/other", "--json"],
        ["prune", "org/tiny", "--index", "me/tiny-index", "--out", "from-hub", *CUT],
    )
    assert [result["code"] for result in made] == [0, 0, 0, 0, 0], made
    served = dict(hub.bytes_out)
    files, commit = hub.files("me/tiny-index"), hub.repos["me/tiny-index"].branches["main"]
    source = hub.repos["org/tiny"].branches["main"]
    assert set(files) == {"README.md", "channels.parquet", "index.json", "index.safetensors"}
    assert hub.repos["me/tiny-index"].dataset and (world.folder / "own" / "sample.safetensors").exists()

    card = files["README.md"].decode()
    fields = yaml.safe_load(card.split("---\n")[1])
    assert fields["license"] == "apache-2.0" and fields["base_model"] == "org/tiny"
    assert {"surgeon", "surgeon-index", "base_model:org/tiny"} == set(fields["tags"])
    assert fields["configs"] == [
        {"config_name": "channels", "data_files": "channels.parquet", "default": True}
    ]
    assert "No intervals: they need" in card and "None was found." in card
    assert source in card and "4 blocks of 32 tokens" in card and "me/tiny-index@COMMIT" in card
    index = json.loads(files["index.json"])
    rows = (
        pytest.importorskip("pyarrow.parquet").read_table(io.BytesIO(files["channels.parquet"])).to_pylist()
    )
    for number, layer in enumerate(index["layers"]):
        own = [row for row in rows if row["layer"] == number]
        assert [row["channel"] for row in own] == list(range(layer["width"]))
        assert [row["channel"] for row in own if row["supernode"]] == layer["supernodes"]
        assert sum(row["halo"] for row in own) == layer["halo"]["channels"]

    (found,) = json.loads(made[2]["stdout"])
    assert (found["repo"], found["revision"], found["commit"]) == ("me/tiny-index", commit, source)
    assert (found["tokens"], found["second_order"]) == (128, False)
    assert json.loads(made[3]["stdout"]) == []

    assert kept(world.folder / "from-hub") == kept(world.folder / "from-folder")
    manifest = json.loads((world.folder / "from-hub" / "surgeon.json").read_text())
    assert manifest["index"] == {"repo": "me/tiny-index", "revision": commit}
    assert f"--index me/tiny-index@{commit}" in manifest["command"]
    needed = ("input_ids", "range", "loss_proxy", "activation_power", "weight_range")
    assert served["index.safetensors"] == header_bytes(files) + sum(stored(files, word) for word in needed)
    assert served["index.json"] == len(files["index.json"]) and "channels.parquet" not in served

    # Another commit of the model, and repos that are no index.
    hub.put("org/tiny", {**hub.files("org/tiny"), "README.md": b"# changed\n"})
    hub.repos["me/gated-index"] = Repo(gated=True)
    hub.put("me/gated-index", {"index.json": b"{}"})
    hub.put("me/empty-index", {"README.md": b""})
    hub.put("me/theirs", {"data.csv": b"precious"})
    (world.folder / "local").mkdir()
    for file, data in hub.files("org/tiny").items():
        (world.folder / "local" / file).write_bytes(data)
    prune = ["prune", "org/tiny", "--out", "cut", *CUT, "--index"]
    cases = [
        ([*prune, "me/tiny-index"], f"with --revision {source}"),
        ([*prune, "me/gated-index"], "/datasets/me/gated-index"),
        ([*prune, "me/missing-index"], "no such repo"),
        ([*prune, "me/empty-index"], "the data set lacks a file"),
        ([*prune, "me/tiny-index@nope"], "no such revision"),
        ([*INDEX, "--out", "b", "--push", "me/theirs"], "was not written by surgeon"),
        (["index", "local", "--out", "c", "--push", "me/x-index", *CALIBRATION], "by its Hub id"),
        (["push", "own", "them/x-index"], "can't write there"),
    ]
    results = world.several(
        *(words for words, _ in cases),
        ["prune", "org/tiny", "--revision", source, "--out", "old", *CUT, "--index", "me/tiny-index"],
        ["prune", "local", "--out", "cut-local", *CUT, "--index", "me/tiny-index"],
        ["show", f"me/tiny-index@{commit}", "--json"],
        ["report", "me/tiny-index", "--out", "page.html", "--quiet"],
        [*ROUND, "--revision", source, "--index", "me/tiny-index"],
        ["export", "org/tiny", "--gguf", "--out", "f16", "--revision", source, "--index", "me/tiny-index"],
    )
    for (words, message), result in zip(cases, results, strict=False):
        assert result["code"] == 1 and message in result["stderr"], (words, result)
    used = results[len(cases) :]
    assert [result["code"] for result in used] == [0] * 6, used
    assert used[1]["stderr"].count("names no commit") == 1
    assert json.loads(used[2]["stdout"]) == index
    manifest = json.loads((world.folder / "int8" / "surgeon.json").read_text())
    assert manifest["index"] == {"repo": "me/tiny-index", "revision": commit}
    exported = json.loads((world.folder / "f16" / "surgeon.json").read_text())["super_weights"]
    assert exported == index["super_weights"]
    assert hub.files("me/theirs") == {"data.csv": b"precious"}

    hub.repos["me/tiny-index"].private = True
    hidden = world.several(["show", "me/tiny-index"], ["find", "org/tiny"], HF_TOKEN="")
    assert "no such repo, or a private one" in hidden[0]["stderr"]
    assert "No published index of org/tiny" in hidden[1]["stderr"]
