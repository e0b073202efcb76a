"""The second route of a prune: the whole model with the removed channels' down weights set to zero."""

from __future__ import annotations

from typing import Any

import torch

from surgery.model.families import FfnSite
from surgery.model.ffn import find_ffns

IDS = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(1))


def mask(
    model: Any, sites: tuple[FfnSite, ...], layers_path: str, kept: list[dict[str, torch.Tensor]]
) -> None:
    """Zero the down weights of all channels but the kept ones."""
    for number, layer in enumerate(model.get_submodule(layers_path)):
        for ffn in find_ffns(sites, layer):
            removed = torch.ones(ffn.width, dtype=torch.bool)
            removed[kept[number][ffn.name]] = False
            ffn.down_weight()[:, removed] = 0


def kept_channels(manifest: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Kept channels by FFN of every layer, from surgeon.json."""
    return [
        {
            name: torch.tensor(ffn["kept"], dtype=torch.long)
            for name, ffn in layer.get("ffns", {"dense": layer}).items()
        }
        for layer in manifest["plan"]["layers"]
    ]
