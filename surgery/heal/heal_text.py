"""The text of a heal: blocks to train on and, of each text, a few blocks that are only measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from surgery.checkpoint.transformers_model import load_tokenizer
from surgery.engine.open_model import Model
from surgery.errors import CalibrationError
from surgery.heal.train import HeldOut
from surgery.text import TokenBlocks, draw_blocks, open_text
from surgery.text.calibration_text import share_blocks

HELD_OUT = 4  # blocks of each text that are not trained on


@dataclass(frozen=True)
class HealText:
    """`ids` [N, T] are trained on, `held_out` blocks of each text are not; `parts` say what is from where."""

    ids: torch.Tensor
    held_out: HeldOut
    parts: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The texts' names."""
        return " + ".join(part["name"] for part in self.parts)

    def part(self, number: int, count: int) -> HealText:
        """Part `number` of `count`: every `count`-th training block, so that each has all texts in their
        shares; held-out blocks are those of the whole.
        """
        place, parts = 0, []
        for entry in self.parts:
            rows = range(place, place + entry["blocks"])
            mine = sum(row % count == number for row in rows)
            parts.append({**entry, "blocks": mine})
            place += entry["blocks"]
        return replace(self, ids=self.ids[number::count], parts=tuple(parts))

    def as_json(self) -> dict[str, Any]:
        """The `text` entry of a heal in surgeon.json."""
        blocks = TokenBlocks(self.ids, self.name, None, 0)
        return {
            "name": self.name,
            "blocks": len(self.ids),
            "block_size": self.ids.shape[1],
            "sha256": blocks.digest,
            "parts": list(self.parts),
        }


def draw_heal_text(
    model: Model,
    specs: Sequence[str],
    *,
    blocks: int,
    block_size: int,
    seed: int,
    weights: Sequence[float] | None = None,
    text_column: str | None = None,
    held_out: int = HELD_OUT,
) -> HealText:
    """Draw `blocks` blocks to train on, shared among texts by `weights`, and `held_out` more of each text.

    Raises CalibrationError for a text that can't be read or is too short, UsageError for weights that do not
    fit.
    """
    tokenizer = load_tokenizer(model.checkpoint)
    texts = [open_text(spec, tokenizer, text_column) for spec in specs]
    counts = share_blocks(blocks, [text.name for text in texts], weights)
    trained: list[torch.Tensor] = []
    held: dict[str, torch.Tensor] = {}
    parts: list[dict[str, Any]] = []
    for place, (text, count) in enumerate(zip(texts, counts, strict=True)):
        if count == 0:
            continue
        try:
            drawn = draw_blocks(
                tokenizer, [text], blocks=count + held_out, block_size=block_size, seed=seed
            ).ids
        except CalibrationError as error:
            if "too short" in error.what:
                error.next_step = "give a longer text, fewer --tokens, or several --epochs over it"
            raise
        order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed + place))
        name = text.name if text.name not in held else f"{text.name} ({place + 1})"
        held[name] = drawn[order[:held_out].sort().values]
        trained.append(drawn[order[held_out:].sort().values])
        share = count / blocks
        parts.append(
            {
                "name": name,
                "revision": text.revision,
                "blocks": count,
                "share": share,
                "held_out": held_out,
            }
        )
    notes = tuple(note for text in texts for note in text.notes)
    return HealText(torch.cat(trained).long(), HeldOut(_longs(held)), tuple(parts), notes)


def _longs(blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: ids.long() for name, ids in blocks.items()}
