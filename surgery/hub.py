"""Checkpoints on the Hugging Face Hub, read through the cache or by byte ranges.

This module and `push` are the only ones that know the network. A revision is resolved to a commit once; everything after asks for that commit.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from surgery.checkpoint import WEIGHT_ENDINGS, Checkpoint
from surgery.errors import HubError
from surgery.sources import LocalFolder, new_buffer

Result = TypeVar("Result")
READ_TIMEOUT = 30.0  # seconds without a byte before a request counts as failed


@contextlib.contextmanager
def hub_errors(what: str, repo: str) -> Iterator[None]:
    """Turn what the Hub client raises into a HubError that says what to do next."""
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
            f"{what}: a file is neither in the cache nor to be had",
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
        # The client's transport (httpx, httpx2) has its own root of exceptions, which is not imported here.
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise
        raise HubError(
            f"{what}: the connection failed",
            where=repo,
            found=f"{type(error).__name__}: {_first_line(error)}",
            next_step="check the network and run the same command again",
        ) from error


def patiently(action: Callable[[], Result]) -> Result:
    """Run a request again after faults that pass (no connection, 429, 5xx): 4 times, 1, 2 and 4 seconds apart.

    The client retries range requests and uploads by itself, but not the listing and the small files.
    """
    for pause in (1, 2, 4):
        try:
            return action()
        except Exception as error:
            if not _passes(error):
                raise
            time.sleep(pause)
    return action()


def _passes(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return bool(status == 429 or status >= 500)
    return isinstance(error, ConnectionError) or type(error).__name__ in (
        "ConnectError",
        "ReadError",
        "ReadTimeout",
        "RemoteProtocolError",
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else ""


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


class HubRepo:
    """The files of one commit of a Hub repo, as a ByteSource.

    Small files come through the ordinary cache. Weights do too, file by file, the next one downloading while one is
    in use; with `ranges` no weight file is stored, and byte ranges are asked for instead. Headers are always read as
    ranges, so that a model can be planned or refused before anything large moves.
    """

    def __init__(self, repo: str, revision: str | None, *, ranges: bool = False) -> None:
        from huggingface_hub import HfApi, snapshot_download

        self.repo = repo
        self.ranges = ranges
        self.headers_only = True
        self.bytes_read = 0
        with hub_errors("reading the model", repo):
            sha, self.sizes = patiently(lambda: _listing(HfApi(), repo, revision))
            small = [f for f in self.sizes if not f.endswith(WEIGHT_ENDINGS)] or ["config.json"]
            # Asked for by its name, so that the cache learns which commit the name stands for and works offline.
            path = patiently(lambda: snapshot_download(repo, revision=revision, allow_patterns=small))
            self.path, self.sha = Path(path), Path(path).name
            if self.sha != sha:
                raise HubError(
                    "the revision moved while it was being read",
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
        """Relative names of all files of the commit, hidden ones left out."""
        return sorted(f for f in self.sizes if not any(part.startswith(".") for part in f.split("/")))

    def size(self, file: str) -> int:
        """Size of `file` in bytes."""
        return self.sizes[file]

    def read(self, file: str, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of `file`, from the cache, a download into it, or a range request."""
        if not file.endswith(WEIGHT_ENDINGS):
            return self._small.read(file, start, stop)
        if (self.path / file).exists():
            return self._small.read(file, start, stop)
        if self.ranges or self.headers_only:
            return self._range(file, start, stop)
        with hub_errors("downloading", self.repo):
            local = patiently(lambda: self._download(file).result())
            following = [f for f in self.files() if f.endswith(".safetensors") and f > file][:1]
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
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        buffer = new_buffer(stop - start)
        if stop == start:
            return buffer
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
        url = hf_hub_url(self.repo, file, revision=self.sha)
        with hub_errors("reading a byte range", self.repo):
            response = http_backoff("GET", url, headers=headers, timeout=READ_TIMEOUT, follow_redirects=True)
            hf_raise_for_status(response)
        content = response.content
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status_code != 206 or len(content) != stop - start or total != str(self.sizes[file]):
            raise HubError(
                "the file changed on the Hub, or the server ignores byte ranges",
                where=f"{self.repo}/{file}",
                expected=f"{stop - start} bytes of {self.sizes[file]}",
                found=f"status {response.status_code}, {len(content)} bytes of {total or 'unknown'}",
                next_step="run the command again; without --no-cache if it happens again",
            )
        self.bytes_read += len(content)
        buffer[:] = content
        return buffer


def _listing(api: Any, repo: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """Commit and file sizes of a repo; from the cache when offline."""
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        path = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        return path.name, {f: (path / f).stat().st_size for f in LocalFolder(path).files()}
    info = api.model_info(repo, revision=revision, files_metadata=True)
    return info.sha, {s.rfilename: int(s.size or 0) for s in info.siblings}


def open_hub(repo: str, revision: str | None = None, *, ranges: bool = False) -> Checkpoint:
    """Open `org/name` at a branch, tag or commit. Raises HubError or CheckpointError, before weights are read."""
    source = HubRepo(repo, revision, ranges=ranges)
    checkpoint = Checkpoint(source, repo, source.sha)
    source.headers_only = False
    return checkpoint
