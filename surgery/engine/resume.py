"""A journal of a long run, beside its destination, from which the same command resumes after an interruption.

It is a folder with `fingerprint.json` (identifies the run), `steps.jsonl` (one line per completed step,
written and flushed after all files of the step), and the files the steps saved: hidden states, tensors, JSON.
The journal of a different run is deleted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from surgery.checkpoint.output_folder import flush, replace_text
from surgery.engine.distributed import rank, world_size
from surgery.errors import DistributedError, StorageError, SurgeonError

FINGERPRINT, STEPS = "fingerprint.json", "steps.jsonl"


class Journal:
    """Completed steps of the run that `fingerprint` identifies, in a hidden folder beside `destination`.

    `kind` separates several runs for one destination, as indexing and the pruning that uses the index. An
    existing journal is resumed when its fingerprint is equal and `resume` is true; otherwise it is deleted.
    `resumed` says which. `step in journal` tests whether a step is complete.
    """

    def __init__(
        self, destination: Path, fingerprint: dict[str, Any], *, resume: bool = True, kind: str = ""
    ) -> None:
        self.folder = journal_folder(destination, kind)
        text = json.dumps(fingerprint, sort_keys=True)
        file = self.folder / FINGERPRINT
        self.resumed = resume and file.exists() and file.read_text(encoding="utf-8") == text
        if not self.resumed:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            file.write_text(text, encoding="utf-8")
        self.done = self._read()

    def _read(self) -> set[str]:
        steps = self.folder / STEPS
        if not steps.exists():
            return set()
        lines = steps.read_text(encoding="utf-8").splitlines()
        return {line for line in lines if line.endswith(".")}  # an incomplete line lacks the full stop

    def __contains__(self, step: str) -> bool:
        return f"{step}." in self.done

    def numbers(self, step: str) -> list[int]:
        """The numbers n of all complete steps "`step` n"."""
        pairs = (line.removesuffix(".").rpartition(" ") for line in self.done)
        return sorted(int(number) for name, _, number in pairs if name == step)

    def mark(self, step: str) -> None:
        """Record that a step is complete, after flushing all files of the journal to disk."""
        for file in self.folder.rglob("*"):
            if file.is_file():
                flush(file)
        with (self.folder / STEPS).open("a", encoding="utf-8") as handle:
            handle.write(f"{step}.\n")
            handle.flush()
            os.fsync(handle.fileno())
        self.done.add(f"{step}.")

    def unmark(self, *steps: str) -> None:
        """Record that steps are not complete after all; their files are kept."""
        self.done -= {f"{step}." for step in steps}
        replace_text(self.path(STEPS), "".join(f"{line}\n" for line in sorted(self.done)))

    def path(self, name: str) -> Path:
        """Path of the journal's file `name`."""
        return self.folder / name

    def save(self, name: str, fields: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Save JSON fields and, when given, tensors under a name."""
        self.path(f"{name}.json").write_text(json.dumps(fields), encoding="utf-8")
        if tensors is not None:
            save_file(
                {key: tensor.contiguous() for key, tensor in tensors.items()},
                self.path(f"{name}.safetensors"),
            )

    def load(self, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The fields and tensors that `save` wrote under a name; no tensors where none were saved."""
        fields: dict[str, Any] = json.loads(self.path(f"{name}.json").read_text(encoding="utf-8"))
        tensors = self.path(f"{name}.safetensors")
        return fields, load_file(tensors) if tensors.exists() else {}

    def part(self, name: str) -> Journal:
        """A journal of its own for a part of the run, inside this one's folder."""
        return Journal(self.path(name), {})

    def start_over(self) -> None:
        """Mark all steps as not done; files are kept."""
        self.path(STEPS).unlink(missing_ok=True)
        self.done = set()

    def forget(self, *names: str) -> None:
        """Delete files that no later step needs."""
        for name in names:
            self.path(name).unlink(missing_ok=True)

    def forget_folders(self, *names: str) -> None:
        """Delete folders that no later step needs."""
        for name in names:
            shutil.rmtree(self.path(name), ignore_errors=True)

    def fail(self, error: SurgeonError) -> None:
        """Delete the journal, unless the same run may succeed later.

        It may after a StorageError (with more disk space) or a DistributedError (with all hosts up).
        """
        if not isinstance(error, StorageError | DistributedError):
            self.finish()

    def finish(self) -> None:
        """Delete the journal; call it when the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


def saved_once(
    journal: Journal | None, step: str, measure: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Tensors that `measure` gives, or gave before the run was interrupted."""
    return _once(journal, step, lambda: ({}, measure()))[1]


def noted_once(journal: Journal | None, step: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """JSON fields that `measure` gives, or gave before the run was interrupted."""
    return _once(journal, step, lambda: (measure(), {}))[0]


def _once(
    journal: Journal | None, step: str, measure: Callable[[], tuple[dict[str, Any], dict[str, torch.Tensor]]]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if journal is not None and step in journal:
        return journal.load(step)
    fields, tensors = measure()
    if journal is not None:
        journal.save(step, fields, tensors or None)
        journal.mark(step)
    return fields, tensors


def journal_folder(destination: Path, kind: str = "") -> Path:
    """The folder of a destination's journal of one kind; each rank has its own."""
    suffix = (f"-{kind}" if kind else "") + (f"-{rank()}" if world_size() > 1 else "")
    return destination.absolute().with_name(f".{destination.name}.surgeon-journal{suffix}")
