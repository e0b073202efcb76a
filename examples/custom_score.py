"""Prune by a score of your own.

    python examples/custom_score.py SmolLM2-135M-Instruct smollm2-index smaller

The score here is the largest |u| a channel ever had times the norm of its column of down_proj: the most it
can write. A score gets what the index holds of one FFN and returns one number a channel; the lowest go. To
use one with `surgeon prune --method`, make it a package as in `examples/own_method`.
"""

from __future__ import annotations

import sys

import torch

import surgery


def loudest(ffn: surgery.FfnIndex, _: torch.Generator) -> torch.Tensor:
    """max |u_i| * ||W_i||, W = down_proj, [F]."""
    return ffn.statistics["max_abs"] * ffn.statistics["down_norm"]


def main(source: str, index_folder: str, out: str) -> None:
    """Remove a quarter of the channels, except supernodes and super-weight columns, and write the rest."""
    surgery.register_method("loudest", surgery.Method(loudest, protects=True))
    model, index = surgery.open_model(source), surgery.ChannelIndex.load(index_folder)
    plan = surgery.plan_pruning(model, index, method="loudest", sparsity=0.25, multiple_of=4, repair="bias")
    pruned = surgery.prune(model, index, plan, out)
    before, after = model.checkpoint.parameters, pruned.checkpoint.parameters
    print(f"{out}: width {plan.width_before} → {plan.width_after}, parameters {before:,} → {after:,}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
