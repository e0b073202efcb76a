"""Least squares: new weights for what stays, so that a layer does again what it did before channels went.

For one linear map W [D, K] with inputs u [T, K] and wanted outputs r [T, D], tokens weighted by w:

    minimise over dW   sum_t w_t ||e_t - dW u_t||^2 + ridge * tr(dW S dW'),   e_t = r_t - W u_t,   S =
    diag(G), dW = C (G + ridge S)^-1,   G = sum_t w_t u_t u_t',   C = sum_t w_t e_t u_t'

Channels are scaled to unit power (that is what S does), and the penalty is on the change, not on the weights:
with every channel kept and r = W u the weights stay as they are, and an infinite ridge is no repair. Ridges
are tried from the largest down while the error on held-out calibration blocks falls (it had one minimum over
all ridges in each of 60 matrices of SmolLM2); where no ridge beats W itself, W stays. Where the map has a
bias, u ends in a constant 1, whose column is the change of the bias and has no penalty.

The choice of r matters most. The dense model's FFN output is the obvious target and the wrong one when inputs
come from the pruned model: it answers inputs the layer no longer gets. With the target "residual_stream", r
is what must be added to the pruned residual stream to arrive at the dense one, so that a layer also makes up
for what earlier ones lost (least squares on the kept channels with accumulated error, as OSSCAR and Týr do).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from surgery.engine import distributed
from surgery.engine.device import wide_dtype
from surgery.engine.fast_products import fast_products

RIDGES = (1.0, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4)  # in the order they are tried
SINGLE_RIDGE = 1e-3  # ridges from here on are solved for in float32
ADDITIVE_ERROR = (
    0.05  # share of a module's contribution to the stream that may be unexplained; rounding is far below
)
ADDITIVE_SCALE = 0.02  # relative amount by which the contribution may be scaled


def inverse_power(stream: torch.Tensor) -> torch.Tensor:
    """Token weights [...]: one over each token's power in the residual stream [..., D].

    Without that, one token with an activation of tens of thousands would dominate the Gram matrix.
    """
    power = stream.float().square().sum(-1)
    return power.clamp_min(torch.finfo(torch.float32).tiny).reciprocal()


def equal_weights(stream: torch.Tensor) -> torch.Tensor:
    """Token weights [...] of 1 for a residual stream [..., D]."""
    return torch.ones(stream.shape[:-1], dtype=torch.float32, device=stream.device)


@dataclass
class Moments:
    """Weighted second moments of inputs u [T, K] and of what W leaves of the targets, e = r - W u [T, D].

    G [K, K]; C [D, K]; `left` = sum_t w_t ||e_t||^2, `power` = sum_t w_t ||r_t||^2. Sums are float64. The
    difference is taken token by token, before anything is summed: C - W G would lose it in rounding. With
    `constant` the last of the K inputs is 1.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    left: torch.Tensor
    power: torch.Tensor
    constant: bool = False

    @classmethod
    def zeros(cls, outputs: int, inputs: int, device: torch.device, constant: bool = False) -> Moments:
        """Moments of no tokens."""
        wide, inputs = wide_dtype(device), inputs + constant
        gram = torch.zeros(inputs, inputs, dtype=wide, device=device)
        cross = torch.zeros(outputs, inputs, dtype=wide, device=device)
        return cls(gram, cross, gram.new_zeros(()), gram.new_zeros(()), constant)

    def add(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor,
        weights: torch.Tensor,
        columns: slice | torch.Tensor = slice(None),
    ) -> None:
        """Add tokens: u [T, K], r [T, D], the present W [D, K], w [T].

        Products are summed in float32; of bfloat16 inputs their factors are rounded to bfloat16, which is
        noise of 2^-9 of each sqrt(w) u, as little as a ridge of 1e-5. W u of a bfloat16 W is exact either
        way. With `columns`, G and C are of those inputs only, while e is what all inputs leave.
        """
        root = weights.float().sqrt()[:, None]
        with fast_products(inputs, weight):
            e = (targets.float() - inputs.float() @ weight.float().T) * root
            r, u = targets.float() * root, inputs[:, columns].float() * root
            u = torch.cat([u, root], 1) if self.constant else u
            self.gram += u.T @ u
            self.cross += e.T @ u
        self.left += e.square().sum()
        self.power += r.square().sum()

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.gram + other.gram,
            self.cross + other.cross,
            self.left + other.left,
            self.power + other.power,
            self.constant,
        )

    def of_kept(self, kept: torch.Tensor, weight: torch.Tensor) -> Moments:
        """Moments of a map of the inputs `kept` [K'], sorted, alone, from those of all inputs of W [D, K].

        With the other columns W_r of W gone, e = r - W_k u_k is W_r u_r more: C' = C_k + W_r G_rk, and
        `left` grows by 2 tr(C_r' W_r) + tr(W_r G_rr W_r'). The constant stays.
        """
        stays = torch.zeros(len(self.gram), dtype=torch.bool, device=kept.device)
        stays[kept] = True
        if self.constant:
            stays[-1] = True
        removed = ~stays
        gone = weight[:, removed[: weight.shape[1]]].to(self.gram)
        lost = gone @ self.gram[removed]
        gram, cross = self.gram[stays][:, stays], self.cross[:, stays] + lost[:, stays]
        left = self.left + ((2 * self.cross[:, removed] + lost[:, removed]) * gone).sum()
        return Moments(gram, cross, left, self.power, self.constant)

    def error(self, change: torch.Tensor | None = None) -> float:
        """Share of the targets left unexplained by W + dW: sum_t w_t ||e_t - dW u_t||^2 over sum_t w_t
        ||r_t||^2.
        """
        left = self.left
        if change is not None:
            single = change.float()
            gain = (single @ self.gram.float()).sub_(self.cross.float(), alpha=2).mul_(single)
            left = left + gain.sum(dtype=left.dtype)
        return float(left / self.power) if float(self.power) > 0 else 0.0


