"""How much of a LoRA's gain on its own text is left on a cut model: with `surgeon adapt`, and by parts of it.

    python tests/benchmarks/adapting.py MODEL CUT TEXT [--steps 60] [--held-out 16] [--work DIR]

CUT is a folder that `surgeon prune` wrote from MODEL. A LoRA of rank 16 on all linears is trained on MODEL
with peft, on blocks of TEXT but its last ones, which are measured on. The fraction kept is the gain in nats a
token on CUT over that on MODEL. Variants: `adapt` with the adapter's training text for the refit, `adapt`
without a refit, and without the adapter of the down projections. Nothing is trained on CUT.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.cli.main import main as surgeon

RANK, BATCH, SIZE, RATE, WARMUP = 16, 2, 512, 1e-3, 5
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def blocks_of(model: Path, text: Path) -> torch.Tensor:
    """All blocks of SIZE tokens of a text file."""
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(), return_tensors="pt").input_ids[0]
    return ids[: len(ids) // SIZE * SIZE].view(-1, SIZE)


def load(folder: Path, adapter: Path | None = None) -> Any:
    """A folder in bfloat16, with an adapter where one is given."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)


@torch.no_grad()
def nats(folder: Path, blocks: torch.Tensor, adapter: Path | None = None) -> float:
    """Mean cross-entropy of a token."""
    model = load(folder, adapter).eval()
    losses = [model(block[None], labels=block[None], use_cache=False).loss.float() for block in blocks]
    return float(torch.stack(losses).mean())


def train(model: Path, blocks: torch.Tensor, steps: int, out: Path) -> None:
    """Train the adapter: AdamW, a linear schedule, blocks in a seeded order."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS, task_type="CAUSAL_LM")
    student = peft.get_peft_model(load(model), config)
    trained = [one for one in student.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARMUP) * (1 - step / steps)
        ids = blocks[order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(blocks)]]
        student(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    student.save_pretrained(out)


def adapt(lora: Path, cut: Path, model: Path, out: Path, *options: str) -> Path:
    """Run `surgeon adapt` in this process."""
    words = ["adapt", str(lora), "--onto", str(cut), "--dense", str(model), "--out", str(out), "--overwrite"]
    surgeon([*words, "--quiet", *options], standalone_mode=False)
    return out


def without_down(adapter: Path, out: Path) -> Path:
    """The adapter with that of the down projections set to zero."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in tensors:
        if "down_proj.lora_B" in name:
            tensors[name] = torch.zeros_like(tensors[name])
    out.mkdir(exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    return out


def run(options: argparse.Namespace, work: Path) -> None:
    """Train unless the adapter is there, carry, measure, and print a table."""
    blocks = blocks_of(options.model, options.text)
    text, held_out = blocks[: -options.held_out], blocks[-options.held_out :]
    lora = work / "lora"
    if not lora.exists():
        started = time.time()
        train(options.model, text, options.steps, lora)
        print(f"trained for {time.time() - started:.0f} s on {options.steps * BATCH * SIZE:,} tokens")
    own = work / "own.txt"  # the training text alone
    own.write_text(AutoTokenizer.from_pretrained(options.model).decode(text.flatten()))
    refit = ("--calibration", str(own), "--blocks", str(options.blocks), "--block-size", str(SIZE))
    variants = {
        "adapt, refitted on the adapter's text": adapt(lora, options.cut, options.model, work / "a", *refit),
        "adapt --no-refit": adapt(lora, options.cut, options.model, work / "b", "--no-refit"),
    }
    variants["adapt, down_proj's adapter left out"] = without_down(work / "b", work / "c")
    dense = [nats(options.model, held_out, one) for one in (None, lora)]
    before = nats(options.cut, held_out)
    gain = dense[0] - dense[1]
    print(f"dense {dense[0]:.4f} -> {dense[1]:.4f}, gain {gain:.4f} nats; cut {before:.4f}")
    for name, adapter in variants.items():
        after = nats(options.cut, held_out, adapter)
        print(
            f"{name}: {after:.4f}, gain {before - after:.4f}, kept {(before - after) / gain:.3f}", flush=True
        )
    modules = json.loads((work / "a" / "surgeon.json").read_text())["adapter"]["refit"]["modules"]
    for key in ("held_out_before", "held_out_after"):
        print(key, f"{sum(one[key] for one in modules.values()) / len(modules):.4f}")


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("cut", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=32, help="of the refit")
    parser.add_argument("--work", type=Path, help="keep the adapters here, and take one trained earlier")
    options = parser.parse_args()
    if options.work is not None:
        options.work.mkdir(exist_ok=True, parents=True)
        run(options, options.work)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder))


if __name__ == "__main__":
    main()
