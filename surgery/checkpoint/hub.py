"""Checkpoints on the Hugging Face Hub, read through the local cache or by byte ranges.

Only this module and `push` use the network. A revision is resolved to a commit once; all later requests name
that commit.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from surgery.checkpoint.file_roles import INDEX_FILE, left_behind
from surgery.checkpoint.plain import as_plain
from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.source import LocalFolder, new_buffer
from surgery.errors import HubError

Result = TypeVar("Result")
READ_TIMEOUT = 30.0  # seconds without data before a request fails


@contextlib.contextmanager
def hub_errors(what: str, repo: str) -> Iterator[None]:
    """Raise HubError, with a next step, for errors of the Hub client; `what` is the operation on `repo`."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.LocalTokenNotFoundError as error:
        raise HubError(
            f"{what}: no token", where=repo, next_step="log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    except errors.GatedRepoError as error:
        raise HubError(
            f"{what}: the repo is gated and this account has no access",
            where=repo,
            next_step=f"ask for access at {_endpoint()}/{repo} and log in with `hf auth login`",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{what}: no such repo, or a private one this account can't see",
            where=repo,
            next_step="check the spelling, or log in with `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{what}: no such revision", where=repo, next_step="name a branch, tag or commit that exists"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.EntryNotFoundError) as error:
        if constants.HF_HUB_OFFLINE:
            raise HubError(
                f"{what}: offline mode is on and this is not in the cache",
                where=repo,
                next_step="unset HF_HUB_OFFLINE once to fetch it",
            ) from error
        raise HubError(
            f"{what}: a file is not in the cache and can't be downloaded",
            where=repo,
            found=_first_line(error),
            next_step="check the network and run the same command again",
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        step = {
            401: "log in with `hf auth login`, or set HF_TOKEN",
            403: "use a token that may do this (write access for a push)",
        }
        raise HubError(
            f"{what}: the Hub answered {status}",
            where=repo,
            found=_first_line(error),
            next_step=step.get(status or 0, "try again later"),
        ) from error
    except (OSError, RuntimeError) as error:
        if isinstance(error, HubError):
            raise
        raise HubError(
            f"{what}: no answer from the Hub",
            where=repo,
            found=f"{type(error).__name__}: {_first_line(error)}",
            next_step="check the network and run the same command again",
        ) from error
    except Exception as error:
        # The client's transport (httpx, httpx2) has its own exception hierarchy, which is not imported here.
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise
        raise HubError(
            f"{what}: the connection failed",
            where=repo,
            found=f"{type(error).__name__}: {_first_line(error)}",
            next_step="check the network and run the same command again",
        ) from error


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Without the Hub client's progress bars, which for small files only fill a log."""
    from huggingface_hub import utils

    shown = not utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()


def patiently(action: Callable[[], Result]) -> Result:
    """Retry a request after transient errors (no connection, 429, 5xx): 4 attempts, 1, 2 and 4 seconds apart.

    The client itself retries range requests and uploads, but not the listing and the small files.
    """
    for pause in (1, 2, 4):
        try:
            return action()
        except Exception as error:
            if not _is_transient(error):
                raise
            time.sleep(pause)
    return action()


def _is_transient(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return bool(status == 429 or status >= 500)
    return isinstance(error, ConnectionError) or type(error).__name__ in (
        "ConnectError",
        "ConnectTimeout",
        "PoolTimeout",
        "ReadError",
        "ReadTimeout",
        "RemoteProtocolError",
        "WriteError",
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else ""


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


class HubRepo:
    """The files of one commit of a Hub repo, as a ByteSource.

    Small files are downloaded into the Hub cache. So are weight files, one by one; the next is downloaded
    while one is in use. With `ranges` weights are read by byte-range requests and not stored. While
    `headers_only` is true, weight files are always read by ranges, so that a model can be checked before
    anything large is downloaded. Raises HubError.
    """

    def __init__(self, repo: str, revision: str | None, *, ranges: bool = False) -> None:
        from huggingface_hub import HfApi, snapshot_download

        self.repo = repo
        self.ranges = ranges
        self.headers_only = True
        self.weight_files: list[str] = []  # of the checkpoint, once that is known: the next is fetched early
        with hub_errors("reading the model", repo):
            sha, self.sizes = patiently(lambda: _listing(HfApi(), repo, revision))
            # All that is no weight of any kind, but for the weight map, which says which weights count.
            behind = set(left_behind(self.sizes, [INDEX_FILE]))
            small = [f for f in self.sizes if f not in behind] or ["config.json"]
            self.small = set(small)
            # Requested by revision name, so that the cache records its commit and works offline.
            with no_bars():
                path = patiently(lambda: snapshot_download(repo, revision=revision, allow_patterns=small))
            self.path, self.sha = Path(path), Path(path).name
            if self.sha != sha:
                raise HubError(
                    "the revision changed while it was being read",
                    where=repo,
                    expected=sha,
                    found=self.sha,
                    next_step="run the command again",
                )
        self._small = LocalFolder(self.path)
        self._downloads: dict[str, Future[str]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="surgeon-download")
        self._lock = threading.Lock()

    def files(self) -> list[str]:
        """Relative names of all files of the commit, without hidden ones."""
        return sorted(f for f in self.sizes if not any(part.startswith(".") for part in f.split("/")))

    def size(self, file: str) -> int:
        """Size of `file` in bytes."""
        return self.sizes[file]

    def read(self, file: str, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of `file`, from the cache, a download or a range request. Raises HubError."""
        if file in self.small:
            return self._small.read(file, start, stop)
        if (self.path / file).exists():
            return self._small.read(file, start, stop)
        if self.ranges or self.headers_only:
            return self._range(file, start, stop)
        with hub_errors("downloading", self.repo):
            local = patiently(lambda: self._download(file).result())
            following = [f for f in self.weight_files if f > file][:1]
            for name in following:
                self._download(name)
        return LocalFolder(Path(local).parent).read(Path(local).name, start, stop)

    def _download(self, file: str) -> Future[str]:
        from huggingface_hub import hf_hub_download

        with self._lock:
            known = self._downloads.get(file)
            if known is None or (known.done() and known.exception() is not None):
                self._downloads[file] = self._pool.submit(hf_hub_download, self.repo, file, revision=self.sha)
            return self._downloads[file]

    def _range(self, file: str, start: int, stop: int) -> memoryview:
        return read_range(self.repo, file, self.sha, start, stop, self.sizes[file])


def read_range(
    repo: str, file: str, commit: str, start: int, stop: int, size: int, repo_type: str = "model"
) -> memoryview:
    """Bytes [start, stop) of a file of `size` bytes at a commit, by one request. Raises HubError."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    buffer = new_buffer(stop - start)
    if stop == start:
        return buffer
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
    url = hf_hub_url(repo, file, revision=commit, repo_type=repo_type)
    with hub_errors("reading a byte range", repo):
        response = http_backoff("GET", url, headers=headers, timeout=READ_TIMEOUT, follow_redirects=True)
        hf_raise_for_status(response)
    content = response.content
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    if response.status_code != 206 or len(content) != stop - start or total != str(size):
        raise HubError(
            "the file changed on the Hub, or the server ignores byte ranges",
            where=f"{repo}/{file}",
            expected=f"{stop - start} bytes of {size}",
            found=f"status {response.status_code}, {len(content)} bytes of {total or 'unknown'}",
            next_step="run the command again; without --range-reads if it happens again",
        )
    buffer[:] = content
    return buffer


def _listing(api: Any, repo: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """(Commit, file name -> size in bytes) of a repo; from the cache when offline."""
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        path = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        return path.name, {f: (path / f).stat().st_size for f in LocalFolder(path).files()}
    info = api.model_info(repo, revision=revision, files_metadata=True)
    return info.sha, {s.rfilename: int(s.size or 0) for s in info.siblings}


def open_hub(
    repo: str, revision: str | None = None, *, ranges: bool = False, dtype: torch.dtype | None = None
) -> Checkpoint:
    """Open `org/name` at a branch, tag or commit; reads no weights.

    Quantised weights are dequantised to `dtype`. Raises HubError or CheckpointError.
    """
    source = HubRepo(repo, revision, ranges=ranges)
    checkpoint = as_plain(Checkpoint(source, repo, source.sha, quantised=True), dtype)
    source.headers_only, source.weight_files = False, checkpoint.weight_files
    return checkpoint