@dataclass
class SplitMoments:
    """Moments of training blocks and, apart, of the held-out blocks, which are those from `first_held` on."""

    train: Moments
    held_out: Moments
    first_held: int

    @classmethod
    def zeros(
        cls, outputs: int, inputs: int, device: torch.device, first_held: int, constant: bool = False
    ) -> SplitMoments:
        """Moments of no tokens."""
        train, held_out = (Moments.zeros(outputs, inputs, device, constant) for _ in range(2))
        return cls(train, held_out, first_held)

    def add(
        self,
        blocks: slice,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor,
        weights: torch.Tensor,
        tokens: torch.Tensor | None = None,
        columns: slice | torch.Tensor = slice(None),
    ) -> None:
        """Add a micro-batch of `blocks`: u [..., K], r [..., D], the present W [D, K], token weights w [n,
        T].

        `tokens` are the positions of u's and r's rows in the flattened n x T batch, where they are not all
        tokens. `columns` as of `Moments.add`.
        """
        flat = weights.flatten() if tokens is None else weights.flatten()[tokens]
        u, r = inputs.reshape(-1, inputs.shape[-1]), targets.reshape(-1, targets.shape[-1])
        border = (self.first_held - blocks.start) * weights.shape[1]  # tokens from here on are held out
        if border >= weights.numel() or border <= 0:
            (self.held_out if border <= 0 else self.train).add(u, r, weight, flat, columns)
            return
        places = torch.arange(len(u), device=u.device) if tokens is None else tokens
        for moments, chosen in ((self.train, places < border), (self.held_out, places >= border)):
            moments.add(u[chosen], r[chosen], weight, flat[chosen], columns)

    def of_kept(self, kept: torch.Tensor, weight: torch.Tensor) -> SplitMoments:
        """Both as of `Moments.of_kept`."""
        train, held_out = self.train.of_kept(kept, weight), self.held_out.of_kept(kept, weight)
        return SplitMoments(train, held_out, self.first_held)


