"""The metadata of a source's model card, in whatever form it comes."""

from __future__ import annotations

import re
from typing import Any

KEYS = ("license", "license_name", "license_link", "language", "tags")
MANY = ("language", "tags")
# After a byte order mark, blank lines or comments; the closing line may be missing.
BLOCK = re.compile(
    r"\A(?:\s|\ufeff|<!--.*?-->)*---[ \t]*\r?\n(.*?)(?:\r?\n(?:---|\.\.\.)[ \t]*(?:\r?\n|\Z)|\Z)", re.DOTALL
)


def inherited_metadata(card: str | None) -> dict[str, Any]:
    """License, language and tags of a README.md: what also applies to a modified copy.

    Scalars are kept as text, so that the language `no` (Norwegian) is not read as a boolean. Of a front
    matter that is not YAML, the lines that name these keys are taken. Empty where there is none.
    """
    import yaml

    found = BLOCK.match(card or "")
    if found is None:
        return {}
    try:
        data = yaml.load(found[1], Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        data = None
    if not isinstance(data, dict):
        data = _from_lines(found[1])
    return {key: value for key in KEYS if (value := _as_text(data.get(key), many=key in MANY))}


def _as_text(value: Any, *, many: bool) -> Any:
    """A string, or a list of strings where a key may have `many` values; None for anything else."""
    values = value if isinstance(value, list) else [value]
    texts = [one.strip() for one in values if isinstance(one, str) and one.strip()]
    if many:
        return texts
    return texts[0] if texts else None


def _from_lines(block: str) -> dict[str, Any]:
    """Keys and values of the lines `key: value`, and of lists below a key, without a YAML parser."""
    data: dict[str, Any] = {}
    key = ""
    for line in block.splitlines():
        pair = re.match(r"([A-Za-z_]+):[ \t]*(.*)", line)
        item = re.match(r"\s*-[ \t]+(\S.*)", line)
        if pair:
            key, value = pair[1].lower(), pair[2].strip().strip("\"'")
            data[key] = [part.strip(" \"'") for part in value[1:-1].split(",")] if value[:1] == "[" else value
        elif item and key:
            earlier = data[key]
            data[key] = [*(earlier if isinstance(earlier, list) else []), item[1].strip().strip("\"'")]
    return data
