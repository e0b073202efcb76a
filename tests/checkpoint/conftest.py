"""A loopback Hub with a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.hub_world import World
from helpers.loopback_hub import TOKEN, serving

CARD = "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [tiny]\n---\n# Tiny\n"


@pytest.fixture
def world(save_tiny: Callable[..., Path], license_text: str) -> Iterator[World]:
    """A Hub holding org/tiny, a sharded Llama with a card, and a calibration text beside it."""
    source = save_tiny("llama", shard="60KB")
    with serving() as hub:
        files = {p.name: p.read_bytes() for p in source.iterdir()} | {"README.md": CARD.encode()}
        hub.put("org/tiny", files)
        (source.parent / "text.txt").write_text(license_text)
        made = World(hub, source.parent, [])
        yield made
        written = [
            p
            for p in made.folder.rglob("*")
            if p.is_file() and "home" not in p.relative_to(made.folder).parts[0]
        ]
        leaked = [p for p in written if TOKEN.encode() in p.read_bytes()]
        leaked += [f for repo in hub.repos for f, data in hub.files(repo).items() if TOKEN.encode() in data]
        assert not leaked and not any(TOKEN in text for text in made.outputs), leaked
