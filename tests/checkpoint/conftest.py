"""A loopback Hub with a tiny model."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.hub_world import World
from helpers.loopback_hub import TOKEN, serving

CARD = "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [tiny]\n---\n# Tiny\n"


@pytest.fixture(scope="session")
def hub_port() -> int:
    """A port for the Hubs of all tests, so that a process that is prepared for one can serve them all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def world(
    save_tiny: Callable[..., Path],
    license_text: str,
    hub_port: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    """A Hub holding org/tiny, a sharded Llama with a card, and a calibration text beside it."""
    source = save_tiny("llama", shard="60KB")
    home = tmp_path_factory.getbasetemp() / "hub-home"
    home.unlink(missing_ok=True)
    home.symlink_to(source.parent / "home")
    (source.parent / "home").mkdir()
    with serving(hub_port) as hub:
        files = {p.name: p.read_bytes() for p in source.iterdir()} | {"README.md": CARD.encode()}
        hub.put("org/tiny", files)
        (source.parent / "text.txt").write_text(license_text)
        made = World(hub, source.parent, home, [])
        yield made
        written = [
            p
            for p in made.folder.rglob("*")
            if p.is_file() and "home" not in p.relative_to(made.folder).parts[0]
        ]
        leaked = [p for p in written if TOKEN.encode() in p.read_bytes()]
        leaked += [f for repo in hub.repos for f, data in hub.files(repo).items() if TOKEN.encode() in data]
        assert not leaked and not any(TOKEN in text for text in made.outputs), leaked
