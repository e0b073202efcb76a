"""Measure how methods differ at half the channels, without writing a checkpoint; a score of your own among them.

    python examples/compare_methods.py SmolLM2-135M-Instruct smollm2-index wikipedia-held-out.txt

On the command line, for the built-in methods: surgeon compare MODEL --index INDEX --text TEXT.
"""

from __future__ import annotations

import sys

from custom_score import loudest

from surgery import ChannelIndex, Checkpoint, make_plan, register_method
from surgery.calibration import load_tokenizer, read_text, token_blocks
from surgery.compare import Comparison
from surgery.gate import cpu_options

METHODS = ("scar-prot", "wanda", "magnitude", "loudest")


def main(model: str, index_folder: str, text_file: str) -> None:
    """Print perplexity and KL to the dense model, a line a method."""
    register_method("loudest", loudest)
    checkpoint, index = Checkpoint.open(model), ChannelIndex.load(index_folder)
    text, name = read_text(text_file)
    blocks = token_blocks(load_tokenizer(checkpoint), text, name, block_size=256, blocks=8)
    plans = [
        make_plan(index, method=method, sparsity=0.5, multiple_of=4, repair="bias") for method in METHODS
    ]
    for row in Comparison(checkpoint, index, [blocks], cpu_options(checkpoint)).add(plans):
        print(f"{row.method:<10} perplexity {row.perplexity:.4f}, KL {row.kl:.6f} nats a token")


if __name__ == "__main__":
    main(*sys.argv[1:4])
