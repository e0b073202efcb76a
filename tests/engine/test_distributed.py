"""Two processes on one index, over gloo, against one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.subprocesses import SURGEON, in_two_processes, start_two, torchrun, torchrun_killed
from helpers.tiny_models import CALIBRATION, ROOT

from surgery.engine import distributed
from surgery.engine.device import pick_device
from surgery.errors import DistributedError, UsageError
from surgery.index.block_sums import stored
from surgery.index.channel_index import SECOND_ORDER, STATISTICS, ChannelIndex

INDEX = ["index", "tiny", *CALIBRATION[:2], "--blocks", "5", "--block-size", "32", "--dtype", "float32"]


@pytest.mark.parametrize(("variant", "more"), [("llama", ["--second-order"]), ("mixtral", [])])
def test_two_processes_make_the_index_of_one(
    variant: str, more: list[str], save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    where = save_tiny(variant).parent
    surgeon(*INDEX, *more, "--out", "one")
    if variant == "llama":
        shown = torchrun(where, "-m", "surgery", *INDEX, *more, "--out", "two")
        assert shown.stdout.count("Super weights") <= 1 and "Traceback" not in shown.stderr
    else:  # forked, which spares the seconds of importing torch three times
        in_two_processes(SURGEON, *INDEX, *more, "--out", "two", where=where)
    in_two_processes(SURGEON, *INDEX, *more, "--out", "again", where=where)
    assert [path.name for path in where.iterdir() if path.name.startswith(".")] == []
    one, two = ChannelIndex.load("one"), ChannelIndex.load("two")
    names = [*STATISTICS, *(SECOND_ORDER if more else ())]
    for mine, theirs in zip(one.layers, two.layers, strict=True):
        assert mine.supernodes.tolist() == theirs.supernodes.tolist()
        for name in names:
            tolerance = 2e-3 if name in ("obs", "obs_loss", "unexplained") else 2e-5
            least = 1e-6 * float(mine.statistics[name].abs().max())  # means cancel
            assert torch.allclose(
                mine.statistics[name], theirs.statistics[name], rtol=tolerance, atol=least
            ), name
        proxies = [layer.statistics["loss_proxy"].double() for layer in (mine, theirs)]
        assert ((proxies[0] - proxies[1]).abs() <= 1e-6 * proxies[0] + 1e-30).all()
        for ours, others in zip(mine.ffns.values(), theirs.ffns.values(), strict=True):
            assert ours.block_sums is not None and others.block_sums is not None
            assert ours.block_sums.groups == others.block_sums.groups == 5
            for name, sums in stored("", [ours.block_sums], stacked=False).items():
                other = getattr(others.block_sums, name)
                assert torch.allclose(sums.double(), other.double(), rtol=2e-3, atol=1e-6), name
    assert one.loss["nats"] == pytest.approx(two.loss["nats"], rel=1e-7)
    for file in ("index.json", "index.safetensors"):
        assert (where / "two" / file).read_bytes() == (where / "again" / file).read_bytes()


@pytest.mark.usefixtures("surgeon")
@pytest.mark.parametrize("lost", [False, True])
def test_a_process_that_dies_ends_the_run_and_the_next_goes_on(
    lost: bool, save_tiny: Callable[..., Path]
) -> None:
    where = save_tiny("llama").parent
    in_two_processes(SURGEON, *INDEX, "--out", "whole", where=where)
    torchrun_killed(where, "layer-3.json:1", "surgeon-journal-1/", *INDEX, "--out", "index")
    assert not (where / "index").exists()
    if lost:  # a machine was replaced, and its journal went with it
        shutil.rmtree(where / ".index.surgeon-journal-1")
    first, _ = in_two_processes(SURGEON, *INDEX, "--out", "index", where=where)
    assert "Resuming" in first.stderr
    for file in ("index.json", "index.safetensors"):
        assert (where / "index" / file).read_bytes() == (where / "whole" / file).read_bytes()


READ_ALL = """
from pathlib import Path

import torch
from surgery.engine import distributed
from surgery.checkpoint.reader import Checkpoint

distributed.init(torch.device("cpu"))
checkpoint = Checkpoint.open("tiny")
reading = distributed.BroadcastReader(checkpoint)
for name, entry in checkpoint.tensors.items():
    got, stored = reading.read(name), checkpoint.read(name)
    assert got.dtype == stored.dtype and torch.equal(got, stored), name
