"""surgeon: index and prune the FFNs of language-model checkpoints, one decoder layer in memory at a time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.bootstrap import Interval as Interval
    from surgery.engine.open_model import Model as Model
    from surgery.engine.open_model import open_model as open_model
    from surgery.errors import SurgeonError as SurgeonError
    from surgery.evaluate.perplexity import Perplexity as Perplexity
    from surgery.evaluate.perplexity import perplexity as perplexity
    from surgery.index.build import build_index as build_index
    from surgery.index.channel_index import ChannelIndex as ChannelIndex
    from surgery.index.channel_index import FfnIndex as FfnIndex
    from surgery.index.merge import merge_indexes as merge_indexes
    from surgery.index.open_index import open_index as open_index
    from surgery.index.questions import common_supernodes as common_supernodes
    from surgery.index.questions import concentration as concentration
    from surgery.index.questions import differing_layers as differing_layers
    from surgery.index.questions import lp_against_movement as lp_against_movement
    from surgery.index.questions import supernode_outliers as supernode_outliers
    from surgery.index.questions import supernode_overlap as supernode_overlap
    from surgery.plan.methods import Method as Method
    from surgery.plan.methods import register_method as register_method
    from surgery.plan.prune_plan import PrunePlan as PrunePlan
    from surgery.pruning.experts import plan_experts as plan_experts
    from surgery.pruning.plan_pruning import plan_pruning as plan_pruning
    from surgery.pruning.prune import prune as prune
    from surgery.pruning.vocabulary import plan_vocabulary as plan_vocabulary
    from surgery.repair.methods import RepairMethod as RepairMethod

__version__ = "0.1.0"

_HOMES = {
    "ChannelIndex": "surgery.index.channel_index",
    "FfnIndex": "surgery.index.channel_index",
    "Interval": "surgery.bootstrap",
    "Method": "surgery.plan.methods",
    "Model": "surgery.engine.open_model",
    "Perplexity": "surgery.evaluate.perplexity",
    "PrunePlan": "surgery.plan.prune_plan",
    "RepairMethod": "surgery.repair.methods",
    "SurgeonError": "surgery.errors",
    "build_index": "surgery.index.build",
    "common_supernodes": "surgery.index.questions",
    "concentration": "surgery.index.questions",
    "differing_layers": "surgery.index.questions",
    "lp_against_movement": "surgery.index.questions",
    "merge_indexes": "surgery.index.merge",
    "open_index": "surgery.index.open_index",
    "open_model": "surgery.engine.open_model",
    "perplexity": "surgery.evaluate.perplexity",
    "plan_experts": "surgery.pruning.experts",
    "plan_pruning": "surgery.pruning.plan_pruning",
    "plan_vocabulary": "surgery.pruning.vocabulary",
    "prune": "surgery.pruning.prune",
    "register_method": "surgery.plan.methods",
    "supernode_outliers": "surgery.index.questions",
    "supernode_overlap": "surgery.index.questions",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import public names where they are first used, so that `import surgery` does not import torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'surgery' has no attribute {name!r}")
