"""Write a cut without repair, all tensors at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from helpers.tiny_models import opened
from surgery.checkpoint.shard_writer import ShardWriter
from surgery.cut.groups import Cut
from surgery.cut.tensors import TensorEdit, edited_specs

IDS = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(3))


def generated(model: Any) -> list[torch.Tensor]:
    """Four tokens that a model writes after IDS, with a cache and without one."""
    return [
        model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]


def write(source: Path, cut: Cut, folder: Path) -> None:
    """Write a cut of the checkpoint `source` to `folder`: weights and config."""
    model = opened(source)
    folder.mkdir()
    with ShardWriter(folder, edited_specs(model.checkpoint, cut.edits)) as writer:
        for name in model.checkpoint.tensors:
            edit = cut.edits.get(name, TensorEdit(name))
            if edit.name is not None:
                writer.write(edit.name, edit.apply(model.checkpoint.read(name)))
    (folder / "config.json").write_text(json.dumps(cut.config))
    for name, text in cut.files.items():
        (folder / name).write_text(text)
