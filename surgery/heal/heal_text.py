"""The text of a heal: blocks to train on and, of each text, a few blocks that are only measured on.

Of chat, the loss is on the assistant's answers alone unless all tokens are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from surgery import defaults
from surgery.checkpoint.transformers_model import load_tokenizer
from surgery.engine.open_model import Model
from surgery.errors import CalibrationError, UsageError
from surgery.heal.distil_loss import counted_tokens
from surgery.heal.train import HeldOut
from surgery.text import Text, TokenBlocks, draw_blocks, open_text
from surgery.text.calibration_text import share_blocks

HELD_OUT = 4  # blocks of each text that are not trained on
ANSWERS, ALL = defaults.LOSS_ON


@dataclass(frozen=True)
class HealText:
    """`ids` [N, T] are trained on, `held_out` blocks of each text are not; `parts` say what is from where.

    `counted` [N, T] are the tokens that the loss is on where they are predicted. `loss_on` is answers or all.
    """

    ids: torch.Tensor
    counted: torch.Tensor
    held_out: HeldOut
    parts: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()
    loss_on: str = ANSWERS

    @property
    def tokens_counted(self) -> int:
        """Predicted tokens of the blocks to train on that the loss is on."""
        return counted_tokens(self.counted)

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
            rows = [row for row in range(place, place + entry["blocks"]) if row % count == number]
            counted = counted_tokens(self.counted[rows]) if rows else 0
            parts.append({**entry, "blocks": len(rows), "tokens_counted": counted})
            place += entry["blocks"]
        mine = slice(number, None, count)
        return replace(self, ids=self.ids[mine], counted=self.counted[mine], parts=tuple(parts))

    def as_json(self) -> dict[str, Any]:
        """The `text` entry of a heal in surgeon.json."""
        blocks = TokenBlocks(self.ids, self.name, None, 0)
        return {
            "name": self.name,
            "blocks": len(self.ids),
            "block_size": self.ids.shape[1],
            "sha256": blocks.digest,
            "loss_on": self.loss_on,
            "tokens_counted": self.tokens_counted,
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
    loss_on: str = ANSWERS,
) -> HealText:
    """Draw `blocks` blocks to train on, shared among texts by `weights`, and `held_out` more of each text.

    Raises CalibrationError for a text that can't be read, is too short, or has no token to train on,
    UsageError for weights that do not fit or another `loss_on` than answers and all.
    """
    if loss_on not in defaults.LOSS_ON:
        raise UsageError("unknown --loss-on", expected=" or ".join(defaults.LOSS_ON), found=loss_on)
    tokenizer = load_tokenizer(model.checkpoint)
    texts = [open_text(spec, tokenizer, text_column) for spec in specs]
    counts = share_blocks(blocks, [text.name for text in texts], weights)
    trained: list[torch.Tensor] = []
    counted: list[torch.Tensor] = []
    held: dict[str, torch.Tensor] = {}
    parts: list[dict[str, Any]] = []
    for place, (text, count) in enumerate(zip(texts, counts, strict=True)):
        if count == 0:
            continue
        drawn, marks = _draw(tokenizer, text, count + held_out, block_size, seed, loss_on)
        order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed + place))
        name = text.name if text.name not in held else f"{text.name} ({place + 1})"
        held[name] = drawn[order[:held_out].sort().values]
        kept = order[held_out:].sort().values
        trained.append(drawn[kept])
        counted.append(marks[kept])
        parts.append(
            {
                "name": name,
                "revision": text.revision,
                "blocks": count,
                "share": count / blocks,
                "held_out": held_out,
                "tokens_counted": _checked(name, counted_tokens(counted[-1])),
            }
        )
    notes = tuple(note for text in texts for note in text.notes)
    ids = torch.cat(trained).long()
    return HealText(ids, torch.cat(counted), HeldOut(_longs(held)), tuple(parts), notes, loss_on)


def _draw(
    tokenizer: Any, text: Text, blocks: int, block_size: int, seed: int, loss_on: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Ids [N, T], which of them count) of drawn blocks of one text."""
    try:
        drawn = draw_blocks(
            tokenizer, [text], blocks=blocks, block_size=block_size, seed=seed, answers=loss_on == ANSWERS
        )
    except CalibrationError as error:
        if "too short" in error.what:
            error.next_step = "give a longer text, fewer --tokens, or several --epochs over it"
        raise
    marks = torch.ones_like(drawn.ids, dtype=torch.bool) if drawn.counted is None else drawn.counted
    return drawn.ids, marks


def _checked(name: str, tokens: int) -> int:
    """The number of tokens of a text that count. Raises CalibrationError where none does."""
    if tokens == 0:
        raise CalibrationError(
            "no token drawn of the text belongs to an answer",
            where=name,
            expected="chat with turns of the assistant, or text",
            next_step=f"give another text, larger --tokens or --block-size, or --loss-on {ALL}",
        )
    return tokens


def _longs(blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: ids.long() for name, ids in blocks.items()}
