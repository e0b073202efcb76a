"""The optimizer of a heal: AdamW on float32 masters, one clipped step for all of them, warm-up and cosine."""

from __future__ import annotations

import math

import torch

from surgery.heal.state import MASTER, MOMENTS, State

WARM_UP = 0.1  # share of the steps in which the learning rate rises
LAST = 0.1  # share of the peak that it falls to
CLIP = 1.0  # largest norm of all gradients together


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of step 0 .. steps - 1: linear warm-up to `peak`, then half a cosine down to LAST of it."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm + 1) / max(1, steps - warm)
    return peak * (LAST + (1 - LAST) * (1 + math.cos(math.pi * done)) / 2)


class Optimizer:
    """torch.optim.AdamW, without weight decay, on the masters of a state, one layer after another."""

    def __init__(self, state: State, peak: float, steps: int) -> None:
        self.state = state
        self.peak = peak
        self.steps = steps

    def step(self, number: int) -> float:
        """Carry out step `number` of `steps` with the gradients of all masters, scaled by
        min(1, CLIP / norm) as torch.nn.utils.clip_grad_norm_ does; returns their norm before the clipping.
        """
        state = self.state
        norms = [torch.linalg.vector_norm(state.gradient(key)) for key in state.masters]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        factor = (CLIP / (norm + 1e-6)).clamp(max=1.0)
        rate = learning_rate(number, self.steps, self.peak)
        for keys in state.layers:
            with state.changing(keys) as tensors:
                for key, master in zip(keys, tensors[MASTER], strict=True):
                    master.grad = state.take_gradient(key, factor)
                self._step_layer(tensors, number, rate)
        state.stepped()
        return float(norm)

    def _step_layer(self, tensors: dict[str, list[torch.Tensor]], done: int, rate: float) -> None:
        """One step of AdamW, after `done` others, on masters with gradients and on their moments in place."""
        adam = torch.optim.AdamW(tensors[MASTER], lr=rate, weight_decay=0.0, fused=True)
        for place, master in enumerate(tensors[MASTER]):
            moments = {name: tensors[name][place] for name in MOMENTS}
            adam.state[master] = {"step": torch.tensor(float(done)), **moments}
        adam.step()
        adam.zero_grad(set_to_none=True)
