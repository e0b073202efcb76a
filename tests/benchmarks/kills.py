"""SIGKILL at random moments of an index and a prune with repair: does the same command always arrive at the
same bytes?

    python tests/benchmarks/kills.py [--kills 20] [--seed 0]

A tiny random Llama, so that most of a run is work between imports and the end; moments are drawn evenly from
the time that work takes. Prints how many reruns arrived, and how many had gone on from a journal.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers.tiny_models import ROOT, byte_tokenizer, tiny_model


def digest(folder: Path) -> str:
    """A hash over names and bytes of all files of a folder."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            total.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


def started(command: list[str], where: Path) -> tuple[subprocess.Popen[str], float]:
    """A process that has begun to work (its first line of talk is out), and when that was."""
    process = subprocess.Popen(
        command, cwd=where, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    process.stderr.readline()
    return process, time.perf_counter()


def kill(command: list[str], where: Path, after: float) -> None:
    """Start a process and kill it `after` seconds of work."""
    process, begun = started(command, where)
    time.sleep(max(0.0, begun + after - time.perf_counter()))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def torture(command: list[str], where: Path, result: Path, kills: int, chance: random.Random) -> None:
    """Kill and run again, until `kills` have come before the end; print how it went."""
    process, begun = started(command, where)
    process.communicate()
    work, expected = time.perf_counter() - begun, digest(result)
    arrived = resumed = early = 0
    while early < kills:
        shutil.rmtree(result)
        kill(command, where, chance.uniform(0, work))
        if result.exists():  # too late: it had been complete
            assert digest(result) == expected
            continue
        early += 1
        again = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
        resumed += "Resuming" in again.stderr
        arrived += again.returncode == 0 and digest(result) == expected
    left = [path.name for path in where.iterdir() if path.name.startswith(".")]
    print(
        f"{command[3]}: {arrived} of {kills} reruns made the same bytes ("
        f"{resumed} went on from a journal); left behind: {left or 'nothing'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        shape = {"num_hidden_layers": 12, "hidden_size": 128, "intermediate_size": 512}
        tiny_model("llama", **shape).save_pretrained(where / "tiny")
        byte_tokenizer().save_pretrained(where / "tiny")
        (where / "text.txt").write_text((ROOT / "LICENSE").read_text())
        surgeon = [sys.executable, "-m", "surgery"]
        calibration = ["--calibration", "text.txt", "--blocks", "32", "--block-size", "256"]
        index = [*surgeon, "index", "tiny", "--out", "index", *calibration]
        prune = [
            *surgeon,
            "prune",
            "tiny",
            "--index",
            "index",
            "--multiple-of",
            "8",
            "--out",
            "cut",
            "--sparsity",
            "0.5",
        ]
        chance = random.Random(options.seed)
        torture(index, where, where / "index", options.kills, chance)
        torture(prune, where, where / "cut", options.kills, chance)


if __name__ == "__main__":
    main()
