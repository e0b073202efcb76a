"""Peak memory and time of the streamed engine, as ratios in one run.

    python tests/benchmarks/streamed.py [--time] [--memory]

Memory: `surgeon index` (8 blocks of 128 tokens) and `surgeon prune`, with and without repair, on a random
24-layer Llama-shaped checkpoint of at least 2 GiB in bfloat16, each in its own process; the peak resident
size is compared with the checkpoint's. Time: streamed LP on SmolLM2 against an ordinary in-memory
`loss.backward()` with parameter gradients, same tokens, same dtype, in turn, each in a process of its own.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from helpers.tiny_models import ROOT, byte_tokenizer
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from surgery.budget.budget import largest_micro_batch
from surgery.budget.machine import measure_machine
from surgery.budget.model_size import ModelSize
from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.shard_writer import ShardWriter, TensorSpec
from surgery.engine.device import default_memory
from surgery.engine.loss import next_token_loss
from surgery.engine.open_model import Model
from surgery.engine.run_options import RunOptions
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.index.statistics import ChannelStatistics

MIB = 1 << 20
SURGEON = [sys.executable, "-m", "surgery"]
PLENTY = 1 << 40
SMOLLM2 = ROOT / ".cache" / "SmolLM2-135M-Instruct"
STREAMED = {"every layer recomputed": 0, "activations cached": PLENTY}  # bytes for cached activations
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
}


def random_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """Write a random checkpoint of a shape, one tensor in memory at a time."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    specs = {name: TensorSpec(torch.bfloat16, tuple(p.shape)) for name, p in model.named_parameters()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape))
    byte_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, specs) as writer:
        for name, spec in specs.items():
            scale = 0.02 if len(spec.shape) > 1 else 0
            tensor = torch.empty(spec.shape).normal_(0, scale or 1, generator=generator)
            writer.write(name, (tensor if scale else torch.ones(spec.shape)).to(torch.bfloat16))


def index_command(model: Path, text: Path, out: Path) -> list[str]:
    """`surgeon index` on 8 blocks of 128 tokens."""
    calibration = ["--calibration", str(text), "--blocks", "8", "--block-size", "128"]
    return [*SURGEON, "index", str(model), *calibration, "--out", str(out), "--overwrite", "--quiet"]


def peak(command: list[str]) -> int:
    """Peak resident bytes of a command run in a process of its own."""
    code = (
        "import resource,subprocess,sys\n"
        "subprocess.run(sys.argv[1:],check=True,stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss*1024)"
    )
    return int(subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True).stdout)


def memory() -> None:
    """Print peak memory of index and prune against the checkpoint's size."""
    python = sys.executable
    bare = peak([python, "-c", "pass"])
    imports = peak(
        [
            python,
            "-c",
            "import torch, transformers, accelerate, datasets, surgery.pruning.prune, surgery.index.build",
        ]
    )
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as scratch:
        folder = Path(scratch) / "random"
        random_checkpoint(folder, SHAPE)
        size = Checkpoint.open(folder).nbytes
        text = Path(scratch) / "text.txt"
        text.write_text((ROOT / "LICENSE").read_text())
        index = [*index_command(folder, text, Path(scratch) / "index"), "--memory", "600MiB"]
        prune = [*SURGEON, "prune", str(folder), "--index", f"{scratch}/index", "--sparsity", "0.5"]
        prune += ["--out", f"{scratch}/cut", "--overwrite", "--quiet", "--memory"]
        print(f"checkpoint                      {size / MIB:8.0f} MiB")
        print(
            f"interpreter                     {bare / MIB:8.0f} MiB, "
            f"with the libraries imported {imports / MIB:.0f}"
        )
        commands = {
            "index": (index, 1 / 3),
            "prune --repair none": ([*prune, "600MiB", "--repair", "none"], 1 / 4),
            "prune, repaired in parts": ([*prune, "600MiB"], None),
            "prune, repaired": ([*prune, "4GiB"], None),
        }
        for name, (command, limit) in commands.items():
            used = peak(command)
            bound = f" (bound {limit:.3f})" if limit else ""
            print(
                f"{name + ' peak':<31} {used / MIB:8.0f} MiB; above the interpreter "
                f"{(used - bare) / size:.3f} of the checkpoint, "
                f"above the imports {(used - imports) / size:.3f}{bound}"
            )


def streamed_lp(
    checkpoint: Checkpoint, ids: torch.Tensor, dtype: torch.dtype, cache_bytes: int
) -> list[torch.Tensor]:
    """LP of every layer from the streamed engine, building the model included."""
    device = torch.device("cpu")
    model = StreamedModel(Model(checkpoint, RunOptions(device, dtype, default_memory())))
    step = largest_micro_batch(ids.shape[1], "cpu")
    stream = TokenStream(model, ids, micro_batch=step, keep_inputs=True, cache_bytes=cache_bytes)
    count = len(model.layers)
    for number, layer in model.stream_layers(range(count)):
        stream.forward(number, layer)
    next_token_loss(stream, with_gradient=True)
    scores = [torch.empty(0)] * count
    for number, layer in model.stream_layers(reversed(range(count))):
        width = layer.mlp.down_proj.in_features
        sums = ChannelStatistics(int(width), *ids.shape, device)
        stream.backward(number, layer, lambda flow, sums=sums: sums.add(flow.first_block, flow.u, flow.s))
        scores[number] = sums.finish()["loss_proxy"]
    return scores


