"""The optimizer of a heal: AdamW on float32 masters, one clipped step for all of them, warm-up and cosine."""

from __future__ import annotations

import math

import torch

WARM_UP = 0.1  # share of the steps in which the learning rate rises
LAST = 0.1  # share of the peak that it falls to
CLIP = 1.0  # largest norm of all gradients together
MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of step 0 .. steps - 1: linear warm-up to `peak`, then half a cosine down to LAST of it."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm + 1) / max(1, steps - warm)
    return peak * (LAST + (1 - LAST) * (1 + math.cos(math.pi * done)) / 2)


class Optimizer:
    """torch.optim.AdamW, without weight decay, on masters by key; they change in place."""

    def __init__(self, masters: dict[str, torch.Tensor], peak: float, steps: int) -> None:
        self.masters = masters
        self.peak = peak
        self.steps = steps
        self.adam = torch.optim.AdamW(list(masters.values()), lr=peak, weight_decay=0.0)

    def step(self, number: int, gradients: dict[str, torch.Tensor]) -> float:
        """Carry out step `number` of `steps` with the gradients of all masters; returns their norm before the
        clipping.
        """
        for key, master in self.masters.items():
            master.grad = gradients[key]
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), CLIP)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate(number, self.steps, self.peak)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return float(norm)

    def state(self) -> dict[str, torch.Tensor]:
        """The moments by "name/key" of every master that has made a step."""
        return {
            f"{name}/{key}": self.adam.state[master][name]
            for key, master in self.masters.items()
            if master in self.adam.state
            for name in MOMENTS
        }

    def load(self, state: dict[str, torch.Tensor], done: int) -> None:
        """Go on after `done` steps with the moments that `state` returned then."""
        for key, master in self.masters.items():
            self.adam.state[master] = {
                "step": torch.tensor(float(done)),
                **{name: state[f"{name}/{key}"].to(master) for name in MOMENTS},
            }
