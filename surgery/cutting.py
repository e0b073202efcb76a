"""The walk that cuts: every tensor is read, cut, mended and written, and tokens run through what is left of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.checkpoint import Checkpoint
from surgery.cut_costs import CutCosts
from surgery.faults import at_layer
from surgery.gate import last_logits
from surgery.hidden import HiddenStore
from surgery.index import ChannelIndex, Track, source_json, untracked
from surgery.journal import Journal
from surgery.mended import layer_tensors, mended_tensors
from surgery.mending import LayerCutter
from surgery.plan import ResizePlan
from surgery.resize import TensorCut, cut_tensor
from surgery.stream import StreamedModel
from surgery.tokens import TokenStream
from surgery.writer import ShardWriter, TensorSpec

if TYPE_CHECKING:
    from surgery.indexing import RunOptions

COPY_BYTES = 64 << 20
SHARDS = "shards"


class CuttingWalk:
    """Carries out a plan on the way through a model's layers.

    With `journal`, shards are written inside it and tokens are put by after every layer, so that a run cut short is gone
    on with; a plan without repair is over too soon to need one.
    """

    def __init__(
        self,
        model: StreamedModel,
        plan: ResizePlan,
        specs: dict[str, TensorSpec],
        cuts: dict[str, TensorCut],
        costs: CutCosts,
        journal: Journal | None = None,
    ) -> None:
        self.model = model
        self.plan = plan
        self.specs = specs
        self.cuts = cuts
        self.costs = costs
        self.journal = journal if plan.repair != "none" else None
        self.mendable = layer_tensors(model.skeleton) if plan.repair != "none" else set()
        self.written: set[str] = set()
        self.late: dict[str, torch.Tensor] = {}

    def run(
        self, folder: Path, ids: torch.Tensor, calibration: torch.Tensor, track: Track[Any] = untracked
    ) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Write all shards into `folder`; returns what the gate and the manifest need.

        Logits [T, V] for `ids` [1, T] are those of the source with removed channels masked and repaired weights in place.
        """
        shards = folder if self.journal is None else self.journal.path(SHARDS)
        shards.mkdir(exist_ok=True)
        first = self._layers_done()
        with ShardWriter(shards, self.specs, resume=first > 0) as writer:
            for number in range(first):
                names = [n for assembly in self.model.skeleton.inside[number] for n in assembly.stored]
                writer.complete(names)
                self.written.update(names)
            logits, repairs = self._walk(writer, first, ids, calibration, track)
            self._copy_rest(writer)
        if self.journal is not None:
            for file in shards.iterdir():
                _link(file, folder / file.name)
        return logits, repairs

    def _layers_done(self) -> int:
        done = 0
        while self.journal is not None and f"cut {done}" in self.journal:
            done += 1
        return done

    def _walk(
        self,
        writer: ShardWriter,
        first: int,
        ids: torch.Tensor,
        calibration: torch.Tensor,
        track: Track[Any],
    ) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        model, count = self.model, len(self.model.layers)
        model.on_read = lambda name, tensor: self._save(writer, name, tensor)
        repairs = [self.journal.load(f"cut-{number}")[0] for number in range(first) if self.journal]
        # from the Hub, each read is a download
        with model.outside() if self.costs.ends_held else contextlib.nullcontext():
            with model.outside():
                gate = TokenStream(model, ids, micro_batch=1)
                cutter = LayerCutter(model, self.plan, calibration, self.costs)
            streams = [gate, *cutter.streams]
            if first:
                self._recall(streams, first)
            for number, layer in track(model.walk(range(first, count)), "layers", count - first):
                done = cutter(number, layer)
                gate.forward(number, layer)
                if done is None:
                    continue
                repairs.append(done.as_json())
                with at_layer(number):
                    for name, tensor in mended_tensors(model.skeleton, number, done, self.late).items():
                        self._write(writer, name, tensor)
                    self._put_by(streams, number, repairs[-1])
            with model.outside():
                return last_logits(model, gate), repairs

    def _save(self, writer: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor as it is read, or keep it until its layer is mended; in the reader thread."""
        if name in self.written:
            return
        self.written.add(name)
        if name in self.mendable:
            self.late[name] = tensor
        else:
            self._write(writer, name, tensor)

    def _write(self, writer: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        cut = self.cuts.get(name)
        writer.write(name, tensor if cut is None else cut_tensor(tensor, cut, self.plan))

    def _copy_rest(self, writer: ShardWriter) -> None:
        """Copy what is stored but not part of the model transformers builds."""
        checkpoint = self.model.checkpoint
        for entry in checkpoint.tensors.values():
            if entry.name in self.written:
                continue
            for start in range(entry.start, entry.stop, COPY_BYTES):
                stop = min(start + COPY_BYTES, entry.stop)
                piece = checkpoint.source.read(entry.file, start, stop)
                writer.write_bytes(entry.name, piece, start - entry.start)

    # -- the journal ------------------------------------------------------------------------------------------------

    def _stores(self, streams: list[TokenStream], number: int) -> list[HiddenStore]:
        """Files for what enters layer `number`; two of each, so that a kill while one is written leaves the other."""
        assert self.journal is not None
        return [
            HiddenStore(
                s.store.shape, s.store.dtype, None, path=self.journal.path(f"stream-{i}-{number % 2}")
            )
            for i, s in enumerate(streams)
        ]

    def _put_by(self, streams: list[TokenStream], number: int, repair: dict[str, Any]) -> None:
        """Note that layer `number` is done, with all that the next one needs."""
        if self.journal is None:
            return
        for stream, file in zip(streams, self._stores(streams, number + 1), strict=True):
            file.take(stream.store)
        self.journal.save(f"cut-{number}", repair)
        self.journal.mark(f"cut {number}")

    def _recall(self, streams: list[TokenStream], number: int) -> None:
        """Bring tokens to where they enter layer `number`."""
        for stream, file in zip(streams, self._stores(streams, number), strict=True):
            stream.store.take(file)


def cut_fingerprint(
    checkpoint: Checkpoint, index: ChannelIndex, plan: ResizePlan, options: RunOptions
) -> dict[str, Any]:
    """What makes two cuts the same: source and its files, index, plan, options, versions."""
    digest = hashlib.sha256(json.dumps(plan.as_json(), sort_keys=True).encode()).hexdigest()
    return {**use_fingerprint(checkpoint, index, options), "plan": digest}


def use_fingerprint(checkpoint: Checkpoint, index: ChannelIndex, options: RunOptions) -> dict[str, Any]:
    """What makes two uses of an index the same: source and its files, statistics, calibration tokens, options, versions."""
    digest = hashlib.sha256(json.dumps(index.as_json(), sort_keys=True).encode())
    digest.update(index.input_ids.to(torch.int32).contiguous().numpy().tobytes())
    return {
        "source": source_json(checkpoint),
        "files": checkpoint.stamps(),
        "index": digest.hexdigest(),
        "run": options.as_json(),
        "memory": options.memory,
    }


def _link(file: Path, target: Path) -> None:
    """Let a file be under a second name, or copy it where the file system has no such thing."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
