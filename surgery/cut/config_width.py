"""Write a new FFN width into a config.json, under every key that holds it."""

from __future__ import annotations

import copy
from typing import Any

from surgery.checkpoint.transformers_model import build_config, text_config
from surgery.errors import UnsupportedModelError


def set_width(config: dict[str, Any], key: str, before: int, after: int) -> None:
    """Change the width `key` of a config.json, in place, from `before` to `after`.

    Configs of early releases may hold the width under another key, which transformers still reads and prefers
    (`block_ff_dim` of LFM2). Such a key is found by trying: it is one that holds `before`, and changing it
    changes what transformers reads as `key`. Raises UnsupportedModelError where no key does.
    """
    text = text_config(config)
    place = config if key in config and key not in text else text
    known = key in place
    place[key] = after
    if _read(config, key) == after:
        if not known and (alias := _alias(config, key, before, after)) is not None:
            del place[key]
            text[alias] = after
        return
    alias = _alias(config, key, before, after)
    if alias is None:
        raise UnsupportedModelError(
            "the new width can't be written into the config: transformers reads another one from it",
            where=f"config.json, {key}",
            expected=str(after),
            found=str(_read(config, key)),
            next_step="save the model again with the installed transformers and prune that",
        )
    text[alias] = after
    if not known:
        del place[key]


def _alias(config: dict[str, Any], key: str, before: int, after: int) -> str | None:
    """The other key that holds the width and decides what `key` is read as, or None."""
    for name, value in text_config(config).items():
        if name == key or isinstance(value, bool) or value != before:
            continue
        changed = copy.deepcopy(config)
        text_config(changed)[name] = after
        text_config(changed).pop(key, None)
        if _read(changed, key) == after:
            return name
    return None


def _read(config: dict[str, Any], key: str) -> Any:
    """The value transformers reads from a config.json for `key`."""
    built = build_config(config, "config.json")
    return getattr(built.get_text_config(), key, getattr(built, key, None))
