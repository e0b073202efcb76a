"""Tokens per second of checkpoints side by side: prefill and decode, in turn, in one process.

    python tests/benchmarks/speed.py DENSE PRUNED [PRUNED ...] [--prompt 512] [--new 64] [--rounds 5]

Each is loaded with AutoModelForCausalLM in its own dtype; every round times all of them, and medians are
printed with their ratio to the first.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

import surgery.loading  # noqa: F401  (layers of different width load too)


def timed(model: torch.nn.Module, ids: torch.Tensor, new: int) -> tuple[float, float]:
    """Tokens per second of reading `ids` [1, P] and of writing `new` more."""
    with torch.no_grad():
        started = time.perf_counter()
        output = model(ids, use_cache=True)
        read = time.perf_counter()
        cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
        for _ in range(new):
            output = model(token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        done = time.perf_counter()
    return ids.shape[1] / (read - started), new / (done - read)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    models = {name: AutoModelForCausalLM.from_pretrained(name).eval() for name in options.models}
    ids = torch.randint(0, 1000, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(options.rounds + 1):
        for name, model in models.items():
            found = timed(model, ids, options.new)
            if turn:  # the first warms up
                figures[name].append(found)
    medians = {
        name: [statistics.median(kind) for kind in zip(*found, strict=True)]
        for name, found in figures.items()
    }
    base = medians[options.models[0]]
    print(
        f"{'model':<40} {'parameters':>12} {'prefill tok/s':>14} {'ratio':>6} "
        f"{'decode tok/s':>13} {'ratio':>6}"
    )
    for name, (prefill, decode) in medians.items():
        count = sum(p.numel() for p in models[name].parameters())
        print(
            f"{name[-40:]:<40} {count / 1e6:>10.1f} M {prefill:>14.1f} {prefill / base[0]:>6.2f} "
            f"{decode:>13.2f} "
            f"{decode / base[1]:>6.2f}"
        )


if __name__ == "__main__":
    main()
