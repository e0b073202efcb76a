"""Fifty ablation conditions of one model in one pass, against one plain streamed evaluation.

    python tests/benchmarks/ablations.py MODEL --text FILE [--blocks 8] [--block-size 512] [--check 4]

The conditions are those that proving super weights asks for: every candidate scalar, column and row removed,
every two of them, groups, controls. `--check` runs every so many of them again by themselves and prints the
largest difference in nats per token.
"""

from __future__ import annotations

import argparse
import time

import torch

import surgery
from surgery.checkpoint.transformers_model import load_tokenizer
from surgery.cli.common import bars
from surgery.engine.layer_edits import Edits
from surgery.engine.streamed_model import StreamedModel
from surgery.evaluate.ablation import Condition, run_ablations
from surgery.evaluate.perplexity import evaluation_blocks
from surgery.index.controls import control_edits
from surgery.index.spike_detector import PROMPTS, SuperWeightDetector, prompt_ids
from surgery.index.structures import Candidates, pairs

CONDITIONS = 50


def fifty(model: surgery.Model, ids: torch.Tensor) -> list[Condition]:
    """The first CONDITIONS conditions: removals of singles, their controls, pairs, groups."""
    streamed = StreamedModel(model)
    with streamed.other_weights():
        prompts = prompt_ids(load_tokenizer(model.checkpoint), PROMPTS, ids)
        detector = SuperWeightDetector(streamed, prompts)
    for number, layer in streamed.stream_layers(range(len(streamed.layers))):
        detector.forward(number, layer)
    lasting, passing = detector.finish({})
    candidates = Candidates.of([*lasting, *passing], detector.rows())
    wanted: dict[str, Edits] = {}
    singles = candidates.singles()
    for one in [*singles, *pairs(candidates.columns()), *candidates.groups()]:
        wanted[one.name] = one.edits()
    for one in singles:
        wanted |= {f"{like} as {one.name}": edits for like, edits in control_edits(one).items()}
    return [Condition(name, "benchmark", edits) for name, edits in wanted.items()][:CONDITIONS]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--check", type=int, default=4)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    model = surgery.open_model(options.model, dtype=options.dtype)
    blocks = evaluation_blocks(model, options.text, options.blocks, options.block_size)
    with torch.no_grad():
        conditions = fifty(model, blocks.ids)
        layers = len(model.meta_model.layers)
        share = sum(layers - one.first for one in conditions) / layers / len(conditions)
        print(
            f"{len(conditions)} conditions; on average {share:.0%} of the layers lie above their first edit"
        )
        start = time.perf_counter()
        surgery.perplexity(model, blocks)
        plain = time.perf_counter() - start
        start = time.perf_counter()
        together = run_ablations(model, conditions, blocks, bars(False))
        batched = time.perf_counter() - start
        print(f"{plain:.1f} s plain, {batched:.1f} s batched: {batched / plain:.1f} times")
        largest = 0.0
        for place in range(0, len(conditions), max(1, len(conditions) // max(1, options.check))):
            alone = run_ablations(model, [conditions[place]], blocks)[1]
            largest = max(largest, abs(alone.effect - together[1 + place].effect))
        print(f"largest difference to conditions run one by one: {largest:.2g} nats a token")


if __name__ == "__main__":
    main()
