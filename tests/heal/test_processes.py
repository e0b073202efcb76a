"""`surgeon heal` in two processes over gloo, against one process; processes that die."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.subprocesses import KILL, SURGEON, in_two_processes, run_forked, start_two, torchrun
from helpers.tiny_models import CALIBRATION
from safetensors.torch import load_file

from surgery.engine import distributed
from surgery.engine.resume import Journal
from surgery.errors import UsageError
from surgery.heal.processes import check_same
from surgery.heal.saved_states import agree_on_saves
from surgery.heal.state import HeldState, State, StateFiles
from surgery.heal.train import Schedule

HEAL = (
    *("heal", "cut", "--tokens", "640", "--text", "text.txt", "--block-size", "32", "--batch-tokens", "160"),
    *("--cross-entropy", "0.9", "--dtype", "float32", "--train", "all", "--epochs", "2"),
)  # ten blocks, five of them in each of four steps
ONE_STEP = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from surgery.engine import distributed
from surgery.engine.open_model import open_model
from surgery.engine.streamed_model import StreamedModel
from surgery.heal.distil_loss import DistilLoss
from surgery.heal.targets import Teacher
from surgery.heal.train import HeldOut, Schedule, Trainer
from surgery.heal.trainable import Trainables, TrainMode

distributed.init(torch.device("cpu"))
student, dense = (open_model(name, device="cpu", dtype="float32", memory="8GiB") for name in ("cut", "dense"))
ids = torch.randint(0, 256, (6, 16), generator=torch.Generator().manual_seed(5))
teacher = Teacher(StreamedModel(dense), top=32, temperature=1.0, micro_batch=2, place="device")
for train in ("all", "lora:3"):
    for batch in (4, 3, 1):
        model, seen = StreamedModel(student), []
        def targets(blocks):
            seen.append(len(blocks))
            return teacher.targets(ids[blocks])
        trainer = Trainer(
            model, Trainables(model.meta_model, TrainMode.parse(train), 7, model.device), ids, targets,
            held_out=HeldOut({"a": ids[:1], "b": ids[4:]}), schedule=Schedule(torch.arange(batch), batch),
            peak=1e-3, loss=DistilLoss(1.0, 0.5),
        )
        numbers = [*trainer.measure().values(), trainer.step(0), *trainer.measure().values()]
        found = {**trainer.trainables.masters, "numbers": torch.tensor(numbers), "seen": torch.tensor(seen)}
        save_file(found, f"{sys.argv[1]}-{train}-{batch}-{distributed.rank()}.safetensors")
distributed.destroy()
"""
SAVE_ALWAYS = "import surgery.heal.train\nsurgery.heal.train.SAVE_SECONDS = 0.0\n"


