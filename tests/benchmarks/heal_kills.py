"""SIGKILL at random moments of a heal: does the same command always arrive at the same weights?

    python tests/benchmarks/heal_kills.py [--kills 20] [--seed 0]

A tiny random Llama and its cut. Targets are computed block by block and the state is saved after every step,
so that kills fall before, while and after files of the journal are written; moments are drawn evenly from the
time that work takes. Prints how many reruns arrived, what the killed runs had been doing, and what was left.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from kills import kill, started

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers.tiny_models import ROOT, byte_tokenizer, tiny_model

WEIGHTS = "model.safetensors"
BLOCKS = 64  # seen twice
HEAL = """
import sys
import surgery.heal.targets, surgery.heal.train
surgery.heal.targets.TARGET_CHUNK = 1
surgery.heal.train.SAVE_SECONDS = 0.0
from surgery.cli.main import main
sys.argv[0] = "surgeon"
main()
"""


def prepare(where: Path) -> None:
    """Save a tiny model, and its cut to half of the channels, with texts."""
    shape = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 256}
    tiny_model("llama", **shape).save_pretrained(where / "dense")
    byte_tokenizer().save_pretrained(where / "dense")
    (where / "text.txt").write_text((ROOT / "LICENSE").read_text())
    prune = ["prune", "dense", "--out", "cut", "--sparsity", "0.5", "--multiple-of", "8", "--repair", "none"]
    calibration = ["--calibration", "text.txt", "--blocks", "4", "--block-size", "64"]
    subprocess.run([sys.executable, "-m", "surgery", *prune, *calibration], cwd=where, check=True)


def hidden(where: Path) -> list[Path]:
    """Journals and unfinished folders."""
    return sorted(path for path in where.iterdir() if path.name.startswith("."))


def phase(where: Path) -> str:
    """What a killed run had been doing."""
    left = [path.name for path in hidden(where)]
    if any("partial" in name for name in left):
        return "writing"
    steps = where / ".healed.surgeon-journal-heal" / "steps.jsonl"
    lines = steps.read_text().splitlines() if steps.exists() else []
    chunks = sum(line.startswith("targets") for line in lines)
    return "steps" if chunks == BLOCKS else "targets"


def torture(command: list[str], where: Path, kills: int, chance: random.Random) -> None:
    """Kill and run again, until `kills` have come before the end; print how it went."""
    result = where / "healed"
    process, begun = started(command, where)
    process.communicate()
    work, expected = time.perf_counter() - begun, (result / WEIGHTS).read_bytes()
    print(f"not killed, it works for {work:.1f} s", flush=True)
    phases: Counter[str] = Counter()
    arrived = resumed = clean = 0
    while sum(phases.values()) < kills:
        for path in (result, *hidden(where)):  # a kill after the last rename may leave the journal
            shutil.rmtree(path, ignore_errors=True)
        kill(command, where, chance.uniform(0, work))
        if result.exists():  # too late: it had been complete
            assert (result / WEIGHTS).read_bytes() == expected
            continue
        phases[phase(where)] += 1
        again = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
        resumed += "Resuming" in again.stderr
        if again.returncode == 0 and (result / WEIGHTS).read_bytes() == expected:
            arrived += 1
        else:
            print(again.stderr, flush=True)
        clean += not hidden(where)
    print(
        f"{arrived} of {kills} reruns made the same weights ({resumed} went on from a journal); "
        f"{clean} left nothing behind; killed in {dict(phases)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        prepare(where)
        arguments = ["heal", "cut", "--tokens", str(2 * BLOCKS * 128), "--epochs", "2", "--text", "text.txt"]
        arguments += ["--block-size", "128", "--batch-tokens", "512", "--cross-entropy", "0.9"]
        command = [sys.executable, "-c", HEAL, *arguments, "--train", "all", "--out", "healed"]
        torture(command, where, options.kills, random.Random(options.seed))


if __name__ == "__main__":
    main()
