"""Merge indexes that several machines made of one model on different text, and see how far their supernodes
agree.

    python examples/merge_indexes.py SmolLM2-135M-Instruct merged-index part-1 part-2

Each part was made by `surgeon index --save-samples`. On the command line: surgeon merge-index part-1 part-2
--model MODEL.
"""

from __future__ import annotations

import sys
from pathlib import Path

import surgery


def main(model: str, out: str, *parts: str) -> None:
    """Write the merged index, and print for each part how many of its supernodes are the merged one's too."""
    merged = surgery.merge_indexes([Path(part) for part in parts], surgery.open_model(model))
    Path(out).mkdir()
    merged.save(Path(out))
    print(f"{out}: {merged.calibration['blocks']} blocks of {merged.calibration['name']}")
    for part in parts:
        pairs = zip(surgery.ChannelIndex.load(part).layers, merged.layers, strict=True)
        same = sum(len({*one.supernodes.tolist()} & {*other.supernodes.tolist()}) for one, other in pairs)
        print(f"{part}: {same} of {sum(len(layer.supernodes) for layer in merged.layers)} supernodes")


if __name__ == "__main__":
    main(*sys.argv[1:])
