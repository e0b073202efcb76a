"""Supernodes and their halo: channels that write to the same hidden dimensions.

Source: Supernodes and Halos, arXiv 2604.23475.
"""

from __future__ import annotations

import torch

SUPERNODE_FRACTION = 0.01
SHARE_FRACTIONS = (0.001, 0.01, 0.05)  # of a layer's channels whose share of LP is told
HALO_FRACTION = 0.10
SUPPORT_SIZE = 256
REDUNDANCY_TOP = 5
PUBLISHED_EPSILON = 1e-8
MAX_CORRELATION_SQUARED = 1 - 1e-6  # bounds the mutual information of identical channels by 6.9 nats


def supernodes(loss_proxy: torch.Tensor, fraction: float = SUPERNODE_FRACTION) -> torch.Tensor:
    """Sorted indices of the top `fraction` of channels by LP [F]: max(1, round(fraction * F)) of them."""
    count = max(1, round(fraction * len(loss_proxy)))
    return torch.topk(loss_proxy, count).indices.sort().values


def connectivity(down: torch.Tensor, core: torch.Tensor, support_size: int = SUPPORT_SIZE) -> torch.Tensor:
    """Share of each channel's output weights that go to the hidden dims of the core, [F] in [0, 1].

    a_h = sum over core channels s of |W[h, s]|; S = the `support_size` hidden dims with the largest a (at
    most half of all); Conn_i = sum_{h in S} |W[h, i]| / sum_h |W[h, i]|. W = down_proj weight [D, F]. A
    channel whose weights are all zero has connectivity 0.
    """
    if len(core) == 0:
        return torch.zeros(down.shape[1], device=down.device)
    size = min(support_size, max(1, down.shape[0] // 2))
    magnitude_DF = down.float().abs()
    support = torch.topk(magnitude_DF[:, core].sum(1), size).indices
    total = magnitude_DF.sum(0)
    share = magnitude_DF[support].sum(0) / total.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(total > 0, share, torch.zeros_like(share))


def redundancy(q: torch.Tensor, core: torch.Tensor, epsilon: float = 0.0) -> torch.Tensor:
    """Mutual information between each channel's loss contributions and those of the core, [F] in nats.

    r_is = Pearson correlation over tokens of q_i and q_s (q = u * dL/du, [T, F]), negative values set to 0;
    MI_is = -1/2 ln(1 - r_is^2); redundancy_i = mean of the 5 largest MI_is over supernodes s other than i.

    The published code divides by sqrt(var_i var_s + 1e-8), where 1e-8 is much larger than the variances of
    small gradients. Here each channel is first scaled to unit norm, so that the scale cancels. With a
    positive `epsilon` the result is that of the published code, for q of a loss that is the mean over a
    block's tokens.
    """
    if len(core) == 0 or len(q) < 2:
        return torch.zeros(q.shape[1], device=q.device)
    centred = q.float() - q.float().mean(0)
    if epsilon:
        variance = centred.square().mean(0)
        r_FS = (centred.T @ centred[:, core]) / len(q)
        r_FS = (r_FS / (torch.outer(variance, variance[core]) + epsilon).sqrt()).clamp_(0, 1)
    else:
        scaled = centred / centred.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
        r_FS = (scaled.T @ scaled[:, core]).clamp_(0, 1)
    r_FS[core, torch.arange(len(core), device=r_FS.device)] = 0
    squared = r_FS.square().clamp_max(MAX_CORRELATION_SQUARED)
    information = torch.log1p(-squared).mul(-0.5)
    return information.topk(min(REDUNDANCY_TOP, len(core)), dim=1).values.mean(1)


def halo(connectivity_F: torch.Tensor, core: torch.Tensor, fraction: float = HALO_FRACTION) -> torch.Tensor:
    """Sorted indices of the halo: the top `fraction` of the channels outside the core by connectivity [F]."""
    outside = torch.ones(len(connectivity_F), dtype=torch.bool)
    outside[core] = False
    count = round(fraction * int(outside.sum()))
    ranked = connectivity_F.masked_fill(~outside, -1)
    # Of equal channels the first, on every machine: a published index is stored in this order.
    return ranked.argsort(descending=True, stable=True)[:count].sort().values


def mass_share(loss_proxy: torch.Tensor, fraction: float) -> float:
    """Share of the total LP [F] in the top `fraction` of channels (at least one channel), in [0, 1]."""
    count = max(1, round(fraction * len(loss_proxy)))
    values = loss_proxy.double()
    total = float(values.sum())
    return float(torch.topk(values, count).values.sum()) / total if total > 0 else 0.0


def overlap(core: torch.Tensor, values: torch.Tensor) -> float:
    """Share of the core that is also among the len(core) largest `values` [F]."""
    other = torch.topk(values, len(core)).indices
    return float(torch.isin(core, other).float().mean())
