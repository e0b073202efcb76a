"""Seconds of one pass of the search for widths: layers run with masks, and without their masked channels.

Usage: python tests/benchmarks/width_costs.py MODEL INDEX [--blocks N]. Both are timed in turn in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import surgery
from surgery.budget.model_size import ModelSize
from surgery.budget.sensitivity_cost import width_search_cost
from surgery.cut.model_cut import model_cut
from surgery.engine.streamed_model import StreamedModel
from surgery.index.channel_index import ChannelIndex
from surgery.plan.ranking import channel_orders
from surgery.repair import width_costs
from surgery.repair.methods import REPAIRS


@contextlib.contextmanager
def with_masks(*_: Any) -> Iterator[None]:
    """In place of `without_members`: the layer is left as it is."""
    yield


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("model")
    options.add_argument("index")
    options.add_argument("--blocks", type=int, default=16)
    given = options.parse_args()
    model, index = surgery.open_model(given.model), ChannelIndex.load(given.index)
    plan = surgery.plan_pruning(model, index)
    ids = index.input_ids.long()[: given.blocks]
    widths = [len(layer.kept) for layer in plan.layers]
    step = widths[0] // 4
    others = [[width - step, width + step] for width in widths]
    size = ModelSize.of(model.meta_model, model.run.dtype, ids.shape[1])
    cost = width_search_cost(size, *ids.shape, model.run)
    streamed, cut = StreamedModel(model), model_cut(model.meta_model, plan, widths_only=True)
    orders, method = channel_orders(index, plan.method), REPAIRS.find(plan.repair)
    narrowed = width_costs.without_members
    for name, run in (
        ("masks", with_masks),
        ("narrow", narrowed),
        ("masks", with_masks),
        ("narrow", narrowed),
    ):
        width_costs.without_members = run
        started = time.perf_counter()
        found = width_costs.measure_width_costs(streamed, ids, orders, widths, others, cut, method, cost)
        print(f"{name:8} {time.perf_counter() - started:7.1f} s, KL {found.kl:.6f}", flush=True)


if __name__ == "__main__":
    main()
