"""Channel statistics: running sums over calibration tokens, one set per layer.

Symbols: u [T, F] input of down_proj; s = dL/du, L the summed token cross-entropy in nats; q = u * s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from surgery import distributed
from surgery.devices import wide_dtype
from surgery.ffn import EXPERT, Ffn
from surgery.tokens import Flow

CORRELATION_TOKENS = (
    2048  # tokens whose q is kept for the halo's redundancy (the paper's code uses at most as many)
)


SUMMED = ("loss_proxy", "activation_power", "curvature", "taylor", "mean")  # means over tokens


def named_statistics(means: torch.Tensor, largest: torch.Tensor) -> dict[str, torch.Tensor]:
    """Statistics [...] float32 on the CPU, named as in the index file, from means [5, ...] and max |u| [...].

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
    """Every how manieth token's q is kept: a power of two, so that samples of parts hold that of the whole."""
    return 1 << max(0, math.ceil(math.log2(max(1, tokens) / CORRELATION_TOKENS)))


class ChannelStatistics:
    """Per-channel sums of one layer over `blocks` blocks of `block_size` tokens.

    Each block is reduced in float32 and added in float64, in any order of arrival, so that the result does not
    depend on how blocks were grouped. q of every `stride`-th token of every block is kept for correlations. `blocks` are
    this process's; `all_blocks` those of all that work on the job.
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
        """Statistics [F], as `named_statistics`."""
        sums = distributed.total(self.sums.to(wide_dtype(self.sums.device)).sum(1))
        return named_statistics(sums / self.tokens, distributed.largest(self.largest))

    def correlation_sample(self) -> torch.Tensor:
        """q of the sampled tokens, [sampled, F]."""
        return distributed.rows(self.sampled_q)


class ExpertStatistics:
    """The same sums for the E experts of one layer, each over the tokens routed to it; means are over all tokens.

    A token's block decides nothing here: each micro-batch is reduced in float32 and added in float64.
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
        """Account for u, s [routed, F] of one expert; `tokens` are their positions among all calibration tokens."""
        u, s = u.float(), s.float()
        q = u * s
        rows = (q.square(), u.square(), s.square(), u, q.abs())
        self.sums[:, expert] += torch.stack([row.sum(0) for row in rows])
        torch.maximum(self.largest[expert], u.abs().amax(0), out=self.largest[expert])
        self.routed[expert] += len(u)
        places = tokens % self.block_size
        sampled = places % self.stride == 0
        self.sampled_q[expert].append(q[sampled])
        self.positions[expert].append(places[sampled].int())

    def finish(self) -> dict[str, torch.Tensor]:
        """Statistics [E, F], as `named_statistics`."""
        distributed.total(self.routed)
        return named_statistics(distributed.total(self.sums) / self.tokens, distributed.largest(self.largest))

    def correlation_sample(self, expert: int) -> torch.Tensor:
        """q of the sampled tokens that went to one expert, [sampled, F]."""
        empty = torch.zeros(0, self.largest.shape[1], device=self.largest.device)
        return distributed.rows(torch.cat([empty, *self.sampled_q[expert]]))

    def sample_positions(self, expert: int) -> torch.Tensor:
        """Where in their blocks the tokens of `correlation_sample` are, [sampled] int32."""
        empty = torch.zeros(0, dtype=torch.int32, device=self.largest.device)
        return distributed.rows(torch.cat([empty, *self.positions[expert]]))


@dataclass
class UnitStatistics:
    """One FFN's finished statistics by name ([F]), q of sampled tokens [S, F], and the tokens it saw.

    `positions` [S] of the sampled tokens in their blocks, of an expert; other FFNs see all tokens, in order.
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
        everywhere = all_blocks or blocks
        self.dense: dict[str, ChannelStatistics] = {}
        self.experts: ExpertStatistics | None = None
        for ffn in ffns:
            if ffn.stacked:
                self.experts = ExpertStatistics(len(ffn.units), ffn.width, everywhere, block_size, device)
            else:
                self.dense[ffn.key] = ChannelStatistics(ffn.width, blocks, block_size, device, everywhere)

    def add(self, flow: Flow) -> None:
        """Account for what went through one FFN."""
        if flow.tokens is None:
            self.dense[flow.unit].add(flow.first_block, flow.u, flow.s)
            return
        assert self.experts is not None
        expert = int(flow.unit.removeprefix(EXPERT))
        self.experts.add(expert, flow.tokens + flow.first_block * self.block_size, flow.u, flow.s)

    def finish(self, with_positions: bool = False) -> dict[str, UnitStatistics]:
        """Finished statistics by unit; `with_positions` where samples are to be kept."""
        found = {
            key: UnitStatistics(sums.finish(), sums.correlation_sample(), sums.tokens)
            for key, sums in self.dense.items()
        }
        if self.experts is not None:
            stacked, routed = self.experts.finish(), self.experts.routed.tolist()
            for expert, tokens in enumerate(routed):
                values = {name: value[expert] for name, value in stacked.items()}
                sample = self.experts.correlation_sample(expert)
                positions = self.experts.sample_positions(expert) if with_positions else None
                found[f"{EXPERT}{expert}"] = UnitStatistics(values, sample, tokens, positions)
        return found


def weight_range(gate: torch.Tensor | None, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Sum over gate row, up row and down column of max + |min|, each divided by its largest in the layer, [F].

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
    """L2 norms of each channel's gate row and up row [F, D] and down column [D, F], and the column's L1 norm."""
    down_DF = down.float()
    up_norm = up.float().norm(dim=1)
    return {
        "gate_norm": (gate.float().norm(dim=1) if gate is not None else torch.zeros_like(up_norm)).cpu(),
        "up_norm": up_norm.cpu(),
        "down_norm": down_DF.norm(dim=0).cpu(),
        "down_l1": down_DF.abs().sum(0).cpu(),
    }
