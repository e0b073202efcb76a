"""Channel statistics of one layer: running sums over calibration tokens.

Symbols: u [T, F] input of down_proj; s = dL/du, L the summed token cross-entropy in nats; q = u * s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from surgery.budget.model_size import CORRELATION_TOKENS
from surgery.engine import distributed
from surgery.engine.device import wide_dtype
from surgery.engine.token_stream import FfnActivations
from surgery.model.ffn import Ffn

SUMMED = ("loss_proxy", "activation_power", "curvature", "taylor", "mean")  # means over tokens


def named_statistics(means: torch.Tensor, largest: torch.Tensor) -> dict[str, torch.Tensor]:
    """Statistics [...] by name, float32 on the CPU, from means [5, ...] and max |u| [...].

    loss_proxy = 1/2 mean_t q^2 (Supernodes and Halos, LP); activation_power = mean u^2; curvature = mean s^2;
    taylor = mean |q|; mean = mean u; max_abs = max |u|. Means are over all calibration tokens.
    """
    named = {
        "loss_proxy": means[0] / 2,
        "activation_power": means[1],
        "curvature": means[2],
        "taylor": means[4],
        "mean": means[3],
        "max_abs": largest,
    }
    return {name: value.float().cpu() for name, value in named.items()}


def sample_stride(tokens: int) -> int:
    """Distance between tokens whose q is sampled, for `tokens` calibration tokens.

    It is a power of two, so that the samples of several indexes contain the sample of the merged index.
    """
    return 1 << max(0, math.ceil(math.log2(max(1, tokens) / CORRELATION_TOKENS)))


class ChannelStatistics:
    """Per-channel sums of one FFN over `blocks` blocks of `block_size` tokens.

    Each block is summed in float32 and blocks are added in float64, so that the result does not depend on the
    micro-batch size or on the order of blocks. q of every `stride`-th token of a block is sampled for
    correlations. `blocks` counts the blocks of this process, `all_blocks` the blocks of all processes.
    """

    def __init__(
        self, width: int, blocks: int, block_size: int, device: torch.device, all_blocks: int | None = None
    ) -> None:
        self.tokens = (all_blocks or blocks) * block_size
        self.block_size = block_size
        self.stride = sample_stride(self.tokens)
        self.kept_per_block = len(range(0, block_size, self.stride))
        self.sums = torch.zeros(5, blocks, width, dtype=torch.float32, device=device)
        self.largest = torch.zeros(width, dtype=torch.float32, device=device)
        self.sampled_q = torch.zeros(blocks * self.kept_per_block, width, dtype=torch.float32, device=device)

    def add(self, first_block: int, u: torch.Tensor, s: torch.Tensor) -> None:
        """Add blocks u, s [n, T, F]; `first_block` is the number of the first one."""
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
        """Statistics [F] over all processes, as `named_statistics` returns them."""
        sums = distributed.all_reduce_sum(self.sums.to(wide_dtype(self.sums.device)).sum(1))
        return named_statistics(sums / self.tokens, distributed.all_reduce_max(self.largest))

    def correlation_sample(self) -> torch.Tensor:
        """q of the sampled tokens of all processes, [sampled, F]."""
        return distributed.all_gather_rows(self.sampled_q)


class ExpertStatistics:
    """Per-channel sums of the E experts of one layer, each over its routed tokens; means are over all tokens.

    Each micro-batch is summed in float32 and micro-batches are added in float64, regardless of block
    boundaries. `blocks` counts the blocks of all processes.
    """

    def __init__(self, experts: int, width: int, blocks: int, block_size: int, device: torch.device) -> None:
        self.tokens = blocks * block_size  # of all processes
        self.block_size = block_size
        self.stride = sample_stride(self.tokens)
        self.sums = torch.zeros(5, experts, width, dtype=wide_dtype(device), device=device)
        self.largest = torch.zeros(experts, width, dtype=torch.float32, device=device)
        self.routed = torch.zeros(experts, dtype=torch.long, device=device)
        self.sampled_q: list[list[torch.Tensor]] = [[] for _ in range(experts)]
        self.positions: list[list[torch.Tensor]] = [[] for _ in range(experts)]

    def add(self, expert: int, tokens: torch.Tensor, u: torch.Tensor, s: torch.Tensor) -> None:
        """Add u, s [routed, F] of one expert; `tokens` are their positions in all calibration tokens."""
        u, s = u.float(), s.float()
        q = u * s
        rows = (q.square(), u.square(), s.square(), u, q.abs())
        self.sums[:, expert] += torch.stack([row.sum(0) for row in rows])
        torch.maximum(self.largest[expert], u.abs().amax(0), out=self.largest[expert])
        self.routed[expert] += len(u)
        positions = tokens % self.block_size
        sampled = positions % self.stride == 0
        self.sampled_q[expert].append(q[sampled])
        self.positions[expert].append(positions[sampled].int())

    def finish(self) -> dict[str, torch.Tensor]:
        """Statistics [E, F] over all processes, as `named_statistics` returns them."""
        distributed.all_reduce_sum(self.routed)
        return named_statistics(
            distributed.all_reduce_sum(self.sums) / self.tokens, distributed.all_reduce_max(self.largest)
        )

    def correlation_sample(self, expert: int) -> torch.Tensor:
        """q of the sampled tokens of all processes that were routed to one expert, [sampled, F]."""
        empty = torch.zeros(0, self.largest.shape[1], device=self.largest.device)
        return distributed.all_gather_rows(torch.cat([empty, *self.sampled_q[expert]]))

    def sample_positions(self, expert: int) -> torch.Tensor:
        """Positions in their blocks of the tokens of `correlation_sample`, [sampled] int32."""
        empty = torch.zeros(0, dtype=torch.int32, device=self.largest.device)
        return distributed.all_gather_rows(torch.cat([empty, *self.positions[expert]]))


@dataclass
class FfnStatistics:
    """Statistics of one FFN: `values` [F] by name, q of sampled tokens [S, F], and the number of its tokens.

    `positions` [S] are those of the sampled tokens in their blocks. Only experts have them, because other
    FFNs process all tokens in order.
    """

    values: dict[str, torch.Tensor]
    sampled_q: torch.Tensor
    tokens: int
    positions: torch.Tensor | None = None


class LayerStatistics:
    """Statistics of all FFNs of one layer; `add` is an observer for `TokenStream.backward`."""

    def __init__(
        self,
        ffns: list[Ffn],
        blocks: int,
        block_size: int,
        device: torch.device,
        all_blocks: int | None = None,
    ) -> None:
        self.block_size = block_size
        total_blocks = all_blocks or blocks
        self.numbers = {ffn.name: ffn.expert for ffn in ffns if ffn.expert is not None}
        self.alone = {
            ffn.name: ChannelStatistics(ffn.width, blocks, block_size, device, total_blocks)
            for ffn in ffns
            if ffn.expert is None
        }
        widths = [ffn.width for ffn in ffns if ffn.expert is not None]
        self.experts = (
            ExpertStatistics(len(widths), widths[0], total_blocks, block_size, device) if widths else None
        )

    def add(self, flow: FfnActivations) -> None:
        """Add the activations and gradients of one FFN."""
        if flow.tokens is None:
            self.alone[flow.ffn].add(flow.first_block, flow.u, flow.s)
            return
        assert self.experts is not None
        positions = flow.tokens + flow.first_block * self.block_size
        self.experts.add(self.numbers[flow.ffn], positions, flow.u, flow.s)

    def finish(self, with_positions: bool = False) -> dict[str, FfnStatistics]:
        """Statistics by FFN name; `with_positions` adds the positions of experts' samples, to be saved."""
        found = {
            name: FfnStatistics(sums.finish(), sums.correlation_sample(), sums.tokens)
            for name, sums in self.alone.items()
        }
        if self.experts is not None:
            stacked, routed = self.experts.finish(), self.experts.routed.tolist()
            for name, expert in self.numbers.items():
                values = {statistic: value[expert] for statistic, value in stacked.items()}
                sample = self.experts.correlation_sample(expert)
                positions = self.experts.sample_positions(expert) if with_positions else None
                found[name] = FfnStatistics(values, sample, routed[expert], positions)
        return found


def weight_range(gate: torch.Tensor | None, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Sum over gate row, up row and down column of max + |min|, each divided by its largest in the FFN, [F].

    The static half of optipfair's hybrid score (its `compute_neuron_pair_importance_maw_hybrid`).
    """
    total = torch.zeros(len(up), device=up.device)
    for rows in (gate, up, down.T):
        if rows is not None:
            values = rows.float()
            spread = values.amax(1) + values.amin(1).abs()
            total += spread / spread.max().clamp_min(torch.finfo(torch.float32).tiny)
    return total.cpu()


def weight_norms(gate: torch.Tensor | None, up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    """Norms [F] of each channel: L2 of its gate row and up row, L2 and L1 of its down column.

    `gate` and `up` are [F, D], `down` is [D, F].
    """
    down_DF = down.float()
    up_norm = up.float().norm(dim=1)
    return {
        "gate_norm": (gate.float().norm(dim=1) if gate is not None else torch.zeros_like(up_norm)).cpu(),
        "up_norm": up_norm.cpu(),
        "down_norm": down_DF.norm(dim=0).cpu(),
        "down_l1": down_DF.abs().sum(0).cpu(),
    }