def in_memory_lp(folder: Path, ids: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """LP from the whole model and an ordinary backward pass, parameters requiring gradients, loading
    included.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    seen: list[torch.Tensor] = []

    def keep(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        inputs[0].retain_grad()
        seen.append(inputs[0])

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(keep)
    sums = [torch.zeros(model.config.intermediate_size) for _ in model.model.layers]
    step = largest_micro_batch(ids.shape[1], "cpu")
    for rows in ids.split(step):
        seen.clear()
        logits = model(rows, use_cache=False).logits[:, :-1]
        targets = rows[:, 1:].reshape(-1)
        functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), targets, reduction="sum"
        ).backward()
        for total, u in zip(sums, seen, strict=True):
            assert u.grad is not None
            total += (u.detach().float() * u.grad.float()).square().sum((0, 1))
    return [total / 2 / ids.numel() for total in sums]


def calibration_ids() -> torch.Tensor:
    """8 blocks of 512 tokens of Wikipedia, [8, 512]."""
    text = (ROOT / ".cache" / "wikipedia.txt").read_text()[:40000]
    return torch.tensor(AutoTokenizer.from_pretrained(SMOLLM2)(text)["input_ids"][: 8 * 512]).view(8, 512)


def measure(kind: str, dtype: torch.dtype, result: str) -> None:
    """Score SmolLM2 in one way, in this process; write seconds and scores to `result`."""
    ids, checkpoint = calibration_ids(), Checkpoint.open(SMOLLM2)
    gc.collect()
    start = time.perf_counter()
    if kind == "in memory":
        scores = in_memory_lp(SMOLLM2, ids, dtype)
    else:
        scores = streamed_lp(checkpoint, ids, dtype, STREAMED[kind])
    torch.save([time.perf_counter() - start, scores], result)


def timing(rounds: int = 3) -> None:
    """Print ratios of scoring time on SmolLM2, 8 blocks of 512 tokens, both dtypes: to in-memory and to the
    floor.

    Each way runs in a process of its own, in turn, its imports not counted. The floor is the operations that
    are needed once each, over the rate of this machine's matrix products, measured in each round. Then how
    far the ranks of LP in bfloat16 are those in float32.
    """
    checkpoint, ids = Checkpoint.open(SMOLLM2), calibration_ids()
    scores: list[list[torch.Tensor]] = []
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        opened = Model(checkpoint, RunOptions(torch.device("cpu"), dtype, PLENTY))
        sizes = ModelSize.of(opened.meta_model, dtype, ids.shape[1])
        needed = 4.0 * ids.numel() * (sizes.active + sizes.attention + sizes.head)
        ratios: dict[str, list[float]] = {f"{kind}, over in-memory backward": [] for kind in STREAMED}
        ratios["activations cached, over the floor"] = []
        worst = 0.0
        with tempfile.NamedTemporaryFile() as result:

            def alone(
                kind: str, name: str = name, result: str = result.name
            ) -> tuple[float, list[torch.Tensor]]:
                subprocess.run([sys.executable, __file__, "--measure", kind, name, result], check=True)
                seconds, scores = torch.load(result)
                return seconds, scores

            for _ in range(rounds):
                usual, theirs = alone("in memory")
                for kind in STREAMED:
                    seconds, ours = alone(kind)
                    ratios[f"{kind}, over in-memory backward"].append(seconds / usual)
                    pairs = zip(ours, theirs, strict=True)
                    worst = max(worst, *(float((a - b).abs().max() / b.max()) for a, b in pairs))
                floor = needed / measure_machine(opened).flops
                ratios["activations cached, over the floor"].append(seconds / floor)
        for kind, found in ratios.items():
            print(
                f"streamed LP, {name:8}, {kind}: median {statistics.median(found):.2f} "
                f"(min {min(found):.2f}, max {max(found):.2f})"
            )
        print(f"largest relative difference {worst:.1e}")
        scores.append(ours)
    agreement = [ranks_agree(*pair) for pair in zip(*scores, strict=True)]
    for place, what in enumerate(("rank correlation", "top 1% in common", "top half in common")):
        found = [layer[place] for layer in agreement]
        print(
            f"LP in bfloat16 against float32, {what}: "
            f"median {statistics.median(found):.4f} (min {min(found):.4f})"
        )


def ranks_agree(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float, float]:
    """Spearman's correlation of a layer's scores [F], and what its best hundredth and half have in common, in
    0..1.
    """
    ranks = torch.stack([scores.double().argsort().argsort().double() for scores in (one, other)])
    common = []
    for best in (max(1, len(one) // 100), len(one) // 2):
        first, second = (set(scores.topk(best).indices.tolist()) for scores in (one, other))
        common.append(len(first & second) / best)
    return (float(torch.corrcoef(ranks)[0, 1]), *common)


if __name__ == "__main__":
    if "--measure" in sys.argv:
        kind, name, result = sys.argv[2:]
        measure(kind, getattr(torch, name), result)
        raise SystemExit
    if "--time" not in sys.argv or "--memory" in sys.argv:
        memory()
    if "--memory" not in sys.argv or "--time" in sys.argv:
        timing()
    print(f"this process peaked at {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
