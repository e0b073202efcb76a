"""Channel scores: functions of one FFN's statistics that return a score per channel, [F].

Channels with the lowest scores are removed.

Every function is pure. Symbols as in `statistics`: u input of down_proj, s = dL/du, LP = 1/2 mean (u s)^2, W
down_proj.
"""

from __future__ import annotations

import torch

from surgery.errors import PlanError
from surgery.index.channel_index import SECOND_ORDER, FfnIndex

PROTECTION_FLOOR = 0.2
PROTECTION_EXPONENT = 8


def scar_lp(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """SCAR-LP: LP_i (Supernodes and Halos)."""
    return ffn.statistics["loss_proxy"]


def protection(ffn: FfnIndex, redundancy: str = "halo_redundancy") -> torch.Tensor:
    """Protect_i [F] in [0.2, 1]: 1 outside the halo; a + (1 - a)(1 - r_i^8) inside, a = 0.2.

    r_i is the rank of halo channel i by redundancy with the core, scaled to [0, 1] (Supernodes and Halos).
    """
    members = ffn.halo
    result = torch.ones(ffn.width)
    order = statistic(ffn, redundancy)[members].argsort(stable=True)
    rank = torch.empty(len(members))
    rank[order] = torch.linspace(0, 1, len(members)) if len(members) > 1 else torch.zeros(len(members))
    result[members] = PROTECTION_FLOOR + (1 - PROTECTION_FLOOR) * (1 - rank**PROTECTION_EXPONENT)
    return result


def scar_prot(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """SCAR-Prot: LP_i * Protect_i (Supernodes and Halos)."""
    return ffn.statistics["loss_proxy"] * protection(ffn)


def scar_prot_published(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """SCAR-Prot with redundancy as in the papers' code, 1e-8 inside the root (`supernodes.redundancy`)."""
    return ffn.statistics["loss_proxy"] * protection(ffn, "halo_redundancy_published")


def scar_conn(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """SCAR-Conn: LP_i * ((1 - Conn_i) + Conn_i * Protect_i) (Supernodes and Halos)."""
    conn = ffn.statistics["halo_connectivity"]
    return ffn.statistics["loss_proxy"] * ((1 - conn) + conn * protection(ffn))


def magnitude(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """L2 norm of the gate row, plus that of the up row, plus that of the down column."""
    return ffn.weight_norm


def activation(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """Activation power mean u^2."""
    return ffn.statistics["activation_power"]


def wanda(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """Wanda-sp: sum_h |W[h, i]| * sqrt(mean u_i^2), W = down_proj (as in FLAP's repository)."""
    return ffn.statistics["down_l1"] * ffn.statistics["activation_power"].sqrt()


def wanda_channel(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """Wanda baseline of the papers' code: sum_k (|W_gate| + |W_up|)[i, k] |x_k| + sum_h |W[h, i]| |u_i|.

    The first sum runs over all inputs of the FFN and dominates the second sum, the only one that depends on
    the channel's activations.
    """
    values = ffn.statistics
    return statistic(ffn, "read_norm") + values["down_l1"] * values["activation_power"].sqrt()


def flap(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """FLAP's WIFV: Var(u_i) * sum_h W[h, i]^2 (AAAI 2024)."""
    values = ffn.statistics
    variance = values["activation_power"].double() - values["mean"].double().square()
    return variance.clamp_min(0) * values["down_norm"].double().square()


def taylor(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """First-order Taylor of the activation: mean |u_i s_i|."""
    return ffn.statistics["taylor"]


def llm_pruner(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """LLM-Pruner's param_first: sum of |w dL/dw| over the gate row, up row and down column (NeurIPS 2023)."""
    return statistic(ffn, "taylor_weight")


def optipfair(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """optipfair's hybrid score: weight ranges (`statistics.weight_range`) times the norm of u_i."""
    return statistic(ffn, "weight_range") * ffn.statistics["activation_power"].sqrt()


def lp_hybrid(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """LP combined with optipfair's score: exp(z(log LP_i) + 2 z(log optipfair_i)), z standardised in the FFN.

    LP from tens of thousands of tokens overfits the calibration text. After least-squares repair, optipfair's
    hybrid score keeps channels that do better on other text, and the combination does better than either
    score (docs/results.md).
    """
    loss_proxy, hybrid = ffn.statistics["loss_proxy"].double(), optipfair(ffn, _).double()
    live = (loss_proxy > 0) & (hybrid > 0)  # other channels have no effect and are removed first
    score = torch.zeros(ffn.width)
    if live.any():
        score[live] = torch.exp(_standardised(loss_proxy[live]) + 2 * _standardised(hybrid[live])).float()
    return score


def _standardised(score: torch.Tensor) -> torch.Tensor:
    """Logarithms of positive scores [F], minus their mean, divided by their standard deviation."""
    logs = score.log()
    return (logs - logs.mean()) / logs.std(correction=0).clamp_min(1e-12)


def obs(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """Optimal brain surgeon on the FFN's output, greedily downdated (ZipLM, SlimGPT): see `second_order`."""
    return statistic(ffn, "obs")


def obs_loss(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """Loss-aware optimal brain surgeon, (w_j' G w_j) / [C^-1]_jj, greedily downdated: see `second_order`."""
    return statistic(ffn, "obs_loss")


def lp_conditional(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """LP_i times the share of u_i's variance that the other channels do not explain."""
    return ffn.statistics["loss_proxy"] * statistic(ffn, "unexplained")


def random_score(ffn: FfnIndex, generator: torch.Generator) -> torch.Tensor:
    """Uniform random scores: the control."""
    return torch.rand(ffn.width, generator=generator)


def statistic(ffn: FfnIndex, name: str) -> torch.Tensor:
    """A statistic [F] that some indexes lack. Raises PlanError when it is missing."""
    if name in ffn.statistics:
        return ffn.statistics[name]
    option = " with --second-order" if name in SECOND_ORDER else ""
    raise PlanError(
        "the index lacks what this method ranks by",
        where=name,
        found="an index made without it, or a mixture of experts"
        if option
        else "an index made by an earlier version",
        next_step=f"run surgeon index again{option}, or choose another --method",
    )
