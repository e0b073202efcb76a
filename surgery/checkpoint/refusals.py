"""What to say of a folder or file that is no checkpoint surgeon can read: what it is, and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, one_line

POINTER = b"version https://git-lfs"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
VARIANT = re.compile(r"model\.([\w-]+?)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
ADAPTER = "adapter_config.json"


def is_git_lfs_pointer(first: bytes) -> bool:
    """Whether a file that begins with `first` is a Git LFS pointer instead of the file itself."""
    return first.startswith(POINTER)


def pointer_error(file: str) -> CheckpointError:
    """The error for a Git LFS pointer in place of `file`."""
    return CheckpointError(
        "a file is only a Git LFS pointer: the clone did not fetch the large files",
        where=file,
        next_step="run `git lfs install` and `git lfs pull` in the clone, or use `hf download`",
    )


def no_config(name: str, files: Sequence[str], read_json: Callable[[str], Any]) -> CheckpointError:
    """The error for a folder without config.json."""
    if ADAPTER in files:
        adapter = read_json(ADAPTER)
        base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
        return CheckpointError(
            "this folder holds an adapter (LoRA), not a model",
            where=name,
            found=ADAPTER,
            next_step=f"merge it into its base model{f', {base},' if base else ''} with peft's "
            "merge_and_unload() and save_pretrained, then give that folder",
        )
    inner = sorted({file.partition("/")[0] for file in files if file.endswith("/config.json")})
    return CheckpointError(
        "config.json is missing",
        where=name,
        found=f"a config.json in {inner[0]}/" if inner else "",
        next_step="give a folder written by save_pretrained or downloaded from the Hub",
    )


def no_weights(name: str, files: Sequence[str]) -> CheckpointError:
    """The error for a folder without weights that transformers would load from safetensors."""
    shards = [file for file in files if SHARD.fullmatch(file)]
    variants = sorted({found[1] for file in files if (found := VARIANT.fullmatch(file))})
    pickled = [file for file in files if file.endswith(PICKLED) and "/" not in file]
    packed = [file for file in files if file.endswith(".gguf")]
    if shards:
        return CheckpointError(
            "the shards have no index, without which transformers does not load them",
            where=name,
            expected="model.safetensors.index.json",
            found=f"{len(shards)} shards",
            next_step="make one with `surgeon shard-index` on this folder",
        )
    if variants:
        return CheckpointError(
            "only a variant of the weights is here, which transformers loads on request alone",
            where=name,
            expected="model.safetensors",
            found=f"variant {variants[0]}",
            next_step=f'load it with from_pretrained(..., variant="{variants[0]}") and save_pretrained it',
        )
    if packed:
        return CheckpointError(
            "this folder holds GGUF", where=name, found=packed[0], next_step="name the .gguf file itself"
        )
    if pickled:
        return CheckpointError(
            "the weights are pickled, which can run code when read; surgeon reads safetensors only",
            where=name,
            found=pickled[0],
            next_step="load the model once with transformers and save_pretrained it to a new folder",
        )
    return CheckpointError(
        "no safetensors weights",
        where=name,
        expected="model.safetensors or model.safetensors.index.json",
        next_step="give the folder that from_pretrained loads",
    )


def quantised_weights(name: str, form: str, card: str = "") -> CheckpointError:
    """The error for weights in a quantised form; `card` is the README.md, which may name the base model."""
    found = re.search(r"^base_model:\s*(?:\n- *)?([\w./-]+)", card, re.M)
    return CheckpointError(
        "the checkpoint is quantised, and surgery needs the original weights",
        where=name,
        expected="float32, float16, bfloat16, FP8 or packed integer weights",
        found=form,
        next_step=f"use the unquantised checkpoint it was made from{': ' + found[1] if found else ''}",
    )


def no_folder(source: str) -> CheckpointError:
    """The error for a MODEL that is neither a folder, a GGUF file nor a Hub id."""
    path = Path(source)
    if path.is_file():
        inside = path.parent.name or "."
        return CheckpointError(
            "this is a file, and a model is a folder",
            where=path.name,
            next_step=f"give its folder, {inside}"
            if (path.parent / "config.json").exists()
            else "give a folder holding config.json, or a .gguf file",
        )
    return CheckpointError(
        "no such model folder",
        where=source,
        next_step="give a folder holding config.json, a .gguf file, or a Hub id as org/name",
    )


def unreadable_json(file: str, content: bytes, error: Exception) -> CheckpointError:
    """The error for a JSON file that does not parse."""
    if is_git_lfs_pointer(content):
        return pointer_error(file)
    return CheckpointError(
        "a file is not valid JSON",
        where=file,
        found=one_line(error),
        next_step="fetch the file again",
    )


def parse_json(file: str, content: bytes) -> Any:
    """The value of a JSON file. Raises CheckpointError when it does not parse."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise unreadable_json(file, content, error) from error
