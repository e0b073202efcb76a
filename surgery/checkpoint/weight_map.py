"""Write the weight map of shards that have none, from their headers."""

from __future__ import annotations

import json
from pathlib import Path

from surgery.checkpoint.file_roles import INDEX_FILE, SINGLE_FILE
from surgery.checkpoint.output_folder import replace_text
from surgery.checkpoint.refusals import SHARD
from surgery.checkpoint.safetensors_header import read_header
from surgery.checkpoint.source import LocalFolder
from surgery.errors import CheckpointError


def write_weight_map(folder: Path) -> int:
    """Write model.safetensors.index.json for the shards in `folder`; returns the number of tensors.

    Raises CheckpointError when there is a weight file or an index already, when a shard is missing or
    damaged, or when a tensor is in two shards.
    """
    source = LocalFolder(folder)
    files = source.files() if folder.is_dir() else []
    existing = [file for file in (SINGLE_FILE, INDEX_FILE) if file in files]
    shards = [file for file in files if SHARD.fullmatch(file)]
    if existing or not shards:
        raise CheckpointError(
            "these shards need no index" if existing else "no shards to make an index of",
            where=folder.name,
            expected="files named model-00001-of-0000N.safetensors, without an index",
            found=", ".join(existing),
        )
    count = int(shards[0].removesuffix(".safetensors").rpartition("-")[2])
    if len(shards) != count:
        raise CheckpointError(
            "shards are missing",
            where=folder.name,
            expected=f"{count} shards",
            found=str(len(shards)),
            next_step="download the others",
        )
    weight_map: dict[str, str] = {}
    size = 0
    for shard in shards:
        for name, entry in read_header(source, shard).items():
            if name in weight_map:
                raise CheckpointError("a tensor is stored in two shards", where=shard, found=name)
            weight_map[name] = shard
            size += entry.nbytes
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    replace_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return len(weight_map)
