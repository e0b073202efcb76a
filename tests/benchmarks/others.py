"""The same jobs by what a user would otherwise take: time and peak memory of whole commands, in turn, on one
checkpoint.

    python tests/benchmarks/others.py [--layers 24] [--rounds 3] [--only surgeon --only mergekit]

Half of the FFN channels of a random 24-layer, 2.2 GiB Llama-shaped bfloat16 checkpoint are cut by `surgeon
prune` (scores from an index made before, no repair), optipfair's command and Torch-Pruning (both by weight
magnitudes, in memory), and the checkpoint is copied through mergekit's passthrough, which cuts nothing. Then
its perplexity on 8 blocks of 128 tokens is measured by `surgeon eval` and by accelerate's disk offload. The
others are installed into an environment of their own, which borrows torch and transformers from this one.
Tools take turns; figures are medians of the rounds, ratios to ours of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import site
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from helpers.tiny_models import ROOT
from streamed import SHAPE, SURGEON, index_command, random_checkpoint

OTHERS = ("mergekit==0.1.5", "optipfair==0.4.2", "torch-pruning==1.6.1", "peft>=0.18", "immutables>=0.21")
MERGE = """slices:
- sources:
  - model: {model}
    layer_range: [0, {layers}]
merge_method: passthrough
dtype: bfloat16
"""
TORCH_PRUNING = """
import sys, torch, torch_pruning as tp
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
model.config.use_cache = False
ids = torch.randint(0, 256, (1, 16))
ratios = {layer.mlp.gate_proj: 0.5 for layer in model.model.layers}
pruner = tp.pruner.BasePruner(
    model, ids, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.0,
    pruning_ratio_dict=ratios,
    ignored_layers=[model.lm_head], output_transform=lambda out: out.logits,
)
pruner.step()
model.config.intermediate_size = model.model.layers[0].mlp.gate_proj.out_features
model.save_pretrained(sys.argv[2])
"""
OFFLOAD = """
import math, sys, torch
from accelerate import disk_offload
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
disk_offload(model, sys.argv[3], execution_device="cpu")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.tensor(tokenizer(open(sys.argv[2]).read())["input_ids"][: 8 * 128])
total = 0.0
with torch.no_grad():
    for block in ids.view(8, 1, 128):
        total += float(model(block, labels=block).loss)
print(math.exp(total / 8))
"""
RUN = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps([done.returncode, time.perf_counter() - started, peak, done.stderr.decode()[-300:]]))
"""


def environment(folder: Path) -> Path:
    """A Python with the other tools, and this environment's libraries."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", *OTHERS], check=True)
    return python


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command in a process of its own."""
    found = subprocess.run([sys.executable, "-c", RUN, *command], check=True, capture_output=True).stdout
    code, seconds, peak, talk = json.loads(found)
    if code:
        raise SystemExit(f"{' '.join(command[:4])} failed: {talk}")
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", default=[], help="a part of a tool's name, several times")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as name:
        scratch = Path(name)
        other = str(environment(scratch / "others"))
        model, text, out = scratch / "model", scratch / "text.txt", scratch / "out"
        random_checkpoint(model, {**SHAPE, "num_hidden_layers": options.layers})
        text.write_text((ROOT / "LICENSE").read_text())
        (scratch / "merge.yml").write_text(MERGE.format(model=model, layers=options.layers))
        timed(index_command(model, text, scratch / "index"))
        cut = ["--index", str(scratch / "index"), "--sparsity", "0.5", "--repair", "none", "--out", str(out)]
        fair = ["prune", "--model-path", str(model), "--pruning-percentage", "50", "--output-path", str(out)]
        jobs = {
            "cut": {
                "surgeon prune --repair none": [*SURGEON, "prune", str(model), *cut, "--quiet"],
                "mergekit passthrough (cuts nothing)": [
                    *(other, "-m", "mergekit.scripts.run_yaml", str(scratch / "merge.yml"), str(out)),
                ],
                "optipfair prune": [
                    *(other, "-c", "from optipfair.cli.commands import cli; cli()", *fair),
                    *("--device", "cpu", "--dtype", "bfloat16", "--quiet"),
                ],
                "Torch-Pruning, magnitudes": [other, "-c", TORCH_PRUNING, str(model), str(out)],
            },
            "perplexity": {
                "surgeon eval": [
                    *(
                        *SURGEON,
                        "eval",
                        str(model),
                        "--text",
                        str(text),
                        "--blocks",
                        "8",
                        "--block-size",
                        "128",
                    ),
                    "--quiet",
                ],
                "accelerate's disk offload": [
                    *(sys.executable, "-c", OFFLOAD, str(model), str(text), str(scratch / "offloaded")),
                ],
            },
        }
        for job, every in jobs.items():
            commands = {
                tool: command
                for tool, command in every.items()
                if not options.only or any(part in tool for part in options.only)
            }
            if not commands:
                continue
            print(f"{job:<38} {'seconds':>8} {'ratio':>6} {'peak MiB':>9}")
            runs: dict[str, list[tuple[float, int]]] = {tool: [] for tool in commands}
            for _ in range(options.rounds):
                for tool, command in commands.items():
                    for left in (out, scratch / "offloaded"):
                        shutil.rmtree(left, ignore_errors=True)
                    runs[tool].append(timed(command))
            base = [seconds for seconds, _ in next(iter(runs.values()))]
            for tool, found in runs.items():
                seconds = statistics.median(seconds for seconds, _ in found)
                ratio = statistics.median(one / ours for (one, _), ours in zip(found, base, strict=True))
                print(f"{tool:<38} {seconds:>8.1f} {ratio:>6.2f} {max(peak for _, peak in found) >> 20:>9}")


if __name__ == "__main__":
    main()
