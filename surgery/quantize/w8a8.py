"""Simulated 8-bit weights and activations, for measurements.

Sources: The Super Weight, section 4.1; SmoothQuant, arXiv 2211.10438.

`w8a8`: every linear W of the decoder layers is rounded with one scale (`rounding`), and its input x is
rounded per token, 8 bits, asymmetric. `w8a8-sa`: a token's super activation, its largest |entry| if more than
100 times the median |entry|, is replaced by that median with its sign; x is rounded, and the entry is
restored. `smoothquant`: channel j of x is divided by, and column j of W multiplied by,

    s_j = max|x_j|^a / max|W_j|^(1 - a),   a = 0.85, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from surgery.errors import UnsupportedModelError, UsageError
from surgery.index.spike_detector import SPIKE_RATIO
from surgery.quantize.rounding import Scheme, round_to_nearest

MODES = ("w8a8", "w8a8-sa", "smoothquant")
ALPHA = 0.85
STEPS = 255
WEIGHTS = Scheme(8, False, "tensor")


def round_tokens(x: torch.Tensor, hold_spikes: bool = False) -> torch.Tensor:
    """x [..., C] rounded to 256 levels per token, from its minimum to its maximum.

    With `hold_spikes`, a token's super activation is left out of the rounding and restored afterwards.
    """
    wide = x.float()
    if hold_spikes:
        magnitude = wide.abs()
        peak, place = magnitude.max(-1, keepdim=True)
        median = magnitude.median(-1, keepdim=True).values
        spike = peak > SPIKE_RATIO * median
        spikes = wide.gather(-1, place)
        wide = wide.scatter(-1, place, torch.where(spike, median * spikes.sign(), spikes))
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    scale = ((high - low) / STEPS).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = ((wide - low) / scale).round() * scale + low
    if hold_spikes:
        rounded = rounded.scatter(-1, place, torch.where(spike, spikes, rounded.gather(-1, place)))
    return rounded.to(x.dtype)


def smoothing(weight: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """s [C] of one linear W [R, C], from `largest`, max |x_j| [C] over calibration text."""
    tiny = torch.finfo(torch.float32).tiny
    columns = weight.float().abs().amax(0).clamp_min(tiny)
    return (largest.to(columns).clamp_min(tiny) ** ALPHA / columns ** (1 - ALPHA)).clamp(1e-5, 1e5)


class ActivationRounding:
    """A layer edit for `perplexity`: rounds the weights and the inputs of the resident layer's linears.

    Inputs are rounded by hooks. Use it as a context manager, which removes the hooks at its end. `mode` is
    one of MODES; smoothquant needs `largest`, max |x_j| [C] by module path. Raises UsageError for an unknown
    mode.
    """

    def __init__(
        self, mode: str, layers_path: str = "", largest: dict[str, torch.Tensor] | None = None
    ) -> None:
        if mode not in MODES:
            raise UsageError("unknown mode", where="--activations", expected=", ".join(MODES), found=mode)
        self.mode = mode
        self.layers_path = layers_path
        self.largest = largest or {}
        self._handles: list[Any] = []

    def __enter__(self) -> ActivationRounding:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def __call__(self, number: int, layer: nn.Module) -> None:
        """Edit the resident layer. Raises UnsupportedModelError for Conv1D and for experts in one tensor."""
        stacked = any(p.dim() == 3 and "experts" in name for name, p in layer.named_parameters())
        if stacked or any(type(module).__name__ == "Conv1D" for module in layer.modules()):
            raise UnsupportedModelError(
                "activations are rounded at Linear modules, which this model does without",
                where=f"layer {number}",
                found="experts in one tensor" if stacked else "Conv1D",
            )
        for name, module in layer.named_modules():
            if type(module).__name__ != "Linear":
                continue
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            scale = None
            if self.mode == "smoothquant":
                scale = smoothing(weight.data, self.largest[f"{self.layers_path}.{number}.{name}"])
            wide = weight.data if scale is None else (weight.data.float() * scale).to(weight.dtype)
            weight.data.copy_(round_to_nearest(wide, WEIGHTS).dequantised())
            self._handles.append(module.register_forward_pre_hook(self._hook(scale)))

    def _hook(self, scale: torch.Tensor | None) -> Callable[..., tuple[torch.Tensor, ...]]:
        def round_input(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x = inputs[0] if scale is None else inputs[0] / scale.to(inputs[0].dtype)
            return (round_tokens(x, self.mode == "w8a8-sa"), *inputs[1:])

        return round_input
