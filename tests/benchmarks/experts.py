"""Fewer experts against narrower ones at equal size, on a small mixture trained for it.

    python tests/benchmarks/experts.py TEXT HELD_OUT FOLDER

A Mixtral of half a million parameters, eight experts a layer of which a token goes to two, reads TEXT byte by
byte. Then a quarter and half of its experts go, by REAP's score and by the loss proxy, or as many channels of
every expert; without repair and with it. Prints a Markdown table of the perplexity per byte on HELD_OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast

import surgery

STEPS, BATCH, BLOCK, RATE, EXPERTS = 500, 16, 128, 3e-3, 8


def train(text: str, folder: Path) -> None:
    """Train the mixture and save it."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    config = MixtralConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        output_router_logits=True,  # so that the loss keeps the experts evenly used
        bos_token_id=256,
        eos_token_id=257,
    )
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.tensor(fast(text[:1_600_000])["input_ids"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        starts = torch.randint(0, len(ids) - BLOCK, (BATCH,))
        batch = torch.stack([ids[start : start + BLOCK] for start in starts.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def main(text: str, held_out: str, folder: Path) -> None:
    """Train, cut, measure."""
    source = folder / "byte-mixtral-8"
    if not source.exists():
        train(Path(text).read_text(encoding="utf-8"), source)
    model = surgery.open_model(source, dtype="float32")
    index = surgery.build_index(model, text=text, blocks=96, block_size=BLOCK)

    def measured(one: surgery.Model) -> str:
        return f"{surgery.perplexity(one, held_out, blocks=200, block_size=BLOCK).perplexity:.2f}"

    print("| cut | parameters | without repair | repaired |\n|---|---|---|---|", flush=True)
    print(f"| none | {model.checkpoint.parameters:,} | {measured(model)} | |", flush=True)
    for share in (0.25, 0.5):
        for what in ("reap", "lp", "narrower"):
            size, cuts = share, ()
            if what != "narrower":
                size, cuts = 0.0, (surgery.plan_experts(model, index, int(EXPERTS * (1 - share)), what),)
            found = []
            for repair in ("none", "lstsq-acc"):
                plan = surgery.plan_pruning(
                    model, index, sparsity=size, multiple_of=8, cuts=cuts, repair=repair
                )
                cut = surgery.prune(model, index, plan, folder / "byte-mixtral-cut", overwrite=True)
                found.append(measured(cut))
            name = f"{share:.0%} of the experts' weights, {what}"
            print(f"| {name} | {cut.checkpoint.parameters:,} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
