"""open_model: open a folder, a Hub id or a GGUF file as a Model, the input of every operation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from surgery.checkpoint.gguf import GgufCheckpoint
from surgery.checkpoint.hub import open_hub
from surgery.checkpoint.plain import as_plain
from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.refusals import no_folder
from surgery.checkpoint.source import LocalFolder
from surgery.engine.run_options import DTYPE_OPTIONS, RunOptions, check_dtype
from surgery.errors import UsageError
from surgery.model.meta_model import MetaModel

HUB_ADDRESS = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://(?:models/)?)(?P<id>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>[\w./-]+)|/(?:tree|blob)/(?P<tree>[\w.-]+)(?:/.*)?)?/?(?:\?.*)?"
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass
class Model:
    """A checkpoint and its run options. The transformers model is built once, on first use."""

    checkpoint: Checkpoint
    run: RunOptions

    @cached_property
    def meta_model(self) -> MetaModel:
        """The model on the meta device. Raises UnsupportedModelError for a model that surgeon can't index."""
        return MetaModel(self.checkpoint, self.run.dtype)

    @property
    def name(self) -> str:
        """The folder's name or the Hub id."""
        return self.checkpoint.name

    @property
    def short_name(self) -> str:
        """The name without the account; default output folders are named after it."""
        return self.name.split("/")[-1]

    @property
    def folder(self) -> Path | None:
        """The checkpoint's folder on this machine; None for a Hub model or a GGUF file."""
        source = self.checkpoint.source
        made = isinstance(self.checkpoint, GgufCheckpoint)  # a temporary folder
        return source.path if type(source) is LocalFolder and not made else None

    def written(self, folder: Path) -> Model:
        """Open a `folder` written from this model, with the same run options. Raises CheckpointError."""
        return Model(as_plain(Checkpoint.open(folder, quantised=True)), self.run)


def open_model(
    source: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    memory: str | int | None = None,
    range_reads: bool = False,
    trust_remote_code: bool = False,
) -> Model:
    """Open a local checkpoint folder, a .gguf file, or `org/name` on the Hub at a revision.

    - `device`: auto, cpu, cuda, cuda:N or mps.
    - `dtype`: auto, float32, bfloat16 or float16. A GGUF file, FP8 and packed integers are dequantised to it;
      for auto to bfloat16, or to the dtype that the config of a folder states.
    - `memory`: a budget in bytes or as "8GiB"; by default half of the machine's memory.
    - `range_reads`: read a Hub checkpoint's weights in byte ranges and do not store them.
    - `trust_remote_code`: run the code that comes with the checkpoint's tokenizer.

    No weight is read yet. Raises CheckpointError for what can't be read, HubError for a failed Hub request,
    UsageError for invalid options.
    """
    checkpoint = open_checkpoint(source, revision=revision, dtype=dtype, range_reads=range_reads)
    checkpoint.trust_remote_code = trust_remote_code
    return Model(checkpoint, RunOptions.choose(checkpoint, device, dtype, memory))


def open_checkpoint(
    source: str | Path, *, revision: str | None = None, dtype: str = "auto", range_reads: bool = False
) -> Checkpoint:
    """The checkpoint that `open_model` opens; arguments and errors as there."""
    source, revision = _hub_address(str(source), revision)
    path = Path(source).expanduser()
    is_gguf = path.is_file() and path.suffix == ".gguf"
    if revision is not None and (is_gguf or path.is_dir()):
        raise UsageError("--revision is for models on the Hub", where=str(source))
    check_dtype(dtype)
    if path.is_dir():
        return as_plain(Checkpoint.open(path, quantised=True), DTYPE_OPTIONS.get(dtype))
    if is_gguf:
        return GgufCheckpoint(path, DTYPE_OPTIONS.get(dtype, DTYPE_OPTIONS["bfloat16"]))
    if path.is_file() or not HUB_ID.fullmatch(source):
        raise no_folder(str(source))
    return open_hub(source, revision, ranges=range_reads, dtype=DTYPE_OPTIONS.get(dtype))


def hub_id(source: str) -> str:
    """The Hub id `org/name` of an id, a model page's URL or an hf:// address. Raises UsageError."""
    name, _ = _hub_address(source, None)
    if not HUB_ID.fullmatch(name):
        raise UsageError("not the id of a model on the Hub", where=source, expected="org/name")
    return name


def _hub_address(source: str, revision: str | None) -> tuple[str, str | None]:
    """(Hub id, revision) of a model page's URL or an hf:// address; anything else as it is."""
    found = HUB_ADDRESS.fullmatch(source)
    if found is None:
        return source, revision
    stated = found["revision"] or found["tree"]
    if stated and revision and stated != revision:
        raise UsageError("MODEL and --revision name two revisions", where=source, found=revision)
    return found["id"], revision or stated
