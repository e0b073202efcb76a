"""Publish an output folder on the Hub: check permissions, upload large files, then make one commit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from surgery.checkpoint.file_roles import INDEX_FILE, SINGLE_FILE, left_behind
from surgery.checkpoint.hub import hub_errors, patiently
from surgery.checkpoint.manifest import MANIFEST, read_manifest
from surgery.checkpoint.refusals import parse_json
from surgery.checkpoint.source import LocalFolder
from surgery.errors import HubError

ADAPTER_FILE = "adapter_model.safetensors"
OTHERS = (".gitattributes", ".eval_results/")  # what others may have put into a repo stays

RepoType = Literal["model", "dataset"]


@dataclass(frozen=True)
class PushTarget:
    """Where and how to publish.

    `revision` is a branch to create or extend; `create_pr` opens a pull request; `overwrite` permits a repo
    that surgeon did not write. `collection` is the title or the slug of a Collection to put the repo into.
    `repo_type` is "model", or "dataset" for an index.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    overwrite: bool = False
    collection: str | None = None
    repo_type: RepoType = "model"

    @property
    def own_file(self) -> str:
        """The file that shows that surgeon wrote a repo of this type."""
        return MANIFEST if self.repo_type == "model" else "index.json"


@dataclass
class PushReport:
    """Result of a push: the URL of its commit or pull request, that of the collection where one was named,
    and file name -> size in bytes.
    """

    url: str
    collection: str | None = None
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

    Other weights put beside them (an optimizer's state, a GGUF file beside a checkpoint) are not pushed.
    """
    sizes = {name: (folder / name).stat().st_size for name in LocalFolder(folder).files()}
    own = _own_weights(folder, set(sizes))
    behind = set(left_behind(sizes, own))
    return {name: size for name, size in sizes.items() if name not in behind}


def _own_weights(folder: Path, files: set[str]) -> set[str]:
    """The weight files of a folder: those of its checkpoint, its adapter, or its GGUF file."""
    manifest = read_manifest(folder) if MANIFEST in files else {}
    if "gguf" in manifest:
        return {manifest["gguf"]["file"]}
    if "adapter" in manifest:
        return {ADAPTER_FILE}
    if SINGLE_FILE not in files and INDEX_FILE in files:
        content = parse_json(INDEX_FILE, (folder / INDEX_FILE).read_bytes())
        return {INDEX_FILE, *content.get("weight_map", {}).values()}
    return {SINGLE_FILE}


def push_folder(
    folder: Path,
    target: PushTarget,
    message: str,
    say: Callable[[str], None] = lambda _: None,
    *,
    beside: dict[str, bytes] | None = None,
) -> PushReport:
    """Publish an output folder in one commit; `say` gets progress messages, `beside` are files of the repo
    that the folder does not hold.

    Large files are uploaded first and are not visible. The commit then publishes all files at once and
    deletes files that the folder no longer has. Files that do not
    belong to the model are not pushed. After an interruption, another call uploads only what is
    missing. Raises HubError.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_push(target)
    api = HfApi()
    sizes = {name: (folder / name).stat().st_size for name in LocalFolder(folder).files()}
    report = PushReport("", files=pushed_files(folder) if target.repo_type == "model" else sizes)
    kind = target.repo_type
    names = list(report.files)
    report.files |= {name: len(content) for name, content in (beside or {}).items()}
    with hub_errors("pushing", target.repo):
        patiently(
            lambda: api.create_repo(
                target.repo, private=target.private or None, exist_ok=True, repo_type=kind
            )
        )
        if target.revision is not None and not target.create_pr:
            branch = target.revision
            patiently(lambda: api.create_branch(target.repo, branch=branch, exist_ok=True, repo_type=kind))
        existing = patiently(lambda: _existing_files(api, target))
        stale = {name for name in existing - set(report.files) if not name.startswith(OTHERS)}
        additions = [CommitOperationAdd(name, folder / name) for name in names]
        additions += [CommitOperationAdd(name, content) for name, content in (beside or {}).items()]
        size = sum(report.files.values()) / 2**20
        say(f"Uploading {len(additions)} files, {size:,.0f} MiB, to {target.repo}")
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
    if target.collection is not None:
        report.collection = add_to_collection(
            target.repo, target.collection, private=target.private, repo_type=kind
        )
    return report


def add_to_collection(
    repo: str, collection: str, *, private: bool = False, repo_type: RepoType = "model"
) -> str:
    """Put a published repo into a collection of its account, made when missing; returns the URL.

    `collection` is its title, or its slug as ACCOUNT/TITLE-ID, which the Hub's pages show. Raises HubError.
    """
    from huggingface_hub import HfApi

    api, owner = HfApi(), repo.partition("/")[0]
    with hub_errors("adding to the collection", collection):
        if "/" in collection:
            slug = collection
        else:
            titled = [one for one in api.list_collections(owner=owner) if one.title == collection]
            slug = titled[0].slug if titled else _new_collection(api, collection, owner, private)
        patiently(lambda: api.add_collection_item(slug, item_id=repo, item_type=repo_type, exists_ok=True))
        return str(api.get_collection(slug).url)


def _new_collection(api: Any, title: str, owner: str, private: bool) -> str:
    """The slug of a new collection; not tried again, which could make a second one."""
    made = api.create_collection(title=title, namespace=owner, private=private, exists_ok=True)
    return str(made.slug)
