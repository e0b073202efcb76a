"""Cut a model by a score of your own.

    python examples/custom_score.py SmolLM2-135M-Instruct smollm2-index smaller

The score here is the largest |u| a channel ever had times the norm of its column of down_proj: what it can write at most.
A score sees what the index holds of one FFN and returns one number a channel; the lowest go.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from surgery import ChannelIndex, Checkpoint, make_plan, register_method, write_pruned
from surgery.index import FfnIndex


def loudest(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """max |u_i| * ||W_i||, W = down_proj, [F]."""
    return ffn.statistics["max_abs"] * ffn.statistics["down_norm"]


def main(model: str, index_folder: str, out: str) -> None:
    """Remove a quarter of the channels, supernodes and super-weight columns excepted, and write the rest."""
    register_method("loudest", loudest)
    index = ChannelIndex.load(index_folder)
    plan = make_plan(index, method="loudest", sparsity=0.25, multiple_of=4, repair="bias")
    manifest = write_pruned(Checkpoint.open(model), index, plan, Path(out))
    before, after = manifest["source"]["parameters"], manifest["result"]["parameters"]
    print(f"{out}: width {plan.width_before} → {plan.width_after}, parameters {before:,} → {after:,}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