Path(f"share-{distributed.rank()}").write_text(str(reading.nbytes / checkpoint.nbytes))
distributed.destroy()
"""


def test_weights_read_in_turn_are_the_same(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    where = save_tiny("llama").parent
    in_two_processes(READ_ALL, where=where)
    shares = [float((where / f"share-{rank}").read_text()) for rank in range(2)]
    assert sum(shares) == pytest.approx(1) and max(shares) < 0.8
    in_two_processes(SURGEON, *INDEX, "--out", "each", where=where)
    in_two_processes(SURGEON, *INDEX, "--out", "shared", "--broadcast-reads", where=where)
    surgeon(*INDEX, "--out", "alone", "--broadcast-reads")
    for file in ("index.json", "index.safetensors"):
        assert (where / "each" / file).read_bytes() == (where / "shared" / file).read_bytes()


def test_blocks_are_shared_out_evenly_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for world in (1, 2, 3, 5):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        shares = []
        for number in range(world):
            monkeypatch.setenv("RANK", str(number))
            shares.append(list(range(11))[distributed.shard(11)])
        assert [block for share in shares for block in share] == list(range(11))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_every_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for alone in ("auto", "cuda"):
        assert pick_device(alone) == torch.device("cuda")
    for name, value in (("WORLD_SIZE", "16"), ("MASTER_ADDR", "localhost"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    for shared in ("auto", "cuda"):
        assert pick_device(shared) == torch.device("cuda:2")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UsageError, match="not on this machine; found cuda:4"):
        pick_device("auto")


@pytest.mark.usefixtures("surgeon")
def test_other_commands_say_that_they_run_alone(save_tiny: Callable[..., Path]) -> None:
    where = save_tiny("llama").parent
    refused = torchrun(where, "-m", "surgery", "quantize", "tiny", "--out", "cut", check=False)
    assert refused.returncode != 0 and "one process" in refused.stderr and not (where / "cut").exists()


def namespaces() -> str:
    """Why two network namespaces can't be made here; empty where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "making network namespaces takes Linux and root"
    if shutil.which("ip") is None:
        return "no `ip` command"
    tried = subprocess.run(["ip", "netns", "add", "surgeon-try"], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", "surgeon-try"], capture_output=True, check=False)
    return tried.stderr.strip() if tried.returncode else ""


@pytest.fixture
def two_hosts() -> Iterator[list[str]]:
    """Two network namespaces that reach each other by one cable and nothing else."""
    reason = namespaces()
    if reason:
        pytest.skip(reason)
    names = [f"surgeon-{os.getpid()}-{place}" for place in range(2)]
    cables = [f"sg{os.getpid() % 10000}{place}" for place in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for place, (name, cable) in enumerate(zip(names, cables, strict=True)):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"10.213.7.{place + 1}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_hosts_make_the_index_of_one_machine(
    save_tiny: Callable[..., Path], two_hosts: list[str]
) -> None:
    where = save_tiny("llama").parent
    (where / "text.txt").write_text((ROOT / "LICENSE").read_text())
    in_two_processes(SURGEON, *INDEX, "--out", "here", where=where)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = []
    for place, host in enumerate(two_hosts):
        rendezvous = ["--nnodes", "2", "--node-rank", str(place), "--nproc-per-node", "1"]
        rendezvous += ["--master-addr", "10.213.7.1", "--master-port", "29517"]
        run = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *rendezvous,
            "-m",
            "surgery",
            *INDEX,
            "--out",
            "apart",
        ]
        command = ["ip", "netns", "exec", host, *run]
        processes.append(
            subprocess.Popen(command, cwd=where, env=environment, stderr=subprocess.PIPE, text=True)
        )
    for process in processes:
        talk = process.communicate(timeout=300)[1]
        assert process.returncode == 0, talk[:6000]
    for file in ("index.json", "index.safetensors"):
        assert (where / "apart" / file).read_bytes() == (where / "here" / file).read_bytes()


def test_lost_processes_are_told_of_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")

    def gone(*_: Any) -> None:
        raise RuntimeError("Connection closed by peer [10.0.0.1]:1234\nmore")

    monkeypatch.setattr(distributed.distributed, "all_reduce", gone)
    with pytest.raises(DistributedError, match="rank 1 of 2; found Connection closed") as told:
        distributed.all_reduce_sum(torch.zeros(1))
    assert "goes on" in told.value.next_step and told.value.exit_code == 1


def test_the_interface_is_the_one_the_others_are_reached_by() -> None:
    assert distributed.interface_towards("127.0.0.1") in ("lo", "lo0")
    assert distributed.interface_towards("no.such.host.invalid") is None


def test_two_processes_share_out_cuts_and_conditions(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    where = save_tiny("llama").parent
    surgeon(*INDEX, "--out", "index")
    common = ("--index", "index", "--text", "text.txt", "--text-blocks", "2", "--dtype", "float32")
    commands = {
        "compare": ("compare", "tiny", "--sparsity", "0.5", "--multiple-of", "4", *common),
        "ablate": ("ablate", "tiny", "--conditions", "hit-rate", *common),
    }
    for name, command in commands.items():
        surgeon(*command, "--out", f"{name}-one")
        shown = in_two_processes(SURGEON, *command, "--out", f"{name}-two", where=where)
        assert shown[1].stdout == "" and shown[0].stdout
        files = [next((where / f"{name}-{count}").glob("*.json")) for count in ("one", "two")]
        one, two = (json.loads(file.read_text()) for file in files)
        rows = "rows" if name == "compare" else "conditions"
        assert len(one[rows]) == len(two[rows]) > 3
        for mine, theirs in zip(one[rows], two[rows], strict=True):
            assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}
    assert [path.name for path in where.iterdir() if path.name.startswith(".")] == []


def test_more_processes_than_cuts_are_refused(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    where = save_tiny("llama").parent
    surgeon(*INDEX, "--out", "index")
    command = ("compare", "tiny", "--sparsity", "0.5", "--multiple-of", "4", "--cut", "wanda")
    text = ("--text", "text.txt", "--text-blocks", "1", "--out", "compared")
    for more, message in ((("--index", "index"), "more processes than cuts"), ((), "expected --index")):
        for one in start_two(SURGEON, *command, *text, *more, where=where):
            ended = one.wait()
            assert ended.returncode == 2 and message in ended.stderr
    assert not (where / "compared").exists()
