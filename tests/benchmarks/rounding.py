"""Perplexity of a model as it is, rounded to nearest, and with the values of a packed folder of that scheme.

    python tests/benchmarks/rounding.py MODEL FOLDER --text FILE [--text FILE] [--blocks 8] [--block-size 512]

FOLDER is what `surgeon quantize` made of MODEL, such as with `--rounding autoround`; the modules of super
weights stay whole in both.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import surgery
from surgery.evaluate.perplexity import evaluation_blocks
from surgery.quantize.plan import plan_quantization
from surgery.quantize.rounding import Scheme
from surgery.quantize.write import rounding_edits


def apply(edits: dict[int, list[Any]], number: int, layer: nn.Module) -> None:
    """Change a resident layer."""
    for edit in edits[number]:
        edit.apply([], layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=512)
    given = parser.parse_args()
    fields = json.loads((given.folder / "surgeon.json").read_text())
    told = fields["quantization"]
    scheme = Scheme(told["bits"], told["symmetric"], told["granularity"], told["size"])
    for text in given.text:
        for name in ("as it is", f"{scheme.name} to nearest", told["name"]):
            model = surgery.open_model(given.model)
            plan = plan_quantization(model.meta_model, fields["super_weights"], scheme, told["super_weights"])
            folder = given.folder if name == told["name"] else None
            edits = rounding_edits(model.meta_model, plan, {}, folder)
            blocks = evaluation_blocks(model, text, given.blocks, given.block_size)
            edit = None if name == "as it is" else partial(apply, edits)
            found = surgery.perplexity(model, blocks, edit=edit)
            print(f"{Path(text).name}, {name}: {found.perplexity:.4f}", flush=True)


if __name__ == "__main__":
    main()
