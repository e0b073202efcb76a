"""An index as a data set on the Hub: the folder that is pushed, and the published indexes of a model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.card.index_card import CHANNELS_FILE, KEY, TAG, model_tag, render_index_card
from surgery.checkpoint.hub_dataset import tagged_datasets
from surgery.checkpoint.push import PushReport, PushTarget, push_folder
from surgery.checkpoint.reader import Checkpoint
from surgery.errors import IndexMismatchError
from surgery.index.channel_index import ChannelIndex, FfnIndex
from surgery.index.intervals import published_intervals

if TYPE_CHECKING:
    import pyarrow


def check_publishable(name: str, revision: str | None) -> None:
    """Raise IndexMismatchError unless a model has a commit that others can compare theirs with."""
    if not revision or "/" not in name:
        raise IndexMismatchError(
            "an index is published for a commit of a model on the Hub",
            where=name,
            found="a model without one",
            next_step="index it by its Hub id, as org/name",
        )


def push_index(
    index: ChannelIndex,
    target: PushTarget,
    source_card: str | None,
    say: Callable[[str], None] = lambda _: None,
) -> PushReport:
    """Publish an index as a data set, in one commit. Raises IndexMismatchError and HubError.

    `source_card` is the README.md of the indexed model, for its license.
    """
    source = index.source
    check_publishable(source["name"], source["revision"])
    with tempfile.TemporaryDirectory(prefix="surgeon-index-") as folder:
        write_index_dataset(index, Path(folder), target.repo, source_card)
        return push_folder(Path(folder), target, f"Index of {source['name']} at {source['revision']}", say)


def write_index_dataset(index: ChannelIndex, folder: Path, repo: str, source_card: str | None = None) -> None:
    """Write the files of the data set `repo` into a folder: the index, its channels as Parquet, its card."""
    from pyarrow import parquet

    index.save_published(folder, *published_intervals(index))
    table = channel_table(index)
    parquet.write_table(table, folder / CHANNELS_FILE, compression="zstd")
    columns = [name for name in table.column_names if name not in FIXED]
    card = render_index_card(index, repo, columns, source_card)
    (folder / "README.md").write_text(card, encoding="utf-8")


FIXED = ("layer", "ffn", "channel", "supernode", "halo")


def channel_table(index: ChannelIndex) -> pyarrow.Table:
    """One row a channel: its place, whether it is a supernode or in the halo, and its statistics."""
    import pyarrow

    return pyarrow.concat_tables(
        _rows(number, name, ffn)
        for number, layer in enumerate(index.layers)
        for name, ffn in layer.ffns.items()
    )


def _rows(layer: int, name: str, ffn: FfnIndex) -> pyarrow.Table:
    import pyarrow
    import torch

    def marked(members: torch.Tensor) -> Any:
        return torch.zeros(ffn.width, dtype=torch.bool).index_fill(0, members, True).numpy()

    columns = {
        "layer": pyarrow.array([layer] * ffn.width, pyarrow.int32()),
        "ffn": pyarrow.array([name] * ffn.width, pyarrow.string()),
        "channel": pyarrow.array(range(ffn.width), pyarrow.int32()),
        "supernode": marked(ffn.supernodes),
        "halo": marked(ffn.halo),
        **{key: value.float().numpy() for key, value in ffn.statistics.items()},
    }
    return pyarrow.table(columns)


def card_of(checkpoint: Checkpoint) -> str | None:
    """The README.md of a model; None for one without."""
    if "README.md" not in checkpoint.file_names:
        return None
    size = checkpoint.source.size("README.md")
    return bytes(checkpoint.source.read("README.md", 0, size)).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class PublishedIndex:
    """A published index: the data set with its commit and date, and what its card says it was made from."""

    repo: str
    revision: str
    changed: str
    private: bool
    commit: str
    calibration: str
    tokens: int
    dtype: str
    second_order: bool
    super_weights: int

    def as_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def find_indexes(model: str) -> list[PublishedIndex]:
    """The published indexes of the model `org/name`, the last changed first. Raises HubError.

    Found by the tags of their cards; a card that does not say what `surgeon index` writes is passed over.
    """
    found = []
    for data_set in tagged_datasets([TAG, model_tag(model)]):
        stated = data_set.card.get(KEY)
        if not isinstance(stated, dict) or stated.get("model") != model:
            continue
        found.append(
            PublishedIndex(
                repo=data_set.repo,
                revision=data_set.commit,
                changed=data_set.changed,
                private=data_set.private,
                commit=str(stated.get("commit", "")),
                calibration=str(stated.get("calibration", "")),
                tokens=int(stated.get("tokens") or 0),
                dtype=str(stated.get("dtype", "")),
                second_order=bool(stated.get("second_order")),
                super_weights=int(stated.get("super_weights") or 0),
            )
        )
    return found