def summed(moments: SplitMoments) -> SplitMoments:
    """Moments of all processes together, from those of each one's tokens; in place.

    Raises DistributedError.
    """
    for part in (moments.train, moments.held_out):
        for tensor in (part.gram, part.cross, part.left, part.power):
            distributed.all_reduce_sum(tensor)
    return moments


def least_squares(moments: Moments, ridge: float, has_bias: bool = False) -> torch.Tensor:  # noqa: ARG001
    """dW [D, K], float64, for one ridge; with a constant input, its column is the change of the bias.

    The scaled matrix has a diagonal of 1 + ridge and no eigenvalue below the ridge, so that from SINGLE_RIDGE
    on it is factorised in float32: dW then has a relative error of 1e-4 at most, of 1e-6 at the ridges that
    are chosen (a test shows it against float64). Consumer GPUs do float64 at a sixty-fourth of that rate.
    """
    gram = moments.gram
    power = gram.diagonal()
    scale = power.clamp_min(float(power.max()) * 1e-12).clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    for precision in (torch.float32, gram.dtype) if ridge >= SINGLE_RIDGE else (gram.dtype,):
        scaled = (gram / scale[:, None]).div_(scale).to(precision)
        scaled.diagonal()[: len(gram) - moments.constant].add_(ridge)
        wanted = (moments.cross / scale).to(precision)
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if not int(failed):
            change = torch.cholesky_solve(wanted.T, factor).T
            break
    else:  # numerically singular: eigenvalues that are noise are left out
        change = (torch.linalg.pinv(scaled, hermitian=True) @ wanted.T).T
    found: torch.Tensor = change.to(gram.dtype) / scale
    return found


def mean_shift(moments: Moments, ridge: float, has_bias: bool) -> torch.Tensor:
    """dW [D, K + 1] that puts back the mean of what is missing, m = mean_t e_t, as FLAP's bias does (AAAI
    2024).

    With a bias, m goes there. Without, the kept channels stand in for the constant 1 as well as they can by
    ridge least squares. `moments` have a constant.
    """
    mean = moments.cross[:, -1] / moments.gram[-1, -1]
    change = torch.zeros_like(moments.cross)
    if has_bias:
        change[:, -1] = mean
        return change
    one = moments.gram[:-1, -1:].T
    part = Moments(moments.gram[:-1, :-1], one, moments.left, moments.power)
    change[:, :-1] = torch.outer(mean, least_squares(part, ridge)[0])
    return change


@dataclass(frozen=True)
class Refit:
    """A change dW [D, K] of a weight, None where held-out blocks preferred the old one; the `ridge` it was
    found with.

    `before` and `after` are the unexplained shares of the target on held-out blocks, in [0, 1].
    """

    change: torch.Tensor | None
    ridge: float | None
    before: float
    after: float

    def without_change(self) -> Refit:
        """What is reported of it, without the matrix."""
        return replace(self, change=None)


def refit(moments: SplitMoments, solve: Callable[[Moments, float], torch.Tensor]) -> Refit:
    """Choose the ridge on held-out moments, then solve on all; `solve(moments, ridge)` returns a change."""
    train, held_out = moments.train, moments.held_out
    before = held_out.error()
    best, least = RIDGES[0], math.inf
    for ridge in RIDGES:
        error = held_out.error(solve(train, ridge))
        if not error < least:
            break
        best, least = ridge, error
    if not least < before:
        return Refit(None, None, before, before)
    return Refit(solve(train + held_out, best), best, before, least)


def adds(difference: torch.Tensor, contribution: torch.Tensor, stream: torch.Tensor) -> bool:
    """Whether a difference of residual streams is a module's output as it is, up to the stream's rounding."""
    weights = inverse_power(stream)[..., None]
    difference, contribution = difference.float(), contribution.float()
    power = (weights * contribution.square()).sum()
    scale = float((weights * difference * contribution).sum() / power) if float(power) > 0 else 0.0
    if abs(scale - 1) > ADDITIVE_SCALE:  # added, but scaled on the way
        return False
    error = (weights * (difference - contribution).square()).sum()
    return bool(error < ADDITIVE_ERROR * (weights * contribution.float().square()).sum())
