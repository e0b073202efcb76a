"""A journal of a long run, beside its destination: after a kill the same command goes on where this one stopped.

A folder with `fingerprint.json` (what the run is), `steps.jsonl` (one line a step that is done, written and flushed after
everything the step made), and what steps made: hidden states, tensors, JSON. A journal of another run is thrown away.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from surgery.destination import flush
from surgery.distributed import rank, world_size
from surgery.errors import DistributedError, StorageError, SurgeonError

FINGERPRINT, STEPS = "fingerprint.json", "steps.jsonl"


class Journal:
    """Steps done so far of the run that `fingerprint` describes, in a hidden folder beside `destination`.

    `kind` tells apart the runs that one destination takes, as an index and the cut made from it.
    """

    def __init__(
        self, destination: Path, fingerprint: dict[str, Any], *, resume: bool = True, kind: str = ""
    ) -> None:
        self.folder = journal_folder(destination, kind)
        text = json.dumps(fingerprint, sort_keys=True)
        known = self.folder / FINGERPRINT
        self.resumed = resume and known.exists() and known.read_text(encoding="utf-8") == text
        if not self.resumed:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            known.write_text(text, encoding="utf-8")
        self.done = self._read()

    def _read(self) -> set[str]:
        steps = self.folder / STEPS
        if not steps.exists():
            return set()
        lines = steps.read_text(encoding="utf-8").splitlines()
        return {line for line in lines if line.endswith(".")}  # a line cut short has no full stop

    def __contains__(self, step: str) -> bool:
        return f"{step}." in self.done

    def mark(self, step: str) -> None:
        """Note that a step is done, once all files of the journal are on the disk."""
        for file in self.folder.rglob("*"):
            if file.is_file():
                flush(file)
        with (self.folder / STEPS).open("a", encoding="utf-8") as handle:
            handle.write(f"{step}.\n")
            handle.flush()
            os.fsync(handle.fileno())
        self.done.add(f"{step}.")

    def path(self, name: str) -> Path:
        """Where a file of that name is kept."""
        return self.folder / name

    def save(self, name: str, fields: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Keep JSON fields and tensors under a name."""
        self.path(f"{name}.json").write_text(json.dumps(fields), encoding="utf-8")
        if tensors is not None:
            save_file(
                {key: tensor.contiguous() for key, tensor in tensors.items()},
                self.path(f"{name}.safetensors"),
            )

    def load(self, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What `save` kept."""
        fields: dict[str, Any] = json.loads(self.path(f"{name}.json").read_text(encoding="utf-8"))
        tensors = self.path(f"{name}.safetensors")
        return fields, load_file(tensors) if tensors.exists() else {}

    def start_over(self) -> None:
        """Forget all steps."""
        self.path(STEPS).unlink(missing_ok=True)
        self.done = set()

    def forget(self, *names: str) -> None:
        """Remove files that no step to come needs."""
        for name in names:
            self.path(name).unlink(missing_ok=True)

    def fail(self, error: SurgeonError) -> None:
        """Throw the journal away, unless the same run may end otherwise another time: with room made, or all hosts up."""
        if not isinstance(error, StorageError | DistributedError):
            self.finish()

    def finish(self) -> None:
        """Throw the journal away: its run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


def journal_folder(destination: Path, kind: str = "") -> Path:
    """The folder a destination's journal of a kind is in."""
    which = (f"-{kind}" if kind else "") + (f"-{rank()}" if world_size() > 1 else "")
    return destination.absolute().with_name(f".{destination.name}.surgeon-journal{which}")
