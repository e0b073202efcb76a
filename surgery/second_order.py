"""Scores that take more than sums over channels: how channels stand in for each other, and what outputs are worth.

Symbols: u [T, F] input of down_proj W [D, F]; g [T, D] = dL/d(W u); C second moment (or covariance) of u over tokens;
G second moment of g. One score holds many (`obs_scores`):

    score_j = (w_j' G w_j) / [C^-1]_jj

the squared loss gradient that is lost with channel j once the others have made up for it as well as they can. With G = I
it is optimal brain surgeon's (ZipLM, SlimGPT, OSSCAR's start); with a centred diagonal C and G = I it is FLAP's WIFV; with
a diagonal C it is mean u^2 * mean s^2, twice the factored LP, which is twice LP where u and s are independent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from surgery import distributed
from surgery.devices import wide_dtype
from surgery.ffn import Ffn
from surgery.tokens import Flow

DAMPING = 1e-2  # of the mean power, as OBS codes have it
POOL = 32  # channels looked at together in the greedy search
STEP = 1 + 2**-20  # makes equal costs differ, so that float32 keeps the order


def damped(moment: torch.Tensor, damping: float = DAMPING, relative: bool = False) -> torch.Tensor:
    """C + damping * mean(diag C) * I, as OBS codes have it; when `relative`, C + damping * diag C.

    One channel with activations of thousands makes the mean so large that every other channel's [C^-1]_jj is the same.
    """
    if relative:
        power = moment.diagonal()
        return moment + (damping * power.clamp_min(power.max() * 1e-12)).diag()
    lift = damping * moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)
    return moment + lift * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def obs_scores(
    weight: torch.Tensor, inverse: torch.Tensor, output_moment: torch.Tensor | None
) -> torch.Tensor:
    """(w_j' G w_j) / [C^-1]_jj, [F]; W [D, F], C^-1 [F, F], G [D, D] or None for the identity."""
    return quadratic(weight, output_moment).diagonal() / inverse.diagonal()


def quadratic(weight: torch.Tensor, output_moment: torch.Tensor | None) -> torch.Tensor:
    """W' G W [F, F]."""
    return weight.T @ (weight if output_moment is None else output_moment @ weight)


def unexplained(covariance: torch.Tensor) -> torch.Tensor:
    """Share of each channel's variance that no linear map of the others gives, [F] in [0, 1]: 1 / ([C^-1]_jj C_jj)."""
    lifted = damped(covariance, 1e-6)
    share: torch.Tensor = 1 / (torch.linalg.inv(lifted).diagonal() * lifted.diagonal())
    return share.clamp(0, 1)


def removal_costs(
    weight: torch.Tensor,
    moment: torch.Tensor,
    output_moment: torch.Tensor | None = None,
    relative: bool = False,
) -> torch.Tensor:
    """What each channel costs when it goes, [F], rising in the order in which greedy optimal brain surgery removes them.

    The channel with the lowest score goes, W and C^-1 are downdated so that the others make up for it, and so on:
        W <- W - w_j [C^-1]_j: / [C^-1]_jj,   C^-1 <- C^-1 - [C^-1]_:j [C^-1]_j: / [C^-1]_jj.
    Exact inside a pool of the lowest scores, half of which go before all others are brought up to date. Costs are made
    to rise strictly, by a millionth where they would not, so that sorting them gives the order back. C is damped.
    """
    inverse = torch.linalg.inv(damped(moment, relative=relative))
    product = quadratic(weight.to(inverse), None if output_moment is None else output_moment.to(inverse))
    alive = torch.arange(len(inverse), device=inverse.device)
    costs = torch.zeros(len(inverse), dtype=inverse.dtype, device=inverse.device)
    last = torch.zeros((), dtype=inverse.dtype, device=inverse.device)
    while len(alive):
        scores = product.diagonal() / inverse.diagonal()
        pool = scores.topk(min(POOL, len(alive)), largest=False).indices
        gone, paid = _greedy(product[pool][:, pool], inverse[pool][:, pool], max(1, len(pool) // 2))
        for place, cost in zip(gone, paid, strict=True):
            last = torch.maximum(cost, last * STEP).clamp_min(torch.finfo(torch.float32).tiny)
            costs[alive[pool[place]]] = last
        product, inverse, keep = _remove(product, inverse, pool[gone])
        alive = alive[keep]
    return costs


def _greedy(product: torch.Tensor, inverse: torch.Tensor, count: int) -> tuple[list[int], list[torch.Tensor]]:
    """The first `count` channels of a pool to go, one at a time, and what each costs."""
    product, inverse = product.clone(), inverse.clone()
    gone: list[int] = []
    paid: list[torch.Tensor] = []
    for _ in range(count):
        scores = product.diagonal() / inverse.diagonal()
        scores[gone] = torch.inf
        place = int(scores.argmin())
        paid.append(scores[place].clamp_min(0))
        gone.append(place)
        share = inverse[place] / inverse[place, place]
        row = product[place].clone()
        product = (
            product
            - torch.outer(row, share)
            - torch.outer(share, row)
            + row[place] * torch.outer(share, share)
        )
        inverse = inverse - torch.outer(inverse[:, place], share)
        inverse[place, place] = torch.inf
    return gone, paid


def _remove(
    product: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W' G W and C^-1 of the channels left when `gone` go and the others make up for them; which are left."""
    keep = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
    keep[gone] = False
    share = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, keep])  # W_kept -= W_gone share
    crossed = product[keep][:, gone] @ share
    left = product[keep][:, keep] - crossed - crossed.T + share.T @ product[gone][:, gone] @ share
    return left, inverse[keep][:, keep] - inverse[keep][:, gone] @ share, keep


@dataclass
class FfnMoments:
    """Running sums over tokens of one dense FFN, and the gradient of its weights.

    `plain` sum u u' and `weighted` sum |g|^2 u u' [F, F]; `outputs` sum g g' [D, D]; `total` sum u and
    `weighted_total` sum |g|^2 u [F]; `tokens` and `weight` the sums of 1 and |g|^2. Weighting tokens by |g|^2 is what
    keeps one token with an activation of tens of thousands, whose gradient is nearly nothing, from owning C.
    """

    plain: torch.Tensor
    weighted: torch.Tensor
    outputs: torch.Tensor
    total: torch.Tensor
    weighted_total: torch.Tensor
    weight: torch.Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, ffn: Ffn, device: torch.device) -> FfnMoments:
        """No tokens seen yet."""
        width, hidden = ffn.width, len(ffn.down_weight())
        plain = torch.zeros(width, width, dtype=wide_dtype(device), device=device)
        one, outputs = plain.new_zeros(width), plain.new_zeros(hidden, hidden)
        return cls(plain, plain.clone(), outputs, one, one.clone(), plain.new_zeros(()))

    def add(self, u: torch.Tensor, g: torch.Tensor) -> None:
        """Account for tokens u [T, F], g [T, D]; products in float32."""
        u, g = u.float(), g.float()
        power = g.square().sum(-1)
        self.plain += u.T @ u
        self.weighted += u.T @ (u * power[:, None])
        self.outputs += g.T @ g
        self.total += u.sum(0)
        self.weighted_total += (u * power[:, None]).sum(0)
        self.weight += power.sum()
        self.tokens += len(u)

    def gather(self) -> None:
        """Add up what all processes saw."""
        for sums in (self.plain, self.weighted, self.outputs, self.total, self.weighted_total, self.weight):
            distributed.total(sums)
        self.tokens = int(distributed.total(torch.tensor(self.tokens, device=self.plain.device)))

    def scores(self, weight: torch.Tensor, centred: bool) -> dict[str, torch.Tensor]:
        """`obs`, `obs_loss` (removal costs) and `unexplained`, [F]; `centred` where a bias can take up a mean."""
        wide = weight.to(self.plain)
        plain, mean = self.plain / self.tokens, self.total / self.tokens
        share = self.weight.clamp_min(torch.finfo(torch.float32).tiny)
        weighted, centre = self.weighted / share, self.weighted_total / share
        aware = weighted - torch.outer(centre, centre) if centred else weighted
        return {
            "obs": removal_costs(wide, plain),
            "obs_loss": removal_costs(wide, aware, self.outputs / self.tokens, relative=True),
            "unexplained": unexplained(plain - torch.outer(mean, mean)),
        }


class SecondOrder:
    """What one layer's dense FFNs need for their second-order scores, gathered in its backward pass."""

    def __init__(self, ffns: list[Ffn], layer: nn.Module, device: torch.device) -> None:
        self.ffns = {ffn.key: ffn for ffn in ffns if not ffn.stacked}
        self.layer = layer
        self.moments = {key: FfnMoments.zeros(ffn, device) for key, ffn in self.ffns.items()}
        names = [name for ffn in self.ffns.values() for name in ffn.cuts()]
        self.gradients = {
            name: torch.zeros_like(layer.get_parameter(name).data, dtype=torch.float32) for name in names
        }
        self.input_power: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While open, the power of what enters each FFN is summed over tokens, by input dimension [D]."""
        handles = []
        for key, ffn in self.ffns.items():

            def keep(_: nn.Module, inputs: tuple[torch.Tensor, ...], key: str = key) -> None:
                power = inputs[0].detach().float().square().flatten(0, -2).sum(0)
                self.input_power[key] = self.input_power.get(key, 0) + power

            handles.append(self.layer.get_submodule(ffn.site.rows[0]).register_forward_pre_hook(keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, flow: Flow) -> None:
        """Account for what went through one FFN; experts have no second-order scores."""
        if flow.unit in self.moments:
            assert flow.g is not None
            self.moments[flow.unit].add(flow.u.flatten(0, -2), flow.g.flatten(0, -2))

    def finish(self) -> dict[str, dict[str, torch.Tensor]]:
        """Scores by FFN: those of `FfnMoments.scores`, `taylor_weight` = sum |w dL/dw| over a channel's weights, and
        `read_norm` = sum_k (|W_gate| + |W_up|)[., k] * sqrt(mean x_k^2), x what enters the FFN.
        """
        found = {}
        for gradient in self.gradients.values():
            distributed.total(gradient)
        for key, ffn in self.ffns.items():
            self.moments[key].gather()
            distributed.total(self.input_power[key])
            centred = getattr(ffn.module, "bias", None) is not None
            scores = self.moments[key].scores(ffn.down_weight(), centred)
            scores["taylor_weight"] = self._taylor(ffn)
            norm = (self.input_power[key] / self.moments[key].tokens).sqrt()
            rows = [row.float().abs() for row in ffn.row_weights() if row is not None]
            scores["read_norm"] = torch.stack([row @ norm for row in rows]).sum(0)
            found[key] = {name: value.float().cpu() for name, value in scores.items()}
        return found

    def _taylor(self, ffn: Ffn) -> torch.Tensor:
        """LLM-Pruner's first-order importance, param_first: sum |w dL/dw| over gate row, up row and down column, [F]."""
        originals = {}
        for name in ffn.cuts():  # |w g| takes the weights' place for a moment, to be read as they are
            parameter = self.layer.get_parameter(name)
            originals[name] = parameter.data
            parameter.data = (parameter.data.float() * self.gradients[name]).abs()
        gate, up = ffn.row_weights()
        total = up.sum(1) + ffn.down_weight().sum(0) + (0 if gate is None else gate.sum(1))
        for name, original in originals.items():
            self.layer.get_parameter(name).data = original
        return total
