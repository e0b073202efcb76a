"""surgeon: index and physically shrink the FFNs of language-model checkpoints, one decoder layer at a time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.checkpoint import Checkpoint as Checkpoint
    from surgery.errors import SurgeonError as SurgeonError
    from surgery.importance import register_method as register_method
    from surgery.index import ChannelIndex as ChannelIndex
    from surgery.indexing import RunOptions as RunOptions
    from surgery.indexing import build_index as build_index
    from surgery.perplexity import measure_perplexity as measure_perplexity
    from surgery.plan import ResizePlan as ResizePlan
    from surgery.plan import make_plan as make_plan
    from surgery.prune import write_pruned as write_pruned

__version__ = "0.1.0"

_HOMES = {
    "ChannelIndex": "surgery.index",
    "Checkpoint": "surgery.checkpoint",
    "ResizePlan": "surgery.plan",
    "RunOptions": "surgery.indexing",
    "SurgeonError": "surgery.errors",
    "build_index": "surgery.indexing",
    "make_plan": "surgery.plan",
    "measure_perplexity": "surgery.perplexity",
    "register_method": "surgery.importance",
    "write_pruned": "surgery.prune",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import public names where they are first used, so that `import surgery` does not import torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'surgery' has no attribute {name!r}")
