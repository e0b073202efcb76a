"""Where each model family keeps its feed-forward network: one table, and nothing about families anywhere else.

A *channel* is one index of the FFN's intermediate width. For a gated FFN it is one row of gate_proj, one row of
up_proj and one column of down_proj. Paths are relative to a decoder layer, in the module names of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from surgery.errors import UnsupportedModelError


@dataclass(frozen=True)
class FfnLayout:
    """Modules of one FFN and the config key that holds its width.

    `down` is the linear whose input is the channel activation u [T, F]; `rows` are the linears producing it, whose
    weight [F, D] and bias [F] are cut along their first axis. `down`'s weight [D, F] is cut along its second.
    """

    rows: tuple[str, ...]
    down: str
    width_key: str

    @property
    def gate(self) -> str:
        """The gate projection (for an FFN without gate: the only input projection)."""
        return self.rows[0]

    @property
    def up(self) -> str:
        """The up projection (for an FFN without gate: the same as `gate`)."""
        return self.rows[-1]


GATED = FfnLayout(rows=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj", width_key="intermediate_size")

FAMILIES: dict[str, FfnLayout] = {
    "gemma": GATED,
    "gemma2": GATED,
    "gemma3_text": GATED,
    "llama": GATED,
    "mistral": GATED,
    "olmo2": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "smollm3": GATED,
}


def layout_of(config: dict[str, Any], where: str) -> FfnLayout:
    """The FFN layout of a config.json. Raises UnsupportedModelError, by name, for anything not in the table."""
    family = str(config.get("model_type", ""))
    supported = ", ".join(sorted(FAMILIES))
    if config.get("is_encoder_decoder"):
        raise UnsupportedModelError(
            "encoder-decoder models are not supported",
            where=where,
            expected=f"a decoder-only model ({supported})",
            found=family,
        )
    if family not in FAMILIES:
        raise UnsupportedModelError(
            "no known feed-forward layout for this model type",
            where=where,
            expected=f"one of {supported}",
            found=family or "no model_type",
            next_step="open an issue naming the model, or add an entry to surgery/families.py",
        )
    layout = FAMILIES[family]
    width = config.get(layout.width_key)
    if not isinstance(width, int) or width < 1:
        raise UnsupportedModelError(
            "the config does not say how wide the feed-forward network is",
            where=where,
            expected=f"a positive integer {layout.width_key}",
            found=repr(width),
        )
    return layout
