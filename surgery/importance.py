"""Channel scores: statistics of one FFN in, one score [F] per channel out; the lowest are removed.

Every function is pure. Symbols as in `statistics`: u input of down_proj, s = dL/du, LP = 1/2 mean (u s)^2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from surgery.index import FfnIndex

PROTECTION_FLOOR = 0.2
PROTECTION_EXPONENT = 8


def scar_lp(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """SCAR-LP: LP_i (Supernodes and Halos)."""
    return ffn.statistics["loss_proxy"]


def protection(ffn: FfnIndex) -> torch.Tensor:
    """Protect_i [F] in [0.2, 1]: 1 outside the halo; a + (1 - a)(1 - r_i^8) inside, a = 0.2.

    r_i is the rank of halo channel i by redundancy with the core, scaled to [0, 1] (Supernodes and Halos).
    """
    members = ffn.halo
    result = torch.ones(ffn.width)
    order = ffn.statistics["halo_redundancy"][members].argsort(stable=True)
    rank = torch.empty(len(members))
    rank[order] = torch.linspace(0, 1, len(members)) if len(members) > 1 else torch.zeros(len(members))
    result[members] = PROTECTION_FLOOR + (1 - PROTECTION_FLOOR) * (1 - rank**PROTECTION_EXPONENT)
    return result


def scar_prot(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """SCAR-Prot: LP_i * Protect_i (Supernodes and Halos)."""
    return ffn.statistics["loss_proxy"] * protection(ffn)


def scar_conn(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """SCAR-Conn: LP_i * ((1 - Conn_i) + Conn_i * Protect_i) (Supernodes and Halos)."""
    conn = ffn.statistics["halo_connectivity"]
    return ffn.statistics["loss_proxy"] * ((1 - conn) + conn * protection(ffn))


def magnitude(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """L2 norm of the gate row, plus that of the up row, plus that of the down column."""
    values = ffn.statistics
    return values["gate_norm"] + values["up_norm"] + values["down_norm"]


def activation(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """Activation power mean u^2."""
    return ffn.statistics["activation_power"]


def wanda(ffn: FfnIndex, _: torch.Generator) -> torch.Tensor:
    """Wanda-sp: sum_h |W[h, i]| * sqrt(mean u_i^2), W = down_proj (as in FLAP's repository)."""
    return ffn.statistics["down_l1"] * ffn.statistics["activation_power"].sqrt()


def random_score(ffn: FfnIndex, generator: torch.Generator) -> torch.Tensor:
    """Uniform random scores: the control."""
    return torch.rand(ffn.width, generator=generator)


Score = Callable[[FfnIndex, torch.Generator], torch.Tensor]
METHODS: dict[str, Score] = {
    "scar-lp": scar_lp,
    "scar-prot": scar_prot,
    "scar-conn": scar_conn,
    "magnitude": magnitude,
    "activation": activation,
    "wanda": wanda,
    "random": random_score,
}
PROTECTING = {"scar-lp", "scar-prot", "scar-conn"}
