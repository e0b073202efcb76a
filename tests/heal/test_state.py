"""State in files against state in memory, to the bit, also after a kill at any moment."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import opened

from surgery.engine.resume import Journal
from surgery.engine.streamed_model import StreamedModel
from surgery.heal.distil_loss import DistilLoss, TopTokens, top_tokens
from surgery.heal.state import StateFiles
from surgery.heal.train import Division, HeldOut, Schedule, Trainer
from surgery.heal.trainable import Trainables, TrainMode, open_state

STEPS, SIZE = 8, 16
IDS = torch.randint(0, 256, (STEPS, SIZE), generator=torch.Generator().manual_seed(5))
TARGETS = top_tokens(torch.randn(STEPS * (SIZE - 1), 256, generator=torch.Generator().manual_seed(6)), 8, 1.0)
Train = Callable[..., Any]


@pytest.fixture
def train(save_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Train]:
    """Train a tiny model with its state in memory or in files: the best masters, losses and measures.

    The state is saved after every third step and at the end.
    """
    student = save_tiny("llama", num_hidden_layers=3)
    save = Trainer._save
    ids, log_p = (one.view(STEPS, SIZE - 1, -1) for one in (TARGETS.ids, TARGETS.log_p))
    monkeypatch.setattr("surgery.heal.train.SAVE_SECONDS", 0.0)
    monkeypatch.setattr(
        Trainer, "_save", lambda self, done: save(self, done) if done % 3 == 0 or done == STEPS else None
    )

    def run(mode: str, name: str, in_files: bool = True) -> Any:
        journal = Journal(tmp_path / name, {})
        model = StreamedModel(opened(student), keep_bytes=1 << 30)
        kind, cpu = TrainMode.parse(mode), torch.device("cpu")
        state = open_state(model.meta_model, kind, cpu, journal if in_files else None)
        trainer = Trainer(
            model,
            Trainables(model.meta_model, kind, 7, cpu, state),
            IDS,
            lambda blocks: TopTokens(ids[blocks], log_p[blocks]),
            held_out=HeldOut({"text": IDS[:1]}),
            schedule=Schedule(torch.arange(STEPS), 1),
            peak=6e-2,
            loss=DistilLoss(1.0, 0.9),
            division=Division(micro_batch=1),
            journal=journal,
        )
        history = trainer.run()
        masters = {key: master.clone() for key, master in trainer.trainables.masters.items()}
        return masters, history.losses, history.measures, history.best

    return run


def assert_same(one: Any, two: Any) -> None:
    assert one[1:] == two[1:]
    assert one[0].keys() == two[0].keys()
    assert all(torch.equal(master, two[0][key]) for key, master in one[0].items())


@pytest.mark.parametrize("mode", ["all", "lora:2", "norms"])
def test_files_give_the_bits_of_memory(mode: str, train: Train) -> None:
    held = train(mode, "held", in_files=False)
    assert 0 < held[3] < len(held[2]) - 1  # the best state is neither the first nor the last
    assert_same(train(mode, "files"), held)


@contextlib.contextmanager
def killed_in(method: str, call: int, whole: bool) -> Iterator[None]:
    """Within the block, call number `call` of a method of StateFiles ends in a kill, after its work or, where
    not `whole`, after half of it: nothing is cleaned up, and what is in the files stays there.
    """
    counter = itertools.count(1)
    original = getattr(StateFiles, method)
    with pytest.MonkeyPatch.context() as patch:

        def put_gradients(self: StateFiles, gradients: dict[str, torch.Tensor]) -> None:
            original(self, gradients)
            if next(counter) == call:
                raise KeyboardInterrupt

        @contextlib.contextmanager
        def changing(self: StateFiles, keys: list[str]) -> Iterator[Any]:
            with original(self, keys) as tensors:
                yield tensors
            if next(counter) == call:
                raise KeyboardInterrupt

        def keep_best(self: StateFiles) -> None:
            if next(counter) == call:
                for key in list(self.masters)[: len(self.masters) if whole else 3]:
                    self.best_sets[self.best_turn.free][key].copy_(self.masters[key])
                raise KeyboardInterrupt
            original(self)

        def save(self: StateFiles, journal: Journal, number: int, fields: dict[str, Any]) -> None:
            if number == call and not whole:
                patch.setattr(Journal, "mark", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            original(self, journal, number, fields)
            if number == call:
                raise KeyboardInterrupt

        patch.setattr(StateFiles, method, locals()[method])
        with pytest.raises(KeyboardInterrupt):
            yield


KILLS = [  # in 6 steps through 3 layers, with a save after 3 and 6 of them and the best state after 2
    *[("put_gradients", call, True) for call in (2, 14)],
    *[("changing", call, True) for call in (1, 5, 9, 10, 13, 17)],
    *[("keep_best", call, whole) for call in (1, 3) for whole in (True, False)],
    *[("save", call, whole) for call in (1, 2) for whole in (True, False)],
]


def test_a_kill_at_any_moment_leaves_the_last_save_whole(train: Train) -> None:
    held = train("all", "held", in_files=False)
    for number, (method, call, whole) in enumerate(KILLS):
        with killed_in(method, call, whole):
            train("all", f"killed-{number}")
        assert_same(train("all", f"killed-{number}"), held)


def test_two_kills_one_after_the_other(train: Train) -> None:
    held = train("all", "held", in_files=False)
    for method, call in (("changing", 11), ("changing", 5), ("put_gradients", 2), ("save", 2)):
        with killed_in(method, call, False):
            train("all", "killed")
    assert_same(train("all", "killed"), held)
