"""Read an index from Python, as `surgeon index` wrote it: which channels carry each layer, and how much of
it.

python examples/read_index.py smollm2-index
"""

from __future__ import annotations

import sys

from surgery import ChannelIndex


def main(folder: str) -> None:
    """Print the strongest channel of every layer, and what the supernodes hold of the loss proxy."""
    index = ChannelIndex.load(folder)
    print(f"{index.source['name']}: {len(index.layers)} layers, widths {index.widths}")
    for number, layer in enumerate(index.layers):
        for name, ffn in layer.ffns.items():  # "dense", or of a mixture of experts "expert.0", "expert.1", …
            loss_proxy = ffn.statistics["loss_proxy"].double()  # [F]; also mean, curvature, down_norm, …
            best = int(loss_proxy.argmax())
            share = float(loss_proxy[ffn.supernodes].sum() / loss_proxy.sum()) if ffn.tokens else 0.0
            supernodes = f"{len(ffn.supernodes)} supernodes hold {share:.6f}"
            print(f"layer {number} {name}: channel {best} first, {supernodes}")
    for weight in index.super_weights:
        print(f"super weight: layer {weight.layer} [{weight.row}, {weight.column}] = {weight.value}")


if __name__ == "__main__":
    main(sys.argv[1])
