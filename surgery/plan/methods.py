"""Table of pruning methods, which rank the channels of an FFN. Does not import torch.

To add a method, write its score in `scores.py` and add its entry here. Another package adds a method through
the entry point group "surgeon.methods".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.registry import Registry, import_object

if TYPE_CHECKING:
    import torch

    from surgery.index.channel_index import FfnIndex

    Score = Callable[[FfnIndex, torch.Generator], torch.Tensor]

SUPERNODES_AND_HALOS = "Supernodes and Halos, arXiv 2604.23475"


@dataclass(frozen=True)
class Method:
    """One pruning method.

    score: takes an FfnIndex and a torch.Generator and returns one finite number per channel, [F]. The
        channels with the lowest scores are removed. A function, or "module:function", which is imported when
        first used.
    label: name of the method in cards and reports; if empty, the name in the table.
    paper: source of the method.
    protects: whether supernodes and super-weight columns are kept by default.
    loss: whether scores are losses, which can be compared across layers without standardisation.
    second_order: whether the index must be built with --second-order.
    needs: name of a required statistic that some indexes lack.
    """

    score: str | Score
    label: str = ""
    paper: str = ""
    protects: bool = False
    loss: bool = False
    second_order: bool = False
    needs: str = ""

    def scores(self, ffn: FfnIndex, generator: torch.Generator) -> torch.Tensor:
        """Scores [F] of the channels of one FFN. Raises PlanError when the index lacks a statistic."""
        score: Any = import_object(self.score)
        scores: torch.Tensor = score(ffn, generator)
        return scores


def _builtin(function: str, label: str, paper: str = "", **flags: Any) -> Method:
    return Method(f"surgery.plan.scores:{function}", label, paper, **flags)


METHODS: Registry[Method] = Registry(
    "method",
    "surgeon.methods",
    Method,
    {
        "scar-lp": _builtin("scar_lp", "SCAR-LP", SUPERNODES_AND_HALOS, protects=True, loss=True),
        "scar-prot": _builtin("scar_prot", "SCAR-Prot", SUPERNODES_AND_HALOS, protects=True, loss=True),
        "scar-prot-published": _builtin(
            "scar_prot_published",
            "SCAR-Prot (redundancy as in the papers' code)",
            SUPERNODES_AND_HALOS,
            protects=True,
            loss=True,
            needs="halo_redundancy_published",
        ),
        "scar-conn": _builtin("scar_conn", "SCAR-Conn", SUPERNODES_AND_HALOS, protects=True, loss=True),
        "lp-hybrid": _builtin("lp_hybrid", "LP-hybrid", protects=True, needs="weight_range"),
        "lp-conditional": _builtin(
            "lp_conditional",
            "LP × unexplained variance",
            protects=True,
            loss=True,
            second_order=True,
            needs="unexplained",
        ),
        "obs-loss": _builtin(
            "obs_loss", "loss-aware OBS", protects=True, loss=True, second_order=True, needs="obs_loss"
        ),
        "obs": _builtin("obs", "OBS", "ZipLM, SlimGPT", second_order=True, needs="obs"),
        "flap": _builtin("flap", "FLAP (WIFV)", "FLAP, AAAI 2024"),
        "wanda": _builtin("wanda", "Wanda-sp", "FLAP's repository"),
        "wanda-channel": _builtin(
            "wanda_channel",
            "the papers' Wanda-channel",
            SUPERNODES_AND_HALOS,
            second_order=True,
            needs="read_norm",
        ),
        "taylor": _builtin("taylor", "activation Taylor"),
        "llm-pruner": _builtin(
            "llm_pruner",
            "LLM-Pruner (param_first)",
            "LLM-Pruner, NeurIPS 2023",
            second_order=True,
            needs="taylor_weight",
        ),
        "optipfair": _builtin("optipfair", "optipfair's hybrid score", "optipfair", needs="weight_range"),
        "magnitude": _builtin("magnitude", "weight magnitude"),
        "activation": _builtin("activation", "activation power"),
        "random": _builtin("random_score", "random channels (a control)"),
    },
)


def register_method(name: str, method: Method) -> None:
    """Add a method in this process; the entry point group "surgeon.methods" adds one in every process.

    Raises PlanError for a name that is already used.
    """
    METHODS.register(name, method)
