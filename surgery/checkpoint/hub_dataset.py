"""Data sets on the Hub: one as a ByteSource, and a search for those with a tag."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.hub import hub_errors, no_bars, patiently, read_range
from surgery.checkpoint.source import LocalFolder
from surgery.errors import HubError


class HubDataset:
    """The files of one commit of a Hub data set, as a ByteSource.

    Files named in `whole` are downloaded into the Hub cache; of others only the byte ranges asked for are
    read, and not stored. In offline mode all files come from the cache. Raises HubError.
    """

    def __init__(self, repo: str, revision: str | None, whole: list[str], what: str) -> None:
        from huggingface_hub import HfApi, constants, snapshot_download

        self.repo = repo
        with hub_errors(what, f"datasets/{repo}"):
            if constants.HF_HUB_OFFLINE:
                cached = snapshot_download(repo, repo_type="dataset", revision=revision)
                self.path, self.sizes = Path(cached), {}
                self.sha = self.path.name
                self.sizes = {f: (self.path / f).stat().st_size for f in LocalFolder(self.path).files()}
                return
            info: Any = patiently(lambda: HfApi().dataset_info(repo, revision=revision, files_metadata=True))
            self.sha = str(info.sha)
            self.sizes = {s.rfilename: int(s.size or 0) for s in info.siblings}
            with no_bars():
                self.path = Path(
                    patiently(
                        lambda: snapshot_download(
                            repo, repo_type="dataset", revision=self.sha, allow_patterns=whole
                        )
                    )
                )

    def files(self) -> list[str]:
        """Relative names of all files of the commit."""
        return sorted(self.sizes)

    def size(self, file: str) -> int:
        """Size of `file` in bytes. Raises HubError for a file that the data set lacks."""
        from huggingface_hub import constants

        if file not in self.sizes and constants.HF_HUB_OFFLINE:
            raise HubError(
                "offline mode is on and this is not in the cache",
                where=f"datasets/{self.repo}",
                expected=file,
                next_step=f"unset HF_HUB_OFFLINE, or once: hf download --repo-type dataset {self.repo}",
            )
        if file not in self.sizes:
            raise HubError(
                "the data set lacks a file",
                where=f"{self.repo} at {self.sha}",
                expected=file,
                found=", ".join(self.files()[:4]),
                next_step="name a data set that `surgeon index --push` wrote",
            )
        return self.sizes[file]

    def read(self, file: str, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of `file`, from the cache or by a range request. Raises HubError."""
        size = self.size(file)
        if (self.path / file).exists():
            return LocalFolder(self.path).read(file, start, stop)
        return read_range(self.repo, file, self.sha, start, stop, size, "dataset")


def holds_file(repo: str, revision: str | None, file: str) -> bool:
    """Whether a Hub data set exists and holds a file. Raises HubError."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        return isinstance(try_to_load_from_cache(repo, file, revision=revision, repo_type="dataset"), str)
    with hub_errors("looking for an index", f"datasets/{repo}"):
        return bool(
            patiently(lambda: HfApi().file_exists(repo, file, repo_type="dataset", revision=revision))
        )


@dataclass(frozen=True)
class FoundDataset:
    """A data set of a search: its id, commit, time of its last change (ISO 8601), and its card's metadata."""

    repo: str
    commit: str
    changed: str
    private: bool
    card: dict[str, Any]


def tagged_datasets(tags: list[str]) -> Iterator[FoundDataset]:
    """Data sets whose cards have all of `tags`, the last changed first. Raises HubError."""
    from huggingface_hub import HfApi

    with hub_errors("searching the Hub", " ".join(tags)):
        found = patiently(lambda: list(HfApi().list_datasets(filter=tags, sort="last_modified", full=True)))
    for info in sorted(found, key=lambda i: str(i.last_modified), reverse=True):
        card = info.card_data.to_dict() if info.card_data is not None else {}
        changed = info.last_modified.isoformat() if info.last_modified else ""
        yield FoundDataset(info.id, info.sha or "", changed, bool(info.private), card)
