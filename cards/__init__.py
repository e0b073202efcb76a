"""Model cards: a manifest (surgeon.json) in, Markdown out. No network, no paths, only what was measured."""

from cards.card import render_card as render_card

__all__ = ["render_card"]
