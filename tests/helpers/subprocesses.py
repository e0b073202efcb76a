"""Commands in processes of their own: several by torchrun, and ones that kill themselves at a moment.

KILL is Python that runs `surgeon` and sends itself SIGKILL when it opens a file for the n-th time: KILL_AT is
"file name:n", KILL_IN the end of its folder's name.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
# Imported once, by the process that the others are forked from; those spare the seconds this takes.
FORKS.set_forkserver_preload(
    [
        *("torch", "transformers.modeling_utils", "transformers.models.auto.modeling_auto"),
        *("transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama"),
        *("surgery.cli.main", "surgery.index.build", "surgery.pruning.prune", "surgery.heal.heal"),
    ]
)
STREAMS = ("stdout", "stderr")
SURGEON = "from surgery.cli.main import main; main()"
RUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
KILL = """
import os, signal, sys
sys.argv[0] = "surgeon"
name, left = os.environ["KILL_AT"].split(":")
folder = os.environ.get("KILL_IN", "surgeon-journal/")
left = int(left)
def watch(event, arguments):
    global left
    if event == "open" and str(arguments[0]).endswith(folder + name):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
from surgery.cli.main import main
main()
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, minus the number of a signal, and what it said."""

    returncode: int | None
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Forked:
    """A process that runs a script, and the folder of its output."""

    process: Any
    output: tempfile.TemporaryDirectory[str]

    @classmethod
    def start(cls, code: str, *words: str, where: Path, **environment: str) -> Forked:
        """Run Python `code` as a script with arguments `words` in folder `where`."""
        output = tempfile.TemporaryDirectory()
        process = FORKS.Process(target=_run_script, args=(code, words, where, environment, output.name))
        process.start()
        return cls(process, output)

    def wait(self) -> Ended:
        """How it ended, which it is to do within five minutes."""
        self.process.join(300)
        status = self.process.exitcode
        self.process.kill()
        self.process.join()
        with self.output as folder:
            return Ended(status, *((Path(folder) / name).read_text() for name in STREAMS))


def run_forked(code: str, *words: str, where: Path, **environment: str) -> Ended:
    """Run Python `code` as a script with arguments `words` in folder `where`, in a process of its own."""
    return Forked.start(code, *words, where=where, **environment).wait()


def start_two(code: str, *words: str, where: Path, second: dict[str, str] | None = None) -> list[Forked]:
    """Start the same in two processes, with the environment that torchrun would give them, and more of it for
    the `second`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [{"RANK": "0", "LOCAL_RANK": "0"}, {"RANK": "1", "LOCAL_RANK": "1", **(second or {})}]
    return [Forked.start(code, *words, where=where, **group, **rank) for rank in ranks]


def in_two_processes(code: str, *words: str, where: Path) -> list[Ended]:
    """Run the same in two processes, neither of which may fail."""
    ended = [process.wait() for process in start_two(code, *words, where=where)]
    for one in ended:
        assert one.returncode == 0, one.stderr[-3000:]
    return ended


def _run_script(code: str, words: tuple[str, ...], where: Path, more: dict[str, str], output: str) -> None:
    for number, name in enumerate(STREAMS, 1):
        os.dup2(os.open(Path(output) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(more)
    os.chdir(where)
    sys.argv = ["surgeon", *words]
    exec(compile(code, "script", "exec"), {"__name__": "__main__"})


def torchrun(where: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*RUN, *arguments],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def torchrun_killed(where: Path, at: str, folder: str, *arguments: str) -> None:
    """Run `surgeon ARGUMENTS` in two processes, one of which is killed when it opens `at` ("file:n") in
    `folder`; the run must say so.
    """
    (where / "kill.py").write_text(KILL)
    environment = {**os.environ, "KILL_AT": at, "KILL_IN": folder, "OMP_NUM_THREADS": "1"}
    command = [*RUN, "kill.py", *arguments]
    killed = subprocess.run(
        command, cwd=where, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert killed.returncode != 0 and f"exitcode  : -{signal.SIGKILL.value}" in killed.stderr
