"""What training changes: float32 masters, the moments of AdamW, the best masters, the gradients of a step.

They are tensors by the keys of `Trainables`, "layer.path in the layer", on the device in memory
(`HeldState`), or in files where memory does not hold them (`StateFiles`). A step goes through the layers one
after another, so that files need only one layer's in memory. Both give the same bits.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from surgery.engine.hidden_store import mapped_file
from surgery.engine.resume import Journal

MASTER, BEST = "master", "best"
MOMENTS = ("exp_avg", "exp_avg_sq")
STEPPED = (MASTER, *MOMENTS)  # what a step changes
Tensors = dict[str, torch.Tensor]


class State(ABC):
    """Masters, moments, the best masters and gradients; `masters` and `best` are those of now, to be read.

    `resumed`: masters and moments are there already. `mark` names the state's steps in a journal.
    """

    mark: str
    resumed = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.masters: Tensors = {}
        self.best: Tensors = {}

    @property
    def layers(self) -> list[list[str]]:
        """The keys of each layer that has any."""
        found: dict[str, list[str]] = {}
        for key in self.masters:
            found.setdefault(key.partition(".")[0], []).append(key)
        return list(found.values())

    def use_best(self) -> None:
        """Make the best masters those that are computed with and written. No step may follow."""
        self.masters = self.best

    def last_save(self, journal: Journal) -> int:
        """Number of the last save; 0 where there is none."""
        return max(journal.numbers(self.mark), default=0)

    @abstractmethod
    def start(self, key: str, master: torch.Tensor) -> None:
        """Begin with a master, and moments of 0."""

    @abstractmethod
    def put_gradients(self, gradients: Tensors) -> None:
        """Keep gradients of some masters until the step."""

    @abstractmethod
    def gradient(self, key: str) -> torch.Tensor:
        """The gradient of a master on the device; not to be changed."""

    @abstractmethod
    def take_gradient(self, key: str, factor: torch.Tensor) -> torch.Tensor:
        """The gradient of a master on the device, times `factor`; it is not kept any longer."""

    @abstractmethod
    def changing(self, keys: list[str]) -> contextlib.AbstractContextManager[dict[str, list[torch.Tensor]]]:
        """Within the block, the tensors of STEPPED at these keys, on the device, change in place."""

    @abstractmethod
    def stepped(self) -> None:
        """Say that all layers were changed: that is the state now."""

    @abstractmethod
    def keep_best(self) -> None:
        """Keep the masters as the best."""

    @abstractmethod
    def save(self, journal: Journal, number: int, fields: dict[str, Any]) -> None:
        """Save the state and JSON fields as save `number`; a kill before the end leaves the save before."""

    @abstractmethod
    def load(self, journal: Journal) -> dict[str, Any] | None:
        """Go back to the last save; returns its fields, None where there is none."""


class HeldState(State):
    """All on the device, in memory; a save is a safetensors file, one of two in turn."""

    mark = "state"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.moments: dict[str, Tensors] = {name: {} for name in MOMENTS}
        self.gradients: Tensors = {}

    def start(self, key: str, master: torch.Tensor) -> None:
        self.masters[key] = master.to(self.device, torch.float32)
        for moments in self.moments.values():
            moments[key] = torch.zeros_like(self.masters[key])

    def put_gradients(self, gradients: Tensors) -> None:
        self.gradients |= gradients

    def gradient(self, key: str) -> torch.Tensor:
        return self.gradients[key]

    def take_gradient(self, key: str, factor: torch.Tensor) -> torch.Tensor:
        return self.gradients.pop(key).mul_(factor)

    @contextlib.contextmanager
    def changing(self, keys: list[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
        held = {MASTER: self.masters, **self.moments}
        yield {name: [held[name][key] for key in keys] for name in STEPPED}

    def stepped(self) -> None:
        pass

    def keep_best(self) -> None:
        self.best = {key: master.clone() for key, master in self.masters.items()}

    def save(self, journal: Journal, number: int, fields: dict[str, Any]) -> None:
        held = {MASTER: self.masters, BEST: self.best, **self.moments}
        tensors = {f"{name}/{key}": one for name, by_key in held.items() for key, one in by_key.items()}
        journal.save(f"{self.mark}-{number % 2}", fields, tensors)
        journal.mark(f"{self.mark} {number}")

    def load(self, journal: Journal) -> dict[str, Any] | None:
        number = self.last_save(journal)
        if not number:
            return None
        fields, tensors = journal.load(f"{self.mark}-{number % 2}")
        self.best = {  # cloned: tensors are mapped from a file that is replaced by the save after the next
            key: tensors[f"{BEST}/{key}"].to(master).clone() for key, master in self.masters.items()
        }
        for name, held in ((MASTER, self.masters), *self.moments.items()):
            for key, one in held.items():
                one.copy_(tensors[f"{name}/{key}"])
        return fields


class StateFiles(State):
    """All in raw files of a journal, mapped into memory; one layer's tensors are copied to the device.

    `shapes` are those of the masters by key. What a step changes, and the best masters, have two sets of
    files each. The set of the last save stays as it is until the next save; changes go to the other one. So
    a save costs no copy, and a kill at any moment leaves the last save whole. Raises OSError when the disk
    has no space for the files.
    """

    mark = "state-files"

    def __init__(self, journal: Journal, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        super().__init__(device)

        def files(name: str) -> Tensors:
            return _mapped_tensors(journal, name, shapes)

        self.sets = [{name: files(f"{name}-{place}") for name in STEPPED} for place in (0, 1)]
        self.best_sets = [files(f"{BEST}-{place}") for place in (0, 1)]
        self.gradients = files("gradients")
        self.turn, self.best_turn = _Turn(), _Turn()
        self.resumed = self.load(journal) is not None
        self._show()

    def _show(self) -> None:
        self.masters, self.best = self.sets[self.turn.now][MASTER], self.best_sets[self.best_turn.now]

    def start(self, key: str, master: torch.Tensor) -> None:
        into = self.sets[self.turn.free]
        into[MASTER][key].copy_(master)
        for name in MOMENTS:
            into[name][key].zero_()  # a killed run may have left others

    def put_gradients(self, gradients: Tensors) -> None:
        for key, gradient in gradients.items():
            self.gradients[key].copy_(gradient)

    def gradient(self, key: str) -> torch.Tensor:
        return self.gradients[key].to(self.device)

    def take_gradient(self, key: str, factor: torch.Tensor) -> torch.Tensor:
        return self.gradient(key) * factor

    @contextlib.contextmanager
    def changing(self, keys: list[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
        now, into = self.sets[self.turn.now], self.sets[self.turn.free]
        tensors = {name: [now[name][key].to(self.device, copy=True) for key in keys] for name in STEPPED}
        yield tensors
        for name in STEPPED:
            for key, one in zip(keys, tensors[name], strict=True):
                into[name][key].copy_(one)

    def stepped(self) -> None:
        self.turn.now = self.turn.free
        self._show()

    def keep_best(self) -> None:
        for key, one in self.best_sets[self.best_turn.free].items():
            one.copy_(self.masters[key])
        self.best_turn.now = self.best_turn.free
        self._show()

    def save(self, journal: Journal, number: int, fields: dict[str, Any]) -> None:
        turns = {"turn": self.turn.now, "best_turn": self.best_turn.now}
        journal.save(f"{self.mark}-{number % 2}", {**fields, **turns})
        journal.mark(f"{self.mark} {number}")  # flushes the files
        self.turn.saved, self.best_turn.saved = self.turn.now, self.best_turn.now

    def load(self, journal: Journal) -> dict[str, Any] | None:
        number = self.last_save(journal)
        if not number:
            return None
        fields, _ = journal.load(f"{self.mark}-{number % 2}")
        self.turn, self.best_turn = _Turn(fields.pop("turn")), _Turn(fields.pop("best_turn"))
        self.turn.saved, self.best_turn.saved = self.turn.now, self.best_turn.now
        self._show()
        return fields


class _Turn:
    """Which of two sets of files holds what is `now`, which is `saved`, and which is `free` to be changed."""

    def __init__(self, now: int = 0) -> None:
        self.now = now
        self.saved: int | None = None

    @property
    def free(self) -> int:
        return 0 if self.saved is None else 1 - self.saved


def _mapped_tensors(journal: Journal, name: str, shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """Float32 tensors of these shapes, one after another in the journal's file `name`.bin."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    parts = mapped_file(journal.path(f"{name}.bin"), sum(sizes), torch.float32).split(sizes)
    return {key: part.view(shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}
