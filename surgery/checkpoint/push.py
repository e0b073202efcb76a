"""Publish an output folder on the Hub: check permissions, upload large files, then make one commit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.checkpoint.file_roles import INDEX_FILE, SINGLE_FILE, left_behind
from surgery.checkpoint.hub import hub_errors, patiently
from surgery.checkpoint.manifest import MANIFEST
from surgery.checkpoint.refusals import parse_json
from surgery.checkpoint.source import LocalFolder
from surgery.errors import HubError


@dataclass(frozen=True)
class PushTarget:
    """Where and how to publish.

    `revision` is a branch to create or extend; `create_pr` opens a pull request; `overwrite` permits a repo
    that surgeon did not write. `repo_type` is "model", or "dataset" for an index.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    overwrite: bool = False
    repo_type: str = "model"

    @property
    def own_file(self) -> str:
        """The file that shows that surgeon wrote a repo of this type."""
        return MANIFEST if self.repo_type == "model" else "index.json"


@dataclass
class PushReport:
    """Result of a push: the URL of its commit or pull request, and file name -> size in bytes."""

    url: str
    files: dict[str, int] = field(default_factory=dict)


def account_name() -> str:
    """Name of the token's account. Raises HubError without a valid token."""
    from huggingface_hub import HfApi

    with hub_errors("checking the token", "the Hub"):
        return str(HfApi().whoami()["name"])


def check_push(target: PushTarget) -> None:
    """Raise HubError unless the token may write to the target repo and overwriting it is permitted.

    Call it before a long computation.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors("checking the token", target.repo):
        who = api.whoami()
        token = (who.get("auth") or {}).get("accessToken") or {}
        owners = {who["name"], *(org["name"] for org in who.get("orgs", []))}
        if token.get("role") == "read":
            raise HubError(
                "the token may only read",
                where=target.repo,
                expected="a token with write access",
                next_step="create one on the Hub's token page and set HF_TOKEN",
            )
        owner = target.repo.partition("/")[0]
        if "/" not in target.repo or (owner not in owners and not target.create_pr):
            raise HubError(
                "this account can't write there",
                where=target.repo,
                expected=f"{' or '.join(sorted(owners))}/NAME",
                next_step="name a repo of your own, or open a pull request with --create-pr",
            )
        existing = _existing_files(api, target)
    others = existing - {".gitattributes", "README.md"}
    if others and target.own_file not in existing and not target.overwrite:
        raise HubError(
            "the repo exists and was not written by surgeon",
            where=target.repo,
            found=", ".join(sorted(existing)[:3]),
            next_step="name another repo, or give --overwrite",
        )


def _existing_files(api: Any, target: PushTarget) -> set[str]:
    from huggingface_hub import errors

    try:
        return set(api.list_repo_files(target.repo, revision=target.revision, repo_type=target.repo_type))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        return set()


def pushed_files(folder: Path) -> dict[str, int]:
    """File -> bytes of the files of an output folder that belong to its model.

    Other weights put beside them (a GGUF file, an optimizer's state) are not pushed.
    """
    sizes = {name: (folder / name).stat().st_size for name in LocalFolder(folder).files()}
    own = {SINGLE_FILE}
    if SINGLE_FILE not in sizes and INDEX_FILE in sizes:
        content = parse_json(INDEX_FILE, (folder / INDEX_FILE).read_bytes())
        own = {INDEX_FILE, *content.get("weight_map", {}).values()}
    behind = set(left_behind(sizes, own))
    return {name: size for name, size in sizes.items() if name not in behind}


def push_folder(
    folder: Path, target: PushTarget, message: str, say: Callable[[str], None] = lambda _: None
) -> PushReport:
    """Publish an output folder in one commit; `say` gets progress messages.

    Large files are uploaded first and are not visible. The commit then publishes all files at once and
    deletes files that the folder no longer has. Files that do not
    belong to the model are not pushed. After an interruption, another call uploads only what is
    missing. Raises HubError.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_push(target)
    api = HfApi()
    sizes = {name: (folder / name).stat().st_size for name in LocalFolder(folder).files()}
    report = PushReport("", pushed_files(folder) if target.repo_type == "model" else sizes)
    kind = target.repo_type
    names = list(report.files)
    with hub_errors("pushing", target.repo):
        patiently(
            lambda: api.create_repo(
                target.repo, private=target.private or None, exist_ok=True, repo_type=kind
            )
        )
        if target.revision is not None and not target.create_pr:
            branch = target.revision
            patiently(lambda: api.create_branch(target.repo, branch=branch, exist_ok=True, repo_type=kind))
        stale = patiently(lambda: _existing_files(api, target)) - set(names) - {".gitattributes"}
        additions = [CommitOperationAdd(name, folder / name) for name in names]
        say(f"Uploading {len(names)} files, {sum(report.files.values()) / 2**20:,.0f} MiB, to {target.repo}")
        # Uploads the large files; the commit then refers to them by hash.
        patiently(
            lambda: api.preupload_lfs_files(
                target.repo,
                additions,
                revision=target.revision,
                create_pr=target.create_pr or None,
                free_memory=False,
                repo_type=kind,
            )
        )
        commit = api.create_commit(
            target.repo,
            [*additions, *(CommitOperationDelete(name) for name in sorted(stale))],
            commit_message=message,
            revision=target.revision,
            create_pr=target.create_pr or None,
            repo_type=kind,
        )
    report.url = str(commit.pr_url or commit.commit_url)
    return report
