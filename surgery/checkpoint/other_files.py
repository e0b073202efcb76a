"""Copying of a checkpoint's non-weight files into an output folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from surgery.checkpoint.reader import Checkpoint


def copy_other_files(
    checkpoint: Checkpoint, folder: Path, config: dict[str, Any], skip: tuple[str, ...] = ()
) -> None:
    """Copy a checkpoint's non-weight files into `folder`, except those in `skip`.

    config.json is copied unchanged unless `config` differs from what it holds.
    """
    for file in checkpoint.other_files:
        if file in skip:
            continue
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        data = bytes(checkpoint.source.read(file, 0, checkpoint.source.size(file)))
        if file == "config.json" and config != checkpoint.read_json(file):
            data = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        target.write_bytes(data)
