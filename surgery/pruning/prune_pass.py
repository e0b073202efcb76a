"""PrunePass: the one pass over the layers in which every tensor is read, repaired, edited and written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.budget.prune_cost import PruneCost
from surgery.checkpoint.manifest import source_json
from surgery.checkpoint.shard_writer import ShardWriter, TensorSpec
from surgery.cut.groups import Cut
from surgery.cut.tensors import TensorEdit
from surgery.engine import distributed
from surgery.engine.disk_errors import in_layer
from surgery.engine.hidden_store import HiddenStore
from surgery.engine.open_model import Model
from surgery.engine.resume import Journal
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.index.channel_index import ChannelIndex
from surgery.plan.prune_plan import PrunePlan
from surgery.progress import Progress, no_progress
from surgery.pruning.verify import last_logits
from surgery.repair.layer_repair import LayerPruner
from surgery.repair.methods import RepairMethod
from surgery.repair.norm_scale import NormScale, ScaledNorm
from surgery.repair.stored_weights import repairable_tensors, repaired_tensors

SHARDS = "shards"


@dataclass(frozen=True)
class Passed:
    """What a pass leaves: `logits` [T, V] of the source with removed members masked and repaired weights in
    place, the entries `repairs` of its layers, and the scale of its final norm, None for none.
    """

    logits: torch.Tensor
    repairs: list[dict[str, Any]]
    norm_scale: NormScale | None


class PrunePass:
    """Carries out a cut in one pass over a model's layers.

    With `journal`, shards are written inside it and hidden states are saved after every layer, so that an
    interrupted pass resumes; a cut without repair is over too soon to need that. Of several processes, which
    share out the calibration blocks, the first writes.
    """

    def __init__(
        self,
        model: StreamedModel,
        cut: Cut,
        repair: RepairMethod,
        specs: dict[str, TensorSpec],
        cost: PruneCost,
        journal: Journal | None = None,
    ) -> None:
        self.model = model
        self.cut = cut
        self.repair = repair
        self.specs = specs
        self.cost = cost
        self.journal = journal if repair.changes_weights else None
        self.repairable = repairable_tensors(model.meta_model, repair) if repair.changes_weights else set()
        self.written: set[str] = set()
        self.deferred: dict[str, torch.Tensor] = {}

    def help(self, calibration: torch.Tensor) -> None:
        """The part of a process that does not write: its share of the calibration blocks, for the repair.

        Raises DistributedError.
        """
        model, first = self.model, self._layers_done()
        with model.other_weights() if self.cost.ends_held else contextlib.nullcontext():
            with model.other_weights():
                pruner = LayerPruner(model, self.cut, self.repair, calibration, self.cost)
            if first:
                self._load_streams(pruner.streams, first)
            for number, layer in model.stream_layers(range(first, len(model.layers))):
                result = pruner(number, layer)
                with in_layer(number):
                    self._save_streams(pruner.streams, number, {} if result is None else result.as_json())
            with model.other_weights():
                pruner.final_norm()

    def run(
        self,
        folder: Path,
        ids: torch.Tensor,
        calibration: torch.Tensor,
        progress: Progress[Any] = no_progress,
    ) -> Passed:
        """Write all shards into `folder`; returns what verification by one block `ids` [1, T] needs, and the
        manifest.
        """
        shards = folder if self.journal is None else self.journal.path(SHARDS)
        shards.mkdir(exist_ok=True)
        first = self._layers_done()
        with ShardWriter(shards, self.specs, resume=first > 0) as writer:
            for number in range(first):
                for stored_parameter in self.model.meta_model.layer_parameters[number]:
                    self.written.update(stored_parameter.stored)
            writer.complete(name for name in map(self._name_after, self.written) if name is not None)
            passed = self._stream(writer, first, ids, calibration, progress)
            self._copy_rest(writer)
        if self.journal is not None:
            for file in shards.iterdir():
                _link(file, folder / file.name)
        return passed

    def _layers_done(self) -> int:
        """Layers that all processes have done; none is more than one ahead. Raises DistributedError."""
        done = 0
        while self.journal is not None and f"cut {done}" in self.journal:
            done += 1
        return int(distributed.all_reduce_min(torch.tensor(done, device=self.model.device)))

    def _stream(
        self,
        writer: ShardWriter,
        first: int,
        ids: torch.Tensor,
        calibration: torch.Tensor,
        progress: Progress[Any],
    ) -> Passed:
        model, count = self.model, len(self.model.layers)
        model.on_read = lambda name, tensor: self._save(writer, name, tensor)
        repairs = [self.journal.load(f"cut-{number}")[0] for number in range(first) if self.journal]
        # from the Hub, each read is a download
        with model.other_weights() if self.cost.ends_held else contextlib.nullcontext():
            with model.other_weights():
                check = TokenStream(model, ids, micro_batch=1)
                pruner = LayerPruner(model, self.cut, self.repair, calibration, self.cost)
            streams = [check, *pruner.streams]
            if first:
                self._load_streams(streams, first)
            for number, layer in progress(model.stream_layers(range(first, count)), "layers", count - first):
                result = pruner(number, layer)
                with in_layer(number):
                    if result is not None:  # first, as memory then holds what the file gives back
                        repaired = repaired_tensors(model.meta_model, number, result, self.deferred)
                        for name, tensor in repaired.items():
                            self._write(writer, name, tensor)
                    if number not in self.cut.skipped:
                        check.forward(number, layer)
                    if result is not None:
                        repairs.append(result.as_json())
                        self._save_streams(streams, number, repairs[-1])
            with model.other_weights():
                norm = pruner.final_norm()
                self._write_others(writer, norm)
                with contextlib.nullcontext() if norm is None else norm.applied():
                    logits = last_logits(model, check)
            return Passed(logits, repairs, None if norm is None else norm.fitted)

    def _write_others(self, writer: ShardWriter, norm: ScaledNorm | None) -> None:
        """Write the vectors outside the layers, those of the final norm scaled."""
        for name, tensor in self.deferred.items():
            self._write(writer, name, tensor if norm is None else norm.tensor(name, tensor))
        self.deferred.clear()

    def _save(self, writer: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor as it is read, or keep it until its layer is repaired; runs in the reader thread."""
        if name in self.written:
            return
        self.written.add(name)
        if name in self.repairable:
            self.deferred[name] = tensor
        else:
            self._write(writer, name, tensor)

    def _name_after(self, name: str) -> str | None:
        """The name a stored tensor is written under; None for one that is not written."""
        return self.cut.edits.get(name, TensorEdit(name)).name

    def _write(self, writer: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        edit = self.cut.edits.get(name, TensorEdit(name))
        if edit.name is not None:
            writer.write(edit.name, edit.apply(tensor))

    def _copy_rest(self, writer: ShardWriter) -> None:
        """Copy what is stored but not part of the model that transformers builds."""
        checkpoint = self.model.checkpoint
        for entry in checkpoint.tensors.values():
            name = self._name_after(entry.name)
            if entry.name in self.written or name is None:
                continue
            if entry.name in self.cut.edits:
                self._write(writer, entry.name, checkpoint.read(entry.name))
            else:
                writer.copy(name, checkpoint, entry)

    def _files(self, streams: list[TokenStream], number: int) -> list[HiddenStore]:
        """Files for the inputs of layer `number`; two of each, so that a kill while one is written leaves the
        other.
        """
        assert self.journal is not None
        found = []
        for place, stream in enumerate(streams):
            path = self.journal.path(f"stream-{place}-{number % 2}")
            found.append(HiddenStore(stream.store.shape, stream.store.dtype, self.model.device, path=path))
        return found

    def _save_streams(self, streams: list[TokenStream], number: int, repair: dict[str, Any]) -> None:
        """Mark layer `number` as done, with all that the next one needs."""
        if self.journal is None:
            return
        for stream, file in zip(streams, self._files(streams, number + 1), strict=True):
            file.copy_from(stream.store)
        self.journal.save(f"cut-{number}", repair)
        self.journal.mark(f"cut {number}")

    def _load_streams(self, streams: list[TokenStream], number: int) -> None:
        """Put the saved inputs of layer `number` into the streams."""
        for stream, file in zip(streams, self._files(streams, number), strict=True):
            stream.store.copy_from(file)


def prune_fingerprint(opened: Model, index: ChannelIndex, plan: PrunePlan) -> dict[str, Any]:
    """What makes two prunes the same: source and its files, index, plan, options, versions."""
    return {**index_use_fingerprint(opened, index), "plan": plan.digest}


def index_use_fingerprint(opened: Model, index: ChannelIndex) -> dict[str, Any]:
    """What makes two uses of an index the same: source files, statistics, tokens, options, versions."""
    digest = hashlib.sha256(json.dumps(index.as_json(), sort_keys=True).encode())
    digest.update(index.input_ids.to(torch.int32).contiguous().numpy().tobytes())
    return {
        "source": source_json(opened.checkpoint),
        "files": opened.checkpoint.file_fingerprints(),
        "index": digest.hexdigest(),
        "run": opened.run.as_json(),
        "memory": opened.run.memory,
        "processes": [distributed.rank(), distributed.world_size()],
    }


def _link(file: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
