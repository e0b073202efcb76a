"""Channel statistics: running sums over calibration tokens, one set per layer.

Symbols: u [T, F] input of down_proj; s = dL/du, L the summed token cross-entropy in nats; q = u * s.
"""

from __future__ import annotations

import torch

CORRELATION_TOKENS = (
    2048  # tokens whose q is kept for the halo's redundancy (the paper's code uses at most as many)
)


class ChannelStatistics:
    """Per-channel sums of one layer over `blocks` blocks of `block_size` tokens.

    Each block is reduced in float32 and added in float64, in any order of arrival, so that the result does not
    depend on how blocks were grouped. q of every `stride`-th token of every block is kept for correlations.
    """

    def __init__(self, width: int, blocks: int, block_size: int, device: torch.device) -> None:
        self.tokens = blocks * block_size
        self.block_size = block_size
        self.stride = max(1, -(-self.tokens // CORRELATION_TOKENS))
        self.kept_per_block = len(range(0, block_size, self.stride))
        self.sums = torch.zeros(5, blocks, width, dtype=torch.float32, device=device)
        self.largest = torch.zeros(width, dtype=torch.float32, device=device)
        self.sampled_q = torch.zeros(blocks * self.kept_per_block, width, dtype=torch.float32, device=device)

    def add(self, first_block: int, u: torch.Tensor, s: torch.Tensor) -> None:
        """Account for blocks u, s [n, T, F], the first of which is number `first_block`."""
        for offset in range(len(u)):
            block = first_block + offset
            u_TF, s_TF = u[offset].float(), s[offset].float()
            q_TF = u_TF * s_TF
            torch.sum(u_TF, 0, out=self.sums[3, block])
            torch.maximum(self.largest, u_TF.abs().amax(0), out=self.largest)
            sample = slice(block * self.kept_per_block, (block + 1) * self.kept_per_block)
            self.sampled_q[sample] = q_TF[:: self.stride]
            torch.sum(
                u_TF.square_() if u.dtype != torch.float32 else u_TF.square(), 0, out=self.sums[1, block]
            )
            torch.sum(
                s_TF.square_() if s.dtype != torch.float32 else s_TF.square(), 0, out=self.sums[2, block]
            )
            torch.sum(q_TF.abs(), 0, out=self.sums[4, block])
            torch.sum(q_TF.square_(), 0, out=self.sums[0, block])

    def finish(self) -> dict[str, torch.Tensor]:
        """Statistics [F] float32 on the CPU, named as in the index file.

        loss_proxy = 1/2 mean_t q^2 (Supernodes and Halos, LP); activation_power = mean u^2; curvature = mean s^2;
        taylor = mean |q|; mean = mean u; max_abs = max |u|. Means are over all calibration tokens.
        """
        means = self.sums.double().sum(1) / self.tokens
        named = {
            "loss_proxy": means[0] / 2,
            "activation_power": means[1],
            "curvature": means[2],
            "taylor": means[4],
            "mean": means[3],
            "max_abs": self.largest,
        }
        return {name: value.float().cpu() for name, value in named.items()}


def weight_norms(gate: torch.Tensor | None, up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    """L2 norms of each channel's gate row and up row [F, D] and down column [D, F], and the column's L1 norm."""
    down_DF = down.float()
    up_norm = up.float().norm(dim=1)
    return {
        "gate_norm": (gate.float().norm(dim=1) if gate is not None else torch.zeros_like(up_norm)).cpu(),
        "up_norm": up_norm.cpu(),
        "down_norm": down_DF.norm(dim=0).cpu(),
        "down_l1": down_DF.abs().sum(0).cpu(),
    }
