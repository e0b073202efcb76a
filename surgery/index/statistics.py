"""Channel statistics of one layer: running sums over calibration tokens.

Symbols: u [T, F] input of down_proj; s = dL/du, L the summed token cross-entropy in nats; q = u * s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from surgery.budget.model_size import CORRELATION_TOKENS
from surgery.engine import distributed
from surgery.engine.device import wide_dtype
from surgery.engine.token_stream import FfnActivations
from surgery.index.block_sums import BlockSums, block_sums
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

    def by_block(self) -> torch.Tensor:
        """LP and activation power summed over each block of this process, [2, n, F]."""
        return torch.stack([self.sums[0] / 2, self.sums[1]])


class ExpertStatistics:
    """Per-channel sums of the E experts of one layer, each over its routed tokens; means are over all tokens.

    Each micro-batch is summed in float32 and micro-batches are added in float64, regardless of block
    boundaries; LP and activation power are also summed by block, in float32. `blocks` counts the blocks of
    this process, `all_blocks` those of all processes.
    """

    def __init__(
        self, experts: int, width: int, blocks: int, block_size: int, device: torch.device, all_blocks: int
    ) -> None:
        self.tokens = all_blocks * block_size  # of all processes
        self.block_size = block_size
        self.stride = sample_stride(self.tokens)
        self.sums = torch.zeros(5, experts, width, dtype=wide_dtype(device), device=device)
        self.largest = torch.zeros(experts, width, dtype=torch.float32, device=device)
        self.block_sums = torch.zeros(2, experts, blocks, width, dtype=torch.float32, device=device)
        self.routed = torch.zeros(experts, dtype=torch.long, device=device)
        self.sampled_q: list[list[torch.Tensor]] = [[] for _ in range(experts)]
        self.positions: list[list[torch.Tensor]] = [[] for _ in range(experts)]

    def add(self, expert: int, tokens: torch.Tensor, u: torch.Tensor, s: torch.Tensor) -> None:
        """Add u, s [routed, F] of one expert; `tokens` are their positions in this process's tokens."""
        u, s = u.float(), s.float()
        q = u * s
        rows = (q.square(), u.square(), s.square(), u, q.abs())
        self.sums[:, expert] += torch.stack([row.sum(0) for row in rows])
        blocks, place = torch.unique(tokens // self.block_size, return_inverse=True)
        # A product with a 0/1 matrix: unlike index_add_, it adds in the same order on every run on a GPU.
        in_block = functional.one_hot(place, len(blocks)).T.float()
        self.block_sums[0, expert, blocks] += in_block @ rows[0] / 2
        self.block_sums[1, expert, blocks] += in_block @ rows[1]
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
    FFNs process all tokens in order. `by_block` [2, N, F] are LP and activation power summed over each block,
    and `block_sums` what an index keeps of them.
    """

    values: dict[str, torch.Tensor]
    sampled_q: torch.Tensor
    tokens: int
    positions: torch.Tensor | None = None
    by_block: torch.Tensor | None = None
    block_sums: BlockSums | None = None


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
            ExpertStatistics(len(widths), widths[0], blocks, block_size, device, total_blocks)
            if widths
            else None
        )

    def add(self, flow: FfnActivations) -> None:
        """Add the activations and gradients of one FFN."""
        if flow.tokens is None:
            self.alone[flow.ffn].add(flow.first_block, flow.u, flow.s)
            return
        assert self.experts is not None
        positions = flow.tokens + flow.first_block * self.block_size
        self.experts.add(self.numbers[flow.ffn], positions, flow.u, flow.s)

    def finish(self, for_merging: bool = False) -> dict[str, FfnStatistics]:
        """Statistics by FFN name; `for_merging` adds positions of experts' samples and the sums by block."""
        found = {}
        for name, sums in self.alone.items():
            values, by_block = sums.finish(), sums.by_block()
            found[name] = FfnStatistics(values, sums.correlation_sample(), sums.tokens)
            kept = _kept({key: value[None] for key, value in values.items()}, by_block[:, None])
            found[name].block_sums = kept[0]
            if for_merging:
                found[name].by_block = _all_blocks(by_block)
        if self.experts is not None:
            found |= self._finish_experts(self.experts, for_merging)
        return found

    def _finish_experts(self, experts: ExpertStatistics, for_merging: bool) -> dict[str, FfnStatistics]:
        stacked, routed = experts.finish(), experts.routed.tolist()
        kept = _kept(stacked, experts.block_sums)
        found = {}
        for name, expert in self.numbers.items():
            values = {statistic: value[expert] for statistic, value in stacked.items()}
            sample = experts.correlation_sample(expert)
            own = FfnStatistics(values, sample, routed[expert], block_sums=kept[expert])
            if for_merging:
                own.positions = experts.sample_positions(expert)
                own.by_block = _all_blocks(experts.block_sums[:, expert])
            found[name] = own
        return found


def _kept(values: dict[str, torch.Tensor], by_block: torch.Tensor) -> list[BlockSums]:
    """Block sums of E FFNs, from statistics [E, F] and sums [2, E, n, F] of this process's blocks."""
    return block_sums(values["loss_proxy"], values["activation_power"], by_block[0], by_block[1])


def _all_blocks(by_block: torch.Tensor) -> torch.Tensor:
    """Sums [2, n, F] of all processes' blocks, [2, N, F]."""
    return distributed.all_gather_rows(by_block.transpose(0, 1)).transpose(0, 1)


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
