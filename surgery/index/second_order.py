"""Second-order scores: from correlations between channels (C) and between output gradients (G).

Symbols: u [T, F] input of down_proj W [D, F]; g [T, D] = dL/d(W u); C second moment (or covariance) of u over
tokens; G second moment of g. Several scores are cases of one formula (`obs_scores`):

    score_j = (w_j' G w_j) / [C^-1]_jj

This is the squared loss gradient lost with channel j after the other channels compensate for it optimally.
With G = I it is the score of optimal brain surgeon (ZipLM, SlimGPT, OSSCAR's start). With a centred diagonal
C and G = I it is FLAP's WIFV. With a diagonal C it is mean u^2 * mean s^2, twice the factored LP, which
equals twice LP where u and s are independent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from surgery.engine import distributed
from surgery.engine.device import wide_dtype
from surgery.engine.hooks import module_inputs
from surgery.engine.token_stream import FfnActivations
from surgery.model.ffn import Ffn

DAMPING = 1e-2  # fraction of the mean power, as in OBS implementations
POOL = 32  # channels considered together in the greedy search
STEP = 1 + 2**-20  # factor that makes equal costs differ, so that float32 keeps their order


def damped(moment: torch.Tensor, damping: float = DAMPING, relative: bool = False) -> torch.Tensor:
    """C + damping * mean(diag C) * I, as in OBS implementations; when `relative`, C + damping * diag C.

    Without `relative`, one channel with activations in the thousands raises the mean so far that all other
    channels get the same [C^-1]_jj.
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
    """Share of each channel's variance that no linear map of the other channels explains, [F] in [0, 1].

    It is 1 / ([C^-1]_jj C_jj).
    """
    damped_covariance = damped(covariance, 1e-6)
    share: torch.Tensor = 1 / (torch.linalg.inv(damped_covariance).diagonal() * damped_covariance.diagonal())
    return share.clamp(0, 1)


