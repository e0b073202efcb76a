"""The table of repair methods: how the weights that stay are refitted. Imports no torch.

To add a method, write its line here; a package of one's own adds one through the entry point group
"surgeon.repairs".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from surgery.registry import Registry, import_object

if TYPE_CHECKING:
    import torch

    from surgery.repair.least_squares import Moments

    Solve = Callable[[Moments, float, bool], torch.Tensor]
    TokenWeights = Callable[[torch.Tensor], torch.Tensor]

LEAST_SQUARES = "surgery.repair.least_squares:"


@dataclass(frozen=True)
class RepairMethod:
    """How what stays is refitted on calibration tokens, matrix by matrix, without training.

    `solve(moments, ridge, has_bias)` returns the change [D, K] of a matrix for one ridge ([D, K + 1] with a
    change of its bias); None for no repair. `token_weights(stream [..., D])` is each token's weight [...].
    Both are functions, or "module:function" imported when first used. `targets`: "ffn_output" makes each FFN
    put out what the dense one does, on the dense model's inputs; "residual_stream" brings the pruned model's
    residual stream back to the dense one's, on the pruned model's inputs, so that later layers make up for
    earlier ones. `fits_attention`: the attention's output projection is refitted too, where `targets` is the
    residual stream. `scales_final_norm`: after the last layer the final norm is scaled by one number
    (`norm_scale`), where `targets` is the residual stream. `constant`: inputs get a constant 1. `label` says
    on cards what was done.
    """

    label: str
    solve: str | Solve | None
    targets: Literal["ffn_output", "residual_stream"] = "ffn_output"
    token_weights: str | TokenWeights = f"{LEAST_SQUARES}inverse_power"
    fits_attention: bool = False
    scales_final_norm: bool = False
    constant: bool = False

    @property
    def changes_weights(self) -> bool:
        """Whether anything is refitted."""
        return self.solve is not None

    @property
    def follows_pruned(self) -> bool:
        """Whether the pruned model's own hidden states are computed, beside the dense model's."""
        return self.targets == "residual_stream"

    def solved(self, moments: Moments, ridge: float, has_bias: bool) -> torch.Tensor:
        """The change that `solve` finds."""
        solve: Any = import_object(self.solve)
        change: torch.Tensor = solve(moments, ridge, has_bias)
        return change

    def weights(self, stream: torch.Tensor) -> torch.Tensor:
        """Token weights [...] from the residual stream [..., D]."""
        function: Any = import_object(self.token_weights)
        weights: torch.Tensor = function(stream)
        return weights


REPAIRS: Registry[RepairMethod] = Registry(
    "repair",
    "surgeon.repairs",
    RepairMethod,
    {
        "none": RepairMethod("no weight was changed", None),
        "bias": RepairMethod(
            "the mean of what was removed was put back",
            f"{LEAST_SQUARES}mean_shift",
            token_weights=f"{LEAST_SQUARES}equal_weights",  # FLAP's mean is over tokens as they are
            constant=True,
        ),
        "lstsq": RepairMethod(
            "what stays was refitted by least squares on the calibration text",
            f"{LEAST_SQUARES}least_squares",
        ),
        "lstsq-acc": RepairMethod(
            "what stays was refitted by least squares on the calibration text",
            f"{LEAST_SQUARES}least_squares",
            targets="residual_stream",
            fits_attention=True,
            scales_final_norm=True,
        ),
    },
)
