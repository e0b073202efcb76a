"""What the tests of reports share: a page read back, an index without a model, a browser."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.index.channel_index import STATISTICS, ChannelIndex, FfnIndex, LayerIndex
from surgery.index.super_weights import SuperWeight
from surgery.index.supernodes import supernodes

WEIGHT = SuperWeight(
    layer=1,
    row=3,
    column=7,
    value=-0.6055,
    input=-443.5,
    output=300.5,
    explained=0.8936,
    ratio=5000.0,
    rank=1,
    token=0,
    persistence=0.75,
    published="Some-8B: a paper",
    catalogue="match",
    ablation={"perplexity": 6.5, "perplexity_without": 1234.5, "factor": 190.0, "tokens": 4096},
)


class Page(HTMLParser):
    """Elements of a page with their attributes, and the text of its scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[tuple[str, dict[str, str | None], str]] = []
        self.words: list[str] = []
        self.inside = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag in ("script", "style")
        if self.inside:
            self.inline.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            tag, attributes, text = self.inline[-1]
            self.inline[-1] = (tag, attributes, text + data)
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        """What a reader sees."""
        return " ".join(" ".join(self.words).split())

    @property
    def data(self) -> dict[str, Any]:
        """What the charts are drawn from."""
        texts = [text for tag, attributes, text in self.inline if attributes.get("id") == "report-data"]
        found: dict[str, Any] = json.loads("".join(texts))
        return found


def synthetic_index(layers: int, width: int, name: str = "org/large") -> ChannelIndex:
    """An index of random statistics, heavy-tailed as real ones are, with one super weight."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(layers):
        values = {s: torch.randn(width, generator=generator).mul(2).exp() for s in STATISTICS}
        values["halo_connectivity"] = torch.rand(width, generator=generator)
        core = supernodes(values["loss_proxy"])
        made.append(LayerIndex({"dense": FfnIndex(values, core, 64)}, {"input": 12.5, "output": 345.0}))
    digest = "0" * 64
    return ChannelIndex(
        source={
            "name": name,
            "revision": None,
            "model_type": "llama",
            "config_digest": digest,
            "shape_digest": digest,
            "parameters": 8_030_261_248,
            "bytes": 16_060_522_496,
        },
        calibration={"name": "t", "blocks": 2, "block_size": 32, "tokens": 64, "sha256": digest, "seed": 1},
        run={"device": "cpu", "dtype": "float32", "versions": {"surgeon": "0"}},
        loss={"nats": 62.0, "tokens": 62, "perplexity": 2.718},
        layers=made,
        super_weights=[WEIGHT],
        echoes=[],
        input_ids=torch.zeros(2, 32, dtype=torch.int32),
    )


def save_index(index: ChannelIndex, folder: Path) -> None:
    folder.mkdir()
    index.save(folder)


def figure(fields: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [f for s in fields["sections"] for f in s["figures"] if f["id"] == name]
    return dict(found)


def table(fields: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [t for s in fields["sections"] for t in s["tables"] if t["id"] == name]
    return dict(found)


def heights(fields: dict[str, Any], name: str, series: str) -> list[float]:
    """The y values of one line of a figure, by layer."""
    (line,) = [s for s in figure(fields, name)["series"] if s["name"] == series]
    assert [x for x, _ in line["points"]] == list(range(len(line["points"])))
    return [y for _, y in line["points"]]


def browser() -> str:
    """A Chromium that can run headless, or skip."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("no Chromium here to open the page with")
