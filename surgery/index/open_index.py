"""open_index: an index in a folder, or published on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from surgery.checkpoint.hub_dataset import HubDataset, holds_file
from surgery.index.channel_index import JSON_FILE, ChannelIndex

PUBLISHED = re.compile(
    r"(?:hf://datasets/|https?://(?:huggingface\.co|hf\.co)/datasets/)?"
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+)|/tree/(?P<tree>[\w.-]+))?/?"
)


def open_index(source: str | Path) -> ChannelIndex:
    """The index in a folder, or in the Hub data set `org/name-index`, at `@revision` where that is given.

    A folder of this name goes before a data set. Of a data set, statistics are read by byte ranges when they
    are first asked for; its commit is in `ChannelIndex.published`. Raises IndexMismatchError for what is not
    an index, HubError for a failed request.
    """
    address = published_address(source)
    if address is None:
        return ChannelIndex.load(source)
    repo, revision = address
    data_set = HubDataset(repo, revision, [JSON_FILE], "reading the index")
    index = ChannelIndex.read(data_set, repo, lazily=True)
    index.published = {"repo": repo, "revision": data_set.sha}
    return index


def is_index(source: str | Path) -> bool:
    """Whether `source` is an index folder, or a Hub data set that holds an index. Raises HubError."""
    path = Path(source).expanduser()
    if path.exists():
        return (path / JSON_FILE).exists()
    address = published_address(source)
    return address is not None and holds_file(*address, JSON_FILE)


def published_address(source: str | Path) -> tuple[str, str | None] | None:
    """(Data set, revision or None) that `source` names; None for a folder, and for what can only be one."""
    text = str(source).replace("hf:/datasets", "hf://datasets").replace("https:/h", "https://h")
    if Path(source).expanduser().exists():
        return None
    found = PUBLISHED.fullmatch(text)
    return None if found is None else (found["repo"], found["revision"] or found["tree"])
