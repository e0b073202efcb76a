"""Peak memory of every command at the smallest --memory it accepts, as Markdown.

    python tests/benchmarks/memory.py [--layers 24] [--only index ...]

A random Llama-shaped bfloat16 checkpoint is written (24 layers: 2.2 GiB). Each command is asked by `--dry-run
--json` for the smallest budget that would do, refused with one byte less, and run with just that, in a
process of its own. "used" is the peak of private memory (RssAnon, sampled) above that of the same command on
a tiny model, which is what the libraries take at work: threads and compiled kernels, besides their imports.
Pages of files that the operating system can drop are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from helpers.tiny_models import ROOT
from streamed import SHAPE, SURGEON, random_checkpoint

MIB = 1 << 20
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 4}


def prepare(folder: Path, shape: dict[str, Any]) -> None:
    """Write what the commands start from: a random model, text and two parts of an index."""
    folder.mkdir()
    random_checkpoint(folder / "model", {**SHAPE, **shape})
    words = (ROOT / "LICENSE").read_text()
    (folder / "text.txt").write_text(words)
    for place, name in enumerate(("one", "two")):
        (folder / f"{name}.txt").write_text(words[place * 5000 : (place + 1) * 5000])
        part = ["--calibration", f"{name}.txt", "--blocks", "4", "--block-size", "128", "--save-samples"]
        run = [*SURGEON, "index", "model", *part, "--out", name, "--quiet"]
        subprocess.run(run, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def private_peak(command: list[str], folder: Path) -> tuple[int, int, str]:
    """Exit status, peak of private memory in bytes, and the end of stderr of a command."""
    with tempfile.TemporaryFile("w+") as talk:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=talk)
        peak = 0
        while process.poll() is None:
            peak = max(peak, private_bytes(process.pid))
            time.sleep(0.004)
        talk.seek(0)
        return process.returncode, peak, talk.read()[-400:]


def private_bytes(pid: int) -> int:
    """RssAnon of a process, 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def commands() -> dict[str, list[str]]:
    """Every command with --memory, by name; `index` comes first, since others start from what it writes."""
    text = ["--text", "text.txt", "--text-block-size", "128"]
    calibration = ["--calibration", "text.txt", "--blocks", "8", "--block-size", "128"]
    cut = ["--index", "index", "--sparsity", "0.5"]
    blocks = ["--text", "text.txt", "--text-blocks", "2"]
    healing = ["--text", "text.txt", "--block-size", "128", "--tokens", "1024", "--batch-tokens", "512"]
    return {
        "index": ["index", "model", *calibration, "--out", "index"],
        "index --second-order": ["index", "model", *calibration, "--out", "second", "--second-order"],
        "prune --repair none": ["prune", "model", *cut, "--repair", "none", "--out", "none"],
        "heal": ["heal", "none", *healing],
        "prune": ["prune", "model", *cut, "--out", "cut"],
        "prune --allocation global": ["prune", "model", *cut, "--allocation", "global", "--out", "global"],
        "compare": ["compare", "model", *cut, *blocks, "--cut", "lp-hybrid:lstsq-acc", "--out", "compared"],
        "eval": ["eval", "model", *text],
        "eval --activations w8a8": ["eval", "model", *text, "--activations", "w8a8"],
        "ablate --conditions channels": [
            "ablate",
            "model",
            "--index",
            "index",
            *blocks,
            "--conditions",
            "channels",
        ],
        "quantize": ["quantize", "model", "--index", "index", "--group-size", "128", "--out", "int4"],
        "quantize --simulate": [
            "quantize",
            "model",
            "--index",
            "index",
            "--simulate",
            *calibration,
            "--out",
            "sim",
        ],
        "quantize --compare": ["quantize", "model", "--index", "index", "--compare", *blocks, *calibration],
        "merge-index": ["merge-index", "one", "two", "--model", "model", "--out", "both"],
    }


def main() -> None:
    """Write the checkpoint, run every command, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--only", action="append")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as scratch:
        folder, small = Path(scratch) / "whole", Path(scratch) / "small"
        prepare(folder, {"num_hidden_layers": options.layers})
        prepare(small, TINY)
        size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        print(f"checkpoint {size / MIB:,.0f} MiB\n")
        print("| command | smallest `--memory` | refused one byte below | libraries | used | of the budget |")
        print("|---|---|---|---|---|---|", flush=True)
        for name, arguments in commands().items():
            if options.only and name not in options.only and name != "index":
                continue
            command = [*SURGEON, *arguments]
            told = subprocess.run(
                [*command, "--dry-run", "--json"], cwd=folder, check=True, capture_output=True
            )
            text = told.stdout.decode()
            least = json.loads(text[text.index("{") :])["costs"]["smallest_bytes"]
            code, _, talk = private_peak([*command, "--memory", str(least - 1)], folder)
            refused = "yes" if code == 1 and "at least" in talk else "NO"
            code, peak, talk = private_peak([*command, "--memory", str(least)], folder)
            if code:
                raise SystemExit(f"{name} failed at its least: {talk}")
            code, libraries, talk = private_peak(command, small)
            if code:
                raise SystemExit(f"{name} failed on the tiny model: {talk}")
            used = peak - libraries
            found = [f"{count / MIB:,.0f} MiB" for count in (least, libraries, used)]
            cells = (found[0], refused, *found[1:], f"{used / least:.2f}")
            print(f"| `{name}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
