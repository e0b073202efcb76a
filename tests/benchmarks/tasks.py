"""Streamed lm-eval against lm-eval's own in-memory model: the same answers, time as a ratio, peak memory.

    python tests/benchmarks/tasks.py [--equal] [--memory] [--model FOLDER] [--text FILE]

Equal: `surgeon_continuation` (100 items of four options) and `surgeon_cloze` (100 items) on a model by
lm-eval's `hf` and by `surgeon`, in float32, in one process and in turn. Memory: the first of these tasks on a
random 24-layer checkpoint of 2.2 GiB in bfloat16, in a process of its own; the peak resident size is compared
with the checkpoint's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from helpers.tiny_models import ROOT
from streamed import MIB, SHAPE, SMOLLM2, SURGEON, peak, random_checkpoint

from surgery.checkpoint.reader import Checkpoint
from surgery.engine.open_model import open_model
from surgery.evaluate.lm_eval import _answers, _evaluate, load_tasks
from surgery.evaluate.text_tasks import CLOZE, CONTINUATION

ITEMS = 100  # of each task


def equal(folder: Path, text: Path) -> None:
    """Print how the answers of both ways differ, item by item, and the ratio of their times."""
    from lm_eval.models.huggingface import HFLM

    from surgery.evaluate.harness_model import SurgeonLM

    opened = open_model(folder, device="cpu", dtype="float32", memory="2GiB")
    tasks = load_tasks(opened, [CONTINUATION, CLOZE], limit=ITEMS, text=str(text))
    found: dict[str, dict[str, Any]] = {}
    seconds = {}
    ways = {
        "in memory": lambda: HFLM(str(folder), device="cpu", dtype="float32", batch_size=16),
        "streamed": lambda: SurgeonLM(opened),
    }
    for name, make in ways.items():
        start = time.perf_counter()
        found[name] = _evaluate(make(), tasks)
        seconds[name] = time.perf_counter() - start
    print(f"streamed over in memory, loading included: {seconds['streamed'] / seconds['in memory']:.2f}")
    for task in (CONTINUATION, CLOZE):
        sides = [found[name]["samples"][task] for name in ways]
        pairs = list(zip(*sides, strict=True))
        nats = [[response[0][0] for sample in side for response in sample["resps"]] for side in sides]
        largest = max(abs(a - b) for a, b in zip(*nats, strict=True))
        answers = [_answers(side) for side in sides]
        same = sum(a.chosen == b.chosen for a, b in zip(*answers, strict=True))
        greedy = sum(
            a["resps"][i][0][1] == b["resps"][i][0][1] for a, b in pairs for i in range(len(a["resps"]))
        )
        accuracy = [found[name]["results"][task]["acc,none"] for name in ways]
        print(
            f"{task}: {len(pairs)} items, {len(nats[0])} log-likelihoods, largest difference {largest:.1e} "
            f"nats; same option in {same}, same greedy flag in {greedy}; accuracy {accuracy[0]:.3f} in "
            f"memory, {accuracy[1]:.3f} streamed"
        )


def memory(text: Path) -> None:
    """Print the peak of `surgeon eval --tasks` on a random checkpoint against its size."""
    bare = peak([sys.executable, "-c", "pass"])
    code = "import torch, transformers, datasets, lm_eval.models.huggingface"
    imports = peak([sys.executable, "-c", code])
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as scratch:
        folder = Path(scratch) / "random"
        random_checkpoint(folder, SHAPE)
        size = Checkpoint.open(folder).nbytes
        command = [*SURGEON, "eval", str(folder), "--tasks", CONTINUATION, "--task-text", str(text)]
        used = peak([*command, "--limit", "4", "--memory", "600MiB", "--quiet"])
        print(f"checkpoint                {size / MIB:8.0f} MiB")
        print(f"interpreter               {bare / MIB:8.0f} MiB, with lm-eval imported {imports / MIB:.0f}")
        print(
            f"eval --tasks, peak        {used / MIB:8.0f} MiB; {used / size:.3f} of the checkpoint, "
            f"{(used - imports) / size:.3f} above the imports (bound {1 / 3:.3f})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--equal", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--model", type=Path, default=SMOLLM2)
    parser.add_argument("--text", type=Path, default=ROOT / ".cache" / "wikipedia-held-out.txt")
    options = parser.parse_args()
    if options.equal or not options.memory:
        equal(options.model, options.text)
    if options.memory or not options.equal:
        memory(options.text)
