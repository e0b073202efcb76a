"""Train a small mixture of experts on bytes, then index and prune it: a real model of another architecture.

    python examples/second_architecture.py FOLDER

A Mixtral of half a million parameters, four experts a layer, reads Wikipedia byte by byte for two or three
minutes on two CPU cores. Then the same commands as for any model: index, prune at 25% and 50%, perplexity of
each.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from assets import fetch_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast

STEPS, BATCH, BLOCK = 800, 32, 128


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def train(text: str, target: Path) -> None:
    """Train the model on a text and save it."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = MixtralConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=BLOCK,
        output_router_logits=True,  # so that the loss keeps the experts evenly used
        bos_token_id=256,
        eos_token_id=257,
    )
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.tensor(tokenizer(text[:3_000_000])["input_ids"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        starts = torch.randint(0, len(ids) - BLOCK, (BATCH,))
        batch = torch.stack([ids[start : start + BLOCK] for start in starts.tolist()])
        output = model(input_ids=batch, labels=batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {output.loss.item():.3f} nats a byte", flush=True)
    model.config.output_router_logits = False
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def surgeon(*arguments: str) -> None:
    """Run a surgeon command as it would be typed."""
    print("\n$ surgeon", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "surgery", *arguments], check=True)


def main(folder: Path) -> None:
    """Train, index, prune, evaluate."""
    folder.mkdir(parents=True, exist_ok=True)
    calibration, held_out = fetch_text(folder)
    model = folder / "byte-mixtral"
    if not model.exists():
        train(calibration.read_text(encoding="utf-8"), model)
    index = folder / "byte-mixtral-index"
    text = ["--calibration", str(calibration), "--blocks", "256", "--block-size", str(BLOCK)]
    surgeon("index", str(model), "--out", str(index), "--overwrite", *text)
    measure = ["--text", str(held_out), "--blocks", "400", "--block-size", str(BLOCK)]
    surgeon("eval", str(model), *measure)
    for percent in (25, 50):
        cut = folder / f"byte-mixtral-{percent}"
        size = ["--sparsity", str(percent / 100), "--multiple-of", "8"]
        surgeon(
            "prune",
            str(model),
            "--index",
            str(index),
            *size,
            "--method",
            "scar-prot",
            "--out",
            str(cut),
            "--overwrite",
        )
        surgeon("eval", str(cut), *measure)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".cache"))
