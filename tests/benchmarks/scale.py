"""From 1 to 7 billion parameters under one memory limit: peak memory, time, and how fast a cut is beside a
file copy.

    python tests/benchmarks/scale.py [--layers 4 32] [--memory 4GiB] [--limit 6GiB] [--hidden 4096] [--width
    11008] [--heal]

A random Llama-shaped bfloat16 checkpoint of each depth is written, indexed on 8 blocks of 128 tokens and cut
to half its channels without repair, the copy and the cut twice in turn, every command in a process of its own
and, where a memory cgroup can be made (Linux, root), under a hard limit on it; elsewhere under one on private
memory (RLIMIT_DATA). Set BENCHMARK_FOLDER to a disk with room for two copies. `--in-memory` also lets
`from_pretrained` and `loss.backward()` try the same under the same limit. `--heal` also heals the cut, two
steps of 4 blocks of 128 tokens with adapters of rank 16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from helpers.tiny_models import ROOT
from streamed import SHAPE, SURGEON, index_command, random_checkpoint

from surgery.byte_units import parse_bytes
from surgery.checkpoint.reader import Checkpoint

CGROUP = Path("/sys/fs/cgroup/memory/surgeon-benchmark")
CHILD = """
import json, os, resource, subprocess, sys, time
group, limit = sys.argv[1], int(sys.argv[2])
def enter():
    if group:
        open(group + "/cgroup.procs", "w").write(str(os.getpid()))
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
started = time.perf_counter()
done = subprocess.run(sys.argv[3:], preexec_fn=enter, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
seconds = time.perf_counter() - started
print(json.dumps([done.returncode, peak, seconds, done.stderr.decode()[-400:]]))
"""
COPY = """
import os, sys
with open(sys.argv[1], "wb") as out:
    for file in sys.argv[2:]:
        with open(file, "rb", buffering=0) as source:
            while piece := source.read(64 << 20):
                out.write(piece)
    out.flush()
    os.fsync(out.fileno())
os.unlink(sys.argv[1])
"""
IN_MEMORY = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
ids = torch.randint(0, 256, (1, 128))
model(ids, labels=ids).loss.backward()
"""


def limited(limit: int, command: list[str]) -> tuple[int, int, float, str]:
    """Exit status, peak resident bytes, seconds and the end of stderr of a command under a hard limit."""
    group = ""
    try:
        CGROUP.mkdir(exist_ok=True)
        (CGROUP / "memory.limit_in_bytes").write_text(str(limit))
        group = str(CGROUP)
    except OSError:
        pass
    child = [sys.executable, "-c", CHILD, group, str(limit), *command]
    code, peak, seconds, talk = json.loads(subprocess.run(child, check=True, capture_output=True).stdout)
    return code, peak, seconds, talk


def commands(folder: Path, text: Path, scratch: Path, memory: str) -> dict[str, list[str]]:
    """What is measured, by name: every command, and the copy of the checkpoint's files."""
    index, cut, healed = (str(scratch / name) for name in ("index", "cut", "healed"))
    limits = ["--memory", memory, "--quiet"]
    prune = ["prune", str(folder), "--index", index, "--sparsity", "0.5", "--repair", "none", "--out", cut]
    heal = ["heal", cut, "--text", str(text), "--block-size", "128", "--tokens", "1024", "--out", healed]
    files = [str(file) for file in sorted(folder.glob("*.safetensors"))]
    return {
        "index": [*index_command(folder, text, Path(index)), "--memory", memory],
        "copy": [sys.executable, "-c", COPY, str(scratch / "copy"), *files],
        "prune": [*SURGEON, *prune, "--overwrite", *limits],
        "heal": [*SURGEON, *heal, "--train", "lora:16", "--batch-tokens", "512", *limits],
    }


def measure(layers: int, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One depth: write, index, cut, copy."""
    folder, limit = scratch / "model", parse_bytes(options.limit)
    shape = {
        **SHAPE,
        "num_hidden_layers": layers,
        "hidden_size": options.hidden,
        "intermediate_size": options.width,
    }
    random_checkpoint(folder, {**shape, "num_key_value_heads": 32})
    text = scratch / "text.txt"
    text.write_text((ROOT / "LICENSE").read_text())
    checkpoint = Checkpoint.open(folder)
    run = commands(folder, text, scratch, options.memory)
    told = json.loads(
        subprocess.run([*run["index"], "--dry-run", "--json"], check=True, capture_output=True).stdout
    )
    found: dict[str, Any] = {
        "layers": layers,
        "parameters": checkpoint.parameters,
        "bytes": checkpoint.nbytes,
    }
    for name in ("index", "copy", "prune", "copy", "prune", *(["heal"] if options.heal else [])):
        code, peak, seconds, talk = limited(limit, run[name])
        if code:
            raise SystemExit(f"{name} failed under {options.limit}: {talk}")
        best = min(seconds, found.get(name, {"seconds": seconds})["seconds"])
        found[name] = {"peak": peak, "seconds": best}
    found["estimated"] = {"peak": told["costs"]["host_bytes"], **told["seconds"]}
    moved = (
        checkpoint.nbytes + 2 * Checkpoint.open(scratch / "cut").nbytes
    )  # the load gate reads the cut again
    rate = 2 * checkpoint.nbytes / found["copy"]["seconds"]
    found["prune"]["of_copy_speed"] = moved / found["prune"]["seconds"] / rate
    if options.in_memory:
        code, peak, seconds, _ = limited(limit, [sys.executable, "-c", IN_MEMORY, str(folder)])
        found["in_memory"] = {"exit": code, "peak": peak, "seconds": seconds}
    for name in ("model", "index", "cut", "healed"):
        shutil.rmtree(scratch / name, ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--limit", default="6GiB")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--width", type=int, default=11008)
    parser.add_argument("--in-memory", action="store_true")
    parser.add_argument("--heal", action="store_true")
    options = parser.parse_args()
    gib = 1 << 30
    for layers in options.layers:
        with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as name:
            found = measure(layers, options, Path(name))
        print(json.dumps(found))
        print(
            f"{found['parameters'] / 1e9:.2f} B parameters, {found['bytes'] / gib:.1f} GiB, "
            f"limit {options.limit}, "
            f"--memory {options.memory}\n"
            f"  index  peak {found['index']['peak'] / gib:.2f} GiB "
            f"(estimated {found['estimated']['peak'] / gib:.2f} above the libraries), "
            f"{found['index']['seconds']:.0f} s "
            f"(estimated {found['estimated']['compute']:.0f} s of arithmetic)\n"
            f"  prune  peak {found['prune']['peak'] / gib:.2f} GiB, {found['prune']['seconds']:.0f} s: "
            f"{found['prune']['of_copy_speed']:.2f} of a file copy's bytes read and written a second"
        )
        if "heal" in found:
            peak, seconds = found["heal"]["peak"], found["heal"]["seconds"]
            print(f"  heal   peak {peak / gib:.2f} GiB, {seconds:.0f} s")
        if "in_memory" in found:
            code = found["in_memory"]["exit"]
            print(f"  in memory: exit {code} {'(killed)' if code < 0 else ''}")


if __name__ == "__main__":
    main()
