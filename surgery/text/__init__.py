"""Text to blocks of token ids: what people name as a text, read piece by piece, tokenised piece by piece."""

from surgery.text.blocks import TokenBlocks, first_blocks
from surgery.text.calibration_text import draw_blocks
from surgery.text.sources import NAMED_TEXTS, Text, open_text

__all__ = ["NAMED_TEXTS", "Text", "TokenBlocks", "draw_blocks", "first_blocks", "open_text"]
