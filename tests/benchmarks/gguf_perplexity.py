"""Perplexity of exported types as llama.cpp computes it, beside surgeon's of the folder, and what both write.

    python tests/benchmarks/gguf_perplexity.py FOLDER TEXT [--types f16 q8_0 q4_k_m] [--blocks 2]

llama.cpp is asked for one token after every prefix of a block, with a bias that makes it take the block's own
next token; the log-probability it reports is that before the bias.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from transformers import AutoModelForCausalLM

import surgery
import surgery.loading
from surgery.checkpoint.transformers_model import load_tokenizer
from surgery.engine.open_model import open_checkpoint
from surgery.export.file_types import file_type
from surgery.export.write import known_super_weights, plan_gguf, write_gguf
from surgery.text import Text, first_blocks

PROMPT = "The capital of France is"


def server(file: Path, context: int) -> Any:
    options = xllamacpp.CommonParams()
    options.model.path = str(file)
    options.n_ctx, options.n_parallel, options.warmup, options.verbosity = context, 1, False, -1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = torch.get_num_threads()
    return xllamacpp.Server(options)


def nats(llama: Any, block: list[int]) -> list[float]:
    """-log p of every token of a block after the first, in nats."""
    found = []
    for place in range(1, len(block)):
        request = {
            "prompt": block[:place],
            "max_tokens": 1,
            "logprobs": 1,
            "logit_bias": [[block[place], 1000.0]],
        }
        answer = llama.handle_completions(request)["choices"][0]["logprobs"]
        entries = answer["content"] if answer else []
        # half a character has no answer
        found.append(-entries[0]["logprob"] if entries and entries[0]["id"] == block[place] else math.nan)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_k_m"])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=256)
    given = parser.parse_args()
    checkpoint = open_checkpoint(given.folder)
    tokenizer = load_tokenizer(checkpoint)
    content = given.text.read_text(encoding="utf-8")
    text = Text(given.text.name, lambda _: iter([content]), size=len(content.encode()))
    blocks = first_blocks(tokenizer, text, block_size=given.block_size, blocks=given.blocks)
    model = AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logs = torch.log_softmax(model(blocks.ids.long()).logits[:, :-1].float(), -1)
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=16, do_sample=False)[0]
    dense = -logs.gather(-1, blocks.ids.long()[:, 1:, None]).flatten()
    print(
        f"surgery.perplexity: {surgery.perplexity(surgery.open_model(given.folder, dtype='float32'), blocks)}"
    )
    print(f"transformers, float32: {float(dense.mean().exp()):.4f}  {tokenizer.decode(made)!r}")
    for name in given.types:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            plan = plan_gguf(checkpoint, file_type(name), known_super_weights(checkpoint))
            write_gguf(plan, file)
            llama = server(file, given.block_size + 8)
            found = torch.tensor([n for block in blocks.ids.tolist() for n in nats(llama, block)])
            request = {"prompt": ids[0].tolist(), "max_tokens": 16, "temperature": 0}
            written = llama.handle_completions(request)["choices"][0]["text"]
        told = ~found.isnan()
        print(
            f"llama.cpp, {name}: {float(found[told].mean().exp()):.4f}, transformers on the same "
            f"{int(told.sum())} tokens {float(dense[told].mean().exp()):.4f}; "
            f"{plan.nbytes / 2**20:.0f} MiB  {PROMPT + written!r}",
            flush=True,
        )


if __name__ == "__main__":
    main()
