"""Predicted against measured: a folder that `surgeon prune DENSE --target-speed` wrote, and DENSE.

    python tests/benchmarks/target_speed.py DENSE FOLDER [ROUNDS]

Both models stay in memory and are timed in turn, so that a machine that slows down slows both. Prints how
many times as fast the cut is by its plan, and by medians over rounds, with the 95% bootstrap interval.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from surgery.bench.layer_speed import DECODE, SETTINGS
from surgery.budget.target import SpeedModel
from surgery.checkpoint.manifest import MANIFEST
from surgery.frontier.speed import timed

RESAMPLES = 2000


@torch.no_grad()
def main(dense: str, folder: str, rounds: int) -> None:
    """Time both in turn and print the ratios."""
    search = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))["plan"]["search"]
    speed = SpeedModel(**search["target"]["speed"])
    models = [AutoModelForCausalLM.from_pretrained(name).eval() for name in (dense, folder)]
    ids = torch.randint(models[0].config.vocab_size, (1, SETTINGS.prompt_tokens))
    place, tokens = (1, SETTINGS.new_tokens) if speed.of == DECODE else (0, SETTINGS.prompt_tokens)

    def seconds(model: torch.nn.Module) -> float:
        return timed(model, ids, torch.device("cpu"), SETTINGS.new_tokens)[place] / tokens

    for model in models:
        seconds(model)  # warms up
    found = torch.tensor([[seconds(model) for model in models] for _ in range(rounds)])
    drawn = torch.randint(rounds, (RESAMPLES, rounds), generator=torch.Generator().manual_seed(0))
    ratios = found[drawn].median(1).values
    low, high = (ratios[:, 0] / ratios[:, 1]).quantile(torch.tensor([0.025, 0.975])).tolist()
    before, after = found.median(0).values.tolist()
    parameters = sum(one.numel() for one in models[0].parameters())
    predicted = speed.seconds(models[0].config.num_hidden_layers, parameters)
    print(f"{speed.of}: predicted {1e9 * predicted / search['predicted']:.3f} times as fast, ", end="")
    print(f"measured {before / after:.3f} ({low:.3f} to {high:.3f}), {rounds} rounds in turn;")
    print(f"{1e3 * before:.2f} ms and {1e3 * after:.2f} ms a token, {1e3 * predicted:.2f} and ", end="")
    print(f"{1e-6 * search['predicted']:.2f} predicted")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 15)
