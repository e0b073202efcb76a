"""The library in six lines: open, index, plan, prune, measure; what `surgeon index`, `prune` and `eval` do.

python examples/library.py SmolLM2-135M-Instruct wikipedia.txt smaller wikipedia-held-out.txt
"""

from __future__ import annotations

import sys

import surgery


def main(source: str, text: str, out: str, held_out: str) -> None:
    """Prune half of the channels of a model, calibrated on one text, and print its perplexity on another."""
    model = surgery.open_model(source)
    index = surgery.build_index(model, text)
    plan = surgery.plan_pruning(model, index, sparsity=0.5)
    pruned = surgery.prune(model, index, plan, out)
    print(surgery.perplexity(pruned, held_out))


if __name__ == "__main__":
    main(*sys.argv[1:5])