@pytest.fixture
def where(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> Path:
    """A folder with a tiny model, `dense`, and its cut, `cut`."""
    folder = save_tiny("llama", name="dense").parent
    cut = ("--sparsity", "0.5", "--multiple-of", "4", "--repair", "none", "--out", "cut")
    surgeon("prune", "dense", *cut, *CALIBRATION)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_step_of_two_processes_is_that_of_one(where: Path) -> None:
    """Also with an odd number of blocks, and where one process has none."""
    alone = run_forked(ONE_STEP, "one", where=where)
    assert alone.returncode == 0, alone.stderr
    in_two_processes(ONE_STEP, "two", where=where)
    for train in ("all", "lora:3"):
        for batch, shares in ((4, (2, 2)), (3, (2, 1)), (1, (1, 0))):
            one = load_file(where / f"one-{train}-{batch}-0.safetensors")
            two = [load_file(where / f"two-{train}-{batch}-{rank}.safetensors") for rank in range(2)]
            assert tuple(int(found.pop("seen").sum()) for found in two) == shares
            assert int(one.pop("seen")) == batch
            for key, expected in one.items():
                torch.testing.assert_close(
                    two[0][key], expected, atol=1e-6, rtol=0, msg=lambda m, k=key: k + m
                )
                assert torch.equal(two[0][key], two[1][key]), key


def test_two_processes_write_the_folder_of_one(where: Path, surgeon: Callable[..., Any]) -> None:
    surgeon(*HEAL, "--out", "one")
    shown = torchrun(where, "-m", "surgery", *HEAL, "--out", "two", "--json")
    assert shown.stdout.count('"written": true') == 1
    assert shown.stderr.count("Checkpoint written to two") == 1 and "2 processes" in shown.stderr
    one, two, cut = (weights(where / name) for name in ("one", "two", "cut"))
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert any(not torch.equal(two[name], before) for name, before in cut.items())
    entries = [json.loads((where / n / "surgeon.json").read_text())["heals"][0] for n in ("one", "two")]
    assert entries[0]["losses"] == pytest.approx(entries[1]["losses"], abs=1e-5)
    assert entries[0]["kept_step"] == entries[1]["kept_step"]
    assert hidden(where) == []


def killed(where: Path, moment: str) -> str:
    """What the first of two processes says, and ends with, when the second kills itself at a moment.

    They are started without torchrun, which would end the first one before it can say anything.
    """
    moments = {"KILL_AT": moment, "KILL_IN": "surgeon-journal-heal-1/"}
    code = "import os\nos.environ.setdefault('KILL_AT', 'none:1')\n" + SAVE_ALWAYS + KILL
    first, second = start_two(code, *HEAL, "--out", "healed", where=where, second=moments)
    lost = second.wait()
    assert "Error" not in lost.stderr and lost.returncode == -signal.SIGKILL
    said = first.wait()
    assert said.returncode == 1
    return said.stderr


def test_a_process_that_dies_ends_the_run_and_the_next_goes_on(where: Path) -> None:
    in_two_processes(SURGEON, *HEAL, "--out", "whole", where=where)
    said = killed(where, "state-1.safetensors:3")
    assert "Error: the connection to another process of this job failed; in rank 0 of 2" in said
    assert "Traceback" not in said
    assert not (where / "healed").exists() and len(hidden(where)) == 2
    first, _ = in_two_processes(SURGEON, *HEAL, "--out", "healed", where=where)
    assert "Resuming" in first.stderr
    files = [(where / name / "model.safetensors").read_bytes() for name in ("healed", "whole")]
    assert files[0] == files[1]
    assert hidden(where) == []


@pytest.mark.parametrize("kind", ["held", "files"])
def test_a_process_that_was_a_save_ahead_goes_back_to_the_others(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")

    def opened() -> tuple[Journal, State]:
        journal = Journal(tmp_path / "out", {})
        agree_on_saves(journal, (HeldState.mark, StateFiles.mark), cpu)
        state = HeldState(cpu) if kind == "held" else StateFiles(journal, {"0.w": (1,)}, cpu)
        if not state.resumed:
            state.start("0.w", torch.zeros(1))
        return journal, state

    def save(journal: Journal, state: State, value: int) -> None:
        with state.changing(["0.w"]) as tensors:
            for held in tensors.values():
                held[0].fill_(value)
        state.stepped()
        state.keep_best()
        state.save(journal, state.last_save(journal) + 1, {"value": value})

    def reads() -> int | None:
        journal, state = opened()
        fields = state.load(journal)
        assert fields is None or fields["value"] == int(state.masters["0.w"]) == int(state.best["0.w"])
        return None if fields is None else fields["value"]

    first = opened()
    for value in (10, 20, 30):
        save(*first, value)
    assert reads() == 30
    with monkeypatch.context() as others:  # another process was killed before it had saved the third
        others.setattr(distributed, "all_reduce_min", lambda found: found.clamp_max(2))
        assert reads() == 20
    again = opened()  # the mark of the third is gone: it must not vouch for half a file
    assert again[1].load(again[0]) == {"value": 20}
    save(*again, 31)
    assert reads() == 31
    with monkeypatch.context() as others:  # another process has lost its journal
        others.setattr(distributed, "all_reduce_min", lambda found: found.clamp_max(0))
        assert reads() is None
    assert reads() is None
    assert int(opened()[1].masters["0.w"]) == 0


@pytest.mark.usefixtures("where")
def test_costs_and_targets_are_those_of_a_share(
    surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = json.loads(surgeon(*HEAL, "--dry-run", "--json").stdout)["costs"]
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    share = json.loads(surgeon(*HEAL, "--dry-run", "--json").stdout)["costs"]
    assert share["hidden_bytes"] * 5 == alone["hidden_bytes"] * 3  # of five blocks
    assert alone["target_bytes"] / 2 <= share["target_bytes"] < alone["target_bytes"]
    assert share["flops"] < alone["flops"] and share["host_bytes"] < alone["host_bytes"]
    monkeypatch.setenv("RANK", "1")
    schedule = Schedule(torch.tensor([3, 1, 4, 0, 2, 2, 3, 0, 1, 4]), 5)
    assert [schedule.own_blocks(step).tolist() for step in range(2)] == [[0, 2], [1, 4]]
    assert (schedule.own.tolist(), schedule.own_batch) == ([0, 1, 2, 4], 2)
    assert surgeon(*HEAL, "--dry-run").output == ""  # the first process talks
    refused = surgeon(*HEAL, "--batch-tokens", "32", "--dry-run", code=2)
    assert "fewer blocks in a step than processes" in refused.stderr and "64 or more" in refused.stderr


def test_processes_with_different_texts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"the text": {"sha256": "a"}, "the options": 1}
    check_same(inputs, torch.device("cpu"))
    monkeypatch.setattr(distributed, "all_reduce_max", lambda own: own + torch.tensor([1, 0]))
    with pytest.raises(UsageError, match=r"not given the same; in the text$"):
        check_same(inputs, torch.device("cpu"))


@pytest.mark.usefixtures("surgeon")
def test_killed_over_and_over_it_arrives_at_the_same_bytes(where: Path, surgeon: Callable[..., Any]) -> None:
    """While targets are computed, while a state is saved, and while the folder is written."""
    surgeon(*HEAL, "--out", "whole")
    for folder, moment in (
        ("surgeon-journal-heal/", "target-logs.bin:2"),
        ("surgeon-journal-heal/", "state-0.safetensors:2"),
        ("surgeon-partial/", "config.json:1"),
    ):
        moments = {"KILL_AT": moment, "KILL_IN": folder}
        killed = run_forked(SAVE_ALWAYS + KILL, *HEAL, "--out", "healed", where=where, **moments)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (where / "healed").exists()
    assert "Resuming" in surgeon(*HEAL, "--out", "healed").stderr
    files = [(where / name / "model.safetensors").read_bytes() for name in ("healed", "whole")]
    assert files[0] == files[1]
    assert hidden(where) == []