def removal_costs(
    weight: torch.Tensor,
    moment: torch.Tensor,
    output_moment: torch.Tensor | None = None,
    relative: bool = False,
) -> torch.Tensor:
    """Cost of removing each channel, [F], increasing in the order of greedy optimal brain surgery.

    Each step removes the channel with the lowest score and downdates W and C^-1, so that the other channels
    compensate for it:
        W <- W - w_j [C^-1]_j: / [C^-1]_jj,   C^-1 <- C^-1 - [C^-1]_:j [C^-1]_j: / [C^-1]_jj.
    The order is exact inside a pool of the lowest scores. Half of a pool is removed before the channels
    outside the pool are updated. Costs increase strictly, by a factor of 1 + 2^-20 where they otherwise would
    not, so that sorting the costs gives the order of removal. C is damped.
    """
    inverse = torch.linalg.inv(damped(moment, relative=relative))
    product = quadratic(weight.to(inverse), None if output_moment is None else output_moment.to(inverse))
    alive = torch.arange(len(inverse), device=inverse.device)
    costs = torch.zeros(len(inverse), dtype=inverse.dtype, device=inverse.device)
    last = torch.zeros((), dtype=inverse.dtype, device=inverse.device)
    while len(alive):
        scores = product.diagonal() / inverse.diagonal()
        pool = scores.topk(min(POOL, len(alive)), largest=False).indices
        count = max(1, len(pool) // 2)
        removed, step_costs = _greedy(product[pool][:, pool], inverse[pool][:, pool], count)
        for place, cost in zip(removed, step_costs, strict=True):
            last = torch.maximum(cost, last * STEP).clamp_min(torch.finfo(torch.float32).tiny)
            costs[alive[pool[place]]] = last
        product, inverse, keep = _remove(product, inverse, pool[removed])
        alive = alive[keep]
    return costs


def _greedy(product: torch.Tensor, inverse: torch.Tensor, count: int) -> tuple[list[int], list[torch.Tensor]]:
    """Remove `count` channels of a pool one at a time; returns their places in the pool and their costs."""
    product, inverse = product.clone(), inverse.clone()
    removed: list[int] = []
    costs: list[torch.Tensor] = []
    for _ in range(count):
        scores = product.diagonal() / inverse.diagonal()
        scores[removed] = torch.inf
        place = int(scores.argmin())
        costs.append(scores[place].clamp_min(0))
        removed.append(place)
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
    return removed, costs


def _remove(
    product: torch.Tensor, inverse: torch.Tensor, removed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Remove the channels `removed`, with the other channels compensating for them.

    Returns W' G W and C^-1 of the remaining channels, and the boolean mask of the remaining channels.
    """
    keep = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
    keep[removed] = False
    # W_kept -= W_removed share
    share = torch.linalg.solve(inverse[removed][:, removed], inverse[removed][:, keep])
    crossed = product[keep][:, removed] @ share
    left = product[keep][:, keep] - crossed - crossed.T + share.T @ product[removed][:, removed] @ share
    return left, inverse[keep][:, keep] - inverse[keep][:, removed] @ share, keep


@dataclass
class FfnMoments:
    """Running sums over the tokens of one dense FFN.

    `plain` sum u u' and `weighted` sum |g|^2 u u' [F, F]; `outputs` sum g g' [D, D]; `total` sum u and
    `weighted_total` sum |g|^2 u [F]; `tokens` and `weight` the sums of 1 and |g|^2. The weights |g|^2 prevent
    one token with an activation in the tens of thousands and a gradient near zero from dominating C.
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
        """Sums over no tokens."""
        width, hidden = ffn.width, len(ffn.down_weight())
        plain = torch.zeros(width, width, dtype=wide_dtype(device), device=device)
        total, outputs = plain.new_zeros(width), plain.new_zeros(hidden, hidden)
        return cls(plain, plain.clone(), outputs, total, total.clone(), plain.new_zeros(()))

    def add(self, u: torch.Tensor, g: torch.Tensor) -> None:
        """Add tokens u [T, F], g [T, D]; products are in float32."""
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
        """Sum over all processes."""
        for sums in (self.plain, self.weighted, self.outputs, self.total, self.weighted_total, self.weight):
            distributed.all_reduce_sum(sums)
        self.tokens = int(distributed.all_reduce_sum(torch.tensor(self.tokens, device=self.plain.device)))

    def scores(self, weight: torch.Tensor, centred: bool) -> dict[str, torch.Tensor]:
        """`obs`, `obs_loss` (both removal costs) and `unexplained`, [F], for the down projection [D, F].

        `centred` where the down projection has a bias, which can compensate for the mean of a removed
        channel.
        """
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
    """Second-order scores of one layer's dense FFNs, from sums collected in the layer's backward pass."""

    def __init__(self, ffns: list[Ffn], layer: nn.Module, device: torch.device) -> None:
        self.ffns = {ffn.name: ffn for ffn in ffns if not ffn.stacked}
        self.layer = layer
        self.moments = {name: FfnMoments.zeros(ffn, device) for name, ffn in self.ffns.items()}
        names = [path for ffn in self.ffns.values() for path in _parameters(ffn)]
        self.gradients = {
            name: torch.zeros_like(layer.get_parameter(name).data, dtype=torch.float32) for name in names
        }
        self.input_power: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While open, hooks sum the squared inputs of each FFN over tokens, [D]."""
        first = {
            name: self.layer.get_submodule(ffn.site.in_projections[0]) for name, ffn in self.ffns.items()
        }

        def add_power(name: str, x: torch.Tensor) -> None:
            power = x.detach().float().square().flatten(0, -2).sum(0)
            self.input_power[name] = self.input_power.get(name, 0) + power

        with module_inputs(first, add_power):
            yield

    def add(self, flow: FfnActivations) -> None:
        """Add the activations and gradients of one FFN; experts are ignored (no second-order scores)."""
        if flow.ffn in self.moments:
            assert flow.g is not None
            self.moments[flow.ffn].add(flow.u.flatten(0, -2), flow.g.flatten(0, -2))

    def finish(self) -> dict[str, dict[str, torch.Tensor]]:
        """Scores [F] by FFN and name.

        The scores of `FfnMoments.scores`; `taylor_weight` = sum |w dL/dw| over a channel's weights; and
        `read_norm` = sum_k (|W_gate| + |W_up|)[., k] * sqrt(mean x_k^2), where x is the input of the FFN.
        """
        found = {}
        for gradient in self.gradients.values():
            distributed.all_reduce_sum(gradient)
        for key, ffn in self.ffns.items():
            self.moments[key].gather()
            distributed.all_reduce_sum(self.input_power[key])
            centred = getattr(ffn.module, "bias", None) is not None
            scores = self.moments[key].scores(ffn.down_weight(), centred)
            scores["taylor_weight"] = self._taylor(ffn)
            norm = (self.input_power[key] / self.moments[key].tokens).sqrt()
            rows = [row.float().abs() for row in ffn.in_weights() if row is not None]
            scores["read_norm"] = torch.stack([row @ norm for row in rows]).sum(0)
            found[key] = {name: value.float().cpu() for name, value in scores.items()}
        return found

    def _taylor(self, ffn: Ffn) -> torch.Tensor:
        """LLM-Pruner's first-order importance, param_first, [F].

        It is sum |w dL/dw| over gate row, up row and down column.
        """
        originals = {}
        # |w g| temporarily replaces the weights, so that the FFN's accessors return its slices.
        for name in _parameters(ffn):
            parameter = self.layer.get_parameter(name)
            originals[name] = parameter.data
            parameter.data = (parameter.data.float() * self.gradients[name]).abs()
        gate, up = ffn.in_weights()
        total = up.sum(1) + ffn.down_weight().sum(0) + (0 if gate is None else gate.sum(1))
        for name, original in originals.items():
            self.layer.get_parameter(name).data = original
        return total


def _parameters(ffn: Ffn) -> list[str]:
    """Paths of an FFN's parameters that have a channel dimension."""
    return [part.parameter for part in (*ffn.in_slices(), ffn.down_slice())]
