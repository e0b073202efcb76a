"""Measure how methods differ at half the channels, without writing a checkpoint; a score of your own among
them.

    python examples/compare_methods.py SmolLM2-135M-Instruct smollm2-index wikipedia-held-out.txt

On the command line, for the built-in methods: surgeon compare MODEL --index INDEX --text TEXT.
"""

from __future__ import annotations

import sys

from custom_score import loudest

import surgery
from surgery.evaluate.compare import Comparison
from surgery.evaluate.perplexity import evaluation_blocks

METHODS = ("scar-prot", "wanda", "magnitude", "loudest")


def main(source: str, index_folder: str, text_file: str) -> None:
    """Print perplexity and KL to the dense model, a line a method."""
    surgery.register_method("loudest", surgery.Method(loudest, protects=True))
    model, index = surgery.open_model(source), surgery.ChannelIndex.load(index_folder)
    blocks = evaluation_blocks(model, text_file, blocks=8, block_size=256)
    plans = [
        surgery.plan_pruning(model, index, method=method, multiple_of=4, repair="bias") for method in METHODS
    ]
    for row in Comparison(model, index, [blocks]).add(plans):
        print(f"{row.method:<10} perplexity {row.perplexity:.4f}, KL {row.kl:.6f} nats a token")


if __name__ == "__main__":
    main(*sys.argv[1:4])
