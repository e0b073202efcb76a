"""ChannelIndex: statistics of every FFN channel of a model, and its super weights."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.source import ByteSource, LocalFolder
from surgery.errors import CheckpointError, IndexMismatchError, SurgeonWarning
from surgery.index.ffn_index import SECOND_ORDER as SECOND_ORDER
from surgery.index.ffn_index import STATISTICS as STATISTICS
from surgery.index.ffn_index import FfnIndex
from surgery.index.findings import Finding
from surgery.index.layer_index import (
    INTERVALS,
    LayerIndex,
    checked_intervals,
    layer_from,
    layer_tensors,
    sample_tensors,
)
from surgery.index.published_form import StoredTensors, coded_tensors, save_by_statistic
from surgery.index.super_weights import SuperWeight

SCHEMA_VERSION = 1
PUBLISHED_VERSION = 2  # of an index in its published form, which earlier versions would misread

JSON_FILE, TENSOR_FILE, SAMPLE_FILE = "index.json", "index.safetensors", "sample.safetensors"


@dataclass
class ChannelIndex:
    """Statistics of all layers, the super weights, and how they were computed.

    `widths` maps config keys to FFN widths, the key with the most channels first. `keys` maps a kind of FFN
    (dense, shared, experts) to its config key. `input_ids` [N, T] are the calibration blocks. `structures`
    are what was measured of super weights, by effect; indexes of earlier versions have none. `published` is
    the Hub data set it was read from: {"repo": ..., "revision": commit}. `coded` says that its statistics
    were decoded from the published form. `intervals` are those that the published form keeps
    (`surgery.index.intervals.published_intervals`).
    """

    source: dict[str, Any]
    calibration: dict[str, Any]
    run: dict[str, Any]
    loss: dict[str, float]
    layers: list[LayerIndex]
    super_weights: list[SuperWeight]
    echoes: list[SuperWeight]
    input_ids: torch.Tensor
    widths: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    structures: list[Finding] = field(default_factory=list)
    published: dict[str, str] | None = None
    coded: bool = False
    intervals: dict[str, Any] = field(default_factory=dict)
    warned: bool = field(default=False, repr=False, compare=False)  # that commits can't be compared

    def __post_init__(self) -> None:
        if not self.widths:  # built by hand, or by a version that supported one width only
            self.widths = {"intermediate_size": self.layers[0].width}

    def width_key(self, ffn: FfnIndex) -> str:
        """The config key that holds an FFN's width."""
        return self.keys.get(ffn.kind) or next(iter(self.widths))

    def as_json(self) -> dict[str, Any]:
        """The content of index.json."""
        return {
            "schema_version": PUBLISHED_VERSION if self.coded else SCHEMA_VERSION,
            "source": self.source,
            "calibration": self.calibration,
            "run": self.run,
            "loss": self.loss,
            "widths": self.widths,
            "width_keys": self.keys,
            "layers": [layer.summary() for layer in self.layers],
            "super_weights": [weight.as_json() for weight in self.super_weights],
            "echoes": [weight.as_json() for weight in self.echoes],
            "structures": [finding.as_json() for finding in self.structures],
        }

    def published_json(self) -> dict[str, Any]:
        """`index` of what is made from it: the data set and commit it was read from; nothing for a folder."""
        return {"index": self.published} if self.published else {}

    def save(self, folder: Path) -> None:
        """Write index.json, index.safetensors and, if there are samples, sample.safetensors into a folder."""
        if self.coded:
            self.save_published(folder)
            return
        samples: dict[str, torch.Tensor] = {}
        tensors = {"calibration.input_ids": self.input_ids.to(torch.int32).contiguous()}
        for number, layer in enumerate(self.layers):
            tensors |= layer_tensors(number, layer)
            samples |= sample_tensors(number, layer)
        if samples:
            save_file(samples, folder / SAMPLE_FILE)
        save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
        _write_json(self.as_json(), folder)

    def save_published(
        self,
        folder: Path,
        intervals: dict[str, Any] | None = None,
        layer_intervals: list[dict[str, Any]] | None = None,
    ) -> None:
        """Write index.json and index.safetensors in the published form, without samples.

        `intervals` and `layer_intervals` are those of `surgery.index.intervals.published_intervals`; by
        default those it was read with.
        """
        tensors = {"calibration.input_ids": self.input_ids.to(torch.int32).contiguous()}
        for number, layer in enumerate(self.layers):
            groups = {f"{key}.": [ffn] for key, ffn in layer.others.items()} if layer.experts else {}
            for prefix, ffns in {"": layer.main, **groups}.items():
                if ffns:
                    stem = f"layers.{number}.{prefix}"
                    tensors |= coded_tensors(stem, ffns, stacked=ffns[0].expert is not None)
        save_by_statistic(tensors, folder / TENSOR_FILE)
        fields = {**self.as_json(), "schema_version": PUBLISHED_VERSION}
        kept = self.intervals if intervals is None else intervals
        fields |= {INTERVALS: kept} if kept else {}
        if layer_intervals is not None:
            entries = zip(fields["layers"], layer_intervals, strict=True)
            fields["layers"] = [{**entry, **({INTERVALS: own} if own else {})} for entry, own in entries]
        _write_json(fields, folder)

    @classmethod
    def load(cls, folder: str | Path) -> ChannelIndex:
        """Read an index folder, in either form.

        Raises IndexMismatchError for a folder that is not an index, is damaged, or has another schema
        version.
        """
        path = Path(folder).expanduser()
        return cls.read(LocalFolder(path), path.name, lazily=False)

    @classmethod
    def read(cls, source: ByteSource, name: str, *, lazily: bool) -> ChannelIndex:
        """Read the index in `source`; `lazily` leaves statistics where they are until they are asked for.

        `name` is what errors call it. Raises IndexMismatchError as `load` does, and HubError.
        """
        try:
            fields = json.loads(bytes(source.read(JSON_FILE, 0, source.size(JSON_FILE))))
            if fields["schema_version"] not in (SCHEMA_VERSION, PUBLISHED_VERSION):
                raise IndexMismatchError(
                    "the index was written by another version",
                    where=name,
                    expected=f"schema_version {SCHEMA_VERSION} or {PUBLISHED_VERSION}",
                    found=str(fields["schema_version"]),
                    next_step="run surgeon index again",
                )
            tensors = StoredTensors(source, TENSOR_FILE)
            if not lazily:
                tensors.read_all()
            tokens = fields["calibration"]["tokens"]
            layers = [
                layer_from(number, entry, tensors, tokens) for number, entry in enumerate(fields["layers"])
            ]
            return cls(
                source=fields["source"],
                calibration=fields["calibration"],
                run=fields["run"],
                loss=fields["loss"],
                layers=layers,
                super_weights=[SuperWeight.from_json(entry) for entry in fields["super_weights"]],
                echoes=[SuperWeight.from_json(entry) for entry in fields["echoes"]],
                input_ids=tensors["calibration.input_ids"],
                widths=fields.get("widths", {}),
                keys=fields.get("width_keys", {}),
                structures=[Finding.from_json(entry) for entry in fields.get("structures", [])],
                coded=fields["schema_version"] == PUBLISHED_VERSION,
                intervals=checked_intervals(fields.get(INTERVALS, {})),
            )
        except (OSError, ValueError, KeyError, TypeError, CheckpointError) as error:
            raise IndexMismatchError(
                "not a readable index folder",
                where=name,
                expected=f"{JSON_FILE} and {TENSOR_FILE}",
                found=f"{type(error).__name__}: {error}",
                next_step="run surgeon index again",
            ) from error

    def check_source(self, checkpoint: Checkpoint) -> None:
        """Raise IndexMismatchError unless the checkpoint is the one that was indexed.

        It must have the source's tensor names, dtypes and shapes, and the source's commit where both have
        one. Where only a published index has one, a warning says that the commits were not compared.
        """
        if self.source["shape_digest"] != checkpoint.shape_digest:
            raise IndexMismatchError(
                "the index was made from another checkpoint",
                where=checkpoint.name,
                expected=f"the tensors of {self.source['name']}",
                found="other names, dtypes or shapes",
                next_step="index this checkpoint, or name the right --index",
            )
        commit = self.source["revision"]
        if commit and checkpoint.revision and commit != checkpoint.revision:
            raise IndexMismatchError(
                "the index was made from another commit",
                where=checkpoint.name,
                expected=f"{self.source['name']} at {commit}",
                found=f"{checkpoint.name} at {checkpoint.revision}",
                next_step=f"name {self.source['name']} with --revision {commit}, or index this commit",
            )
        if self.published and not checkpoint.revision and not self.warned:
            self.warned = True
            warnings.warn(
                SurgeonWarning(
                    f"{checkpoint.name} names no commit: check that it is {self.source['name']} at {commit}, "
                    "from which the index was made"
                ),
                stacklevel=2,
            )


def _write_json(fields: dict[str, Any], folder: Path) -> None:
    text = json.dumps(fields, indent=1, allow_nan=False)
    (folder / JSON_FILE).write_text(text + "\n", encoding="utf-8")
