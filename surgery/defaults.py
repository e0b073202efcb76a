"""Defaults that the library and the command line share; each stands here once."""

from __future__ import annotations

METHOD = "lp-hybrid"
REPAIR = "lstsq-acc"
ALLOCATION = "uniform"
SPARSITY = 0.5
CALIBRATION_TEXTS = ("web", "wikitext", "code", "chat")  # in equal shares
LOSS_ON = ("answers", "all")  # of chat; the first unless asked
EVALUATION_TEXT = "wikitext-test"
BLOCKS = 64
BLOCK_SIZE = 512
SEED = 42
TARGET_CUTS = ("ffn", "layers", "kv")  # kinds of cut that a target is met by: stock classes load the result
SEARCH_SECONDS = 1800.0
