"""Predicted against measured: a folder that `surgeon prune DENSE --target-speed` wrote, and DENSE.

    python tests/benchmarks/target_speed.py DENSE FOLDER [ROUNDS]

Both models stay in memory and are timed in turn, so that a machine that slows down slows both. Prints how
many times as fast the cut is by its plan, and by medians over rounds, with the 95% bootstrap interval.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from surgery.bench.layer_speed import DECODE, SETTINGS
from surgery.checkpoint.manifest import MANIFEST

RESAMPLES = 2000


@torch.no_grad()
def seconds(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, float]:
    """Seconds of a token of the prompt, and of one decoded after it."""
    start = time.perf_counter()
    output = model(ids, use_cache=True)
    read = time.perf_counter()
    for _ in range(SETTINGS.new_tokens):
        last = output.logits[:, -1:].argmax(-1)
        output = model(last, past_key_values=output.past_key_values, use_cache=True)
    done = time.perf_counter()
    return {"prefill": (read - start) / ids.shape[1], DECODE: (done - read) / SETTINGS.new_tokens}


def main(dense: str, folder: str, rounds: int) -> None:
    """Time both in turn and print the ratios."""
    search = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))["plan"]["search"]
    of = search["target"]["speed"]["of"]
    models = [AutoModelForCausalLM.from_pretrained(name).eval() for name in (dense, folder)]
    ids = torch.randint(models[0].config.vocab_size, (1, SETTINGS.prompt_tokens))
    for model in models:
        seconds(model, ids)
    found = torch.tensor([[seconds(model, ids)[of] for model in models] for _ in range(rounds)])
    drawn = torch.randint(rounds, (RESAMPLES, rounds), generator=torch.Generator().manual_seed(0))
    ratios = found[drawn].median(1).values
    low, high = (ratios[:, 0] / ratios[:, 1]).quantile(torch.tensor([0.025, 0.975])).tolist()
    before, after = found.median(0).values.tolist()
    speed = search["target"]["speed"]
    layers, parameters = _sizes(models[0])
    predicted = (
        speed["ends"] + layers * speed["layer"] + (parameters - speed["ends_parameters"]) * speed["number"]
    )
    print(f"{of}: predicted {1e9 * predicted / search['predicted']:.3f} times as fast, ", end="")
    print(f"measured {before / after:.3f} ({low:.3f} to {high:.3f}), {rounds} rounds in turn;")
    print(f"{1e3 * before:.2f} ms and {1e3 * after:.2f} ms a token, {1e3 * predicted:.2f} and ", end="")
    print(f"{1e-6 * search['predicted']:.2f} predicted")


def _sizes(model: torch.nn.Module) -> tuple[int, int]:
    """Layers and parameters of a model."""
    return model.config.num_hidden_layers, sum(one.numel() for one in model.parameters())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 15)
