"""Repair: new weights for what stays, so that a layer does again what it did before channels went. Nothing is trained.

For one linear map W [D, K] with inputs u [T, K] and wanted outputs r [T, D], tokens weighted by w:

    minimise over dW   sum_t w_t ||e_t - dW u_t||^2 + ridge * tr(dW S dW'),   e_t = r_t - W u_t,   S = diag(G),
    dW = C (G + ridge S)^-1,   G = sum_t w_t u_t u_t',   C = sum_t w_t e_t u_t'

with channels scaled to unit power (that is what S does), and a penalty on the change rather than on the weights: with
every channel kept and r = W u the weights come back as they were, and an infinite ridge is no repair. The ridge is the
one with the smallest error on held-out calibration blocks; where none of them beats W itself, W stays.

What r is decides most. The dense model's FFN output is the obvious target and a trap when inputs come from the pruned
model: it answers for inputs the layer no longer gets. Here r is what must be added to the pruned residual stream to
arrive at the dense one, so that a layer also makes up for what those before it lost (least squares on the kept channels
with accumulated error, as OSSCAR and Týr do).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.devices import wide_dtype

RIDGES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
HELD_OUT = 8  # one calibration block in so many is held out to choose the ridge


def token_weights(stream: torch.Tensor) -> torch.Tensor:
    """One over each token's power in the residual stream [..., D].

    Without that, the one token with an activation of tens of thousands would own the Gram matrix.
    """
    power = stream.float().square().sum(-1)
    return power.clamp_min(torch.finfo(torch.float32).tiny).reciprocal()


@dataclass
class Moments:
    """Weighted second moments of inputs u [T, K] and of what W leaves of the targets, e = r - W u [T, D].

    G [K, K]; C [D, K]; `left` = sum_t w_t ||e_t||^2, `power` = sum_t w_t ||r_t||^2. Sums are float64. The difference
    is taken token by token, before anything is summed: C - W G would lose it in rounding.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    left: torch.Tensor
    power: torch.Tensor

    @classmethod
    def zeros(cls, outputs: int, inputs: int, device: torch.device) -> Moments:
        """No tokens seen yet."""
        wide = wide_dtype(device)
        shapes = ((inputs, inputs), (outputs, inputs), (), ())
        return cls(*(torch.zeros(shape, dtype=wide, device=device) for shape in shapes))

    def add(
        self, inputs: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Account for tokens: u [T, K], r [T, D], the present W [D, K], w [T]; products in float32."""
        root = weights.float().sqrt()[:, None]
        u, r = inputs.float() * root, targets.float() * root
        e = r - u @ weight.float().T
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
        )

    def error(self, change: torch.Tensor | None = None) -> float:
        """Share of the targets left unexplained by W + dW: sum_t w_t ||e_t - dW u_t||^2 over sum_t w_t ||r_t||^2."""
        left = self.left
        if change is not None:
            left = left + ((change @ self.gram - 2 * self.cross) * change).sum()
        return float(left / self.power) if float(self.power) > 0 else 0.0


def least_squares(moments: Moments, ridge: float) -> torch.Tensor:
    """dW [D, K], float64, for one ridge."""
    gram = moments.gram
    power = gram.diagonal()
    scale = power.clamp_min(float(power.max()) * 1e-12).clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    scaled = gram / scale[:, None] / scale
    scaled.diagonal().add_(ridge)
    wanted = moments.cross / scale
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if int(failed):  # numerically singular: the eigenvalues that are noise get no say
        change = (torch.linalg.pinv(scaled, hermitian=True) @ wanted.T).T
    else:
        change = torch.cholesky_solve(wanted.T, factor).T
    found: torch.Tensor = change / scale
    return found


@dataclass(frozen=True)
class Repair:
    """A repaired weight [D, K]; `ridge` None where held-out blocks preferred the old one.

    `before` and `after` are the unexplained shares of the target on held-out blocks.
    """

    weight: torch.Tensor
    ridge: float | None
    before: float
    after: float

    def as_json(self) -> dict[str, float | None]:
        """The entry of `repair` in surgeon.json."""
        return {"ridge": self.ridge, "held_out_before": self.before, "held_out_after": self.after}


def repair(train: Moments, held_out: Moments, weight: torch.Tensor) -> Repair:
    """Choose the ridge on held-out moments, then solve on all of them; `weight` is the W both were made with."""
    before = held_out.error()
    errors = {ridge: held_out.error(least_squares(train, ridge)) for ridge in RIDGES}
    best = min(errors, key=lambda ridge: errors[ridge])
    if not errors[best] < before:
        return Repair(weight, None, before, before)
    change = least_squares(train + held_out, best)
    return Repair(weight.to(change) + change, best, before, errors[best])
