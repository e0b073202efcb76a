"""Whether a generation_config.json is one that transformers can read."""

from __future__ import annotations

from typing import Any

from surgery.checkpoint.quiet_transformers import quiet_transformers


def generation_config_loads(fields: Any) -> bool:
    """Whether transformers can read the content of a generation_config.json; it can't load a model beside one
    that it can't read.
    """
    from transformers import GenerationConfig

    try:
        with quiet_transformers():
            GenerationConfig.from_dict(dict(fields)) if isinstance(fields, dict) else fields["not an object"]
    except Exception:  # noqa: BLE001 (whatever it is, the file can't be carried)
        return False
    return True
