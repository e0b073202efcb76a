"""Reads a LoRA adapter as peft stores it: adapter_config.json and adapter_model.safetensors.

What surgeon does not know to be harmless is refused by name: an adapter whose tensors are only part of what
it does would load and compute something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from surgery.checkpoint.refusals import is_git_lfs_pointer, parse_json, pointer_error
from surgery.errors import CheckpointError, UnsupportedModelError
from surgery.heal.adapter import CONFIG, PREFIX, TENSORS

PICKLED = "adapter_model.bin"
# Fields of peft's LoraConfig that hold for the cut model as they are: they say which modules are adapted and
# how an output is scaled, or matter in training alone.
CARRIED = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout"),
    *("fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "lora_bias", "runtime_config", "loftq_config"),
    *("eva_config", "megatron_core", "ensure_weight_tying", "qalora_group_size"),
)
# values of init_lora_weights that leave the base model's weights as they are
HARMLESS_INIT = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter: its `config`, and its tensors by name, without peft's prefix `base_model.model.`."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def base(self) -> str | None:
        """The last part of the name of the model that it was trained on, where its config says that."""
        stated = self.config.get("base_model_name_or_path")
        return str(stated).rstrip("/").rpartition("/")[2] if stated else None


def read_adapter(folder: Path) -> PeftAdapter:
    """Read an adapter. Raises CheckpointError for what is none or is damaged, UnsupportedModelError for an
    adapter of another kind than surgeon can carry.
    """
    config = _read_config(folder)
    check_config(config, folder.name)
    return PeftAdapter(folder.name, config, _read_tensors(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(
            "this is no adapter of peft",
            where=str(folder) if not folder.is_dir() else folder.name,
            expected=f"a folder with {CONFIG} and {TENSORS}",
            found="a whole model" if (folder / "config.json").exists() else "",
            next_step="name the folder that peft's save_pretrained wrote, or that `hf download` fetched",
        )
    config = parse_json(CONFIG, file.read_bytes())
    if not isinstance(config, dict):
        raise CheckpointError("the adapter's config is no JSON object", where=CONFIG)
    return config


def check_config(config: dict[str, Any], name: str) -> None:
    """Raise UnsupportedModelError for anything but a plain LoRA, naming the field that makes it another."""
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise _refused(name, "peft_type", kind or "none")
    for field, value in config.items():
        if value and field not in CARRIED:
            raise _refused(name, field, str(value))
    if config.get("bias", "none") != "none":
        raise _refused(name, "bias", str(config["bias"]))
    init = config.get("init_lora_weights")
    if init not in HARMLESS_INIT:
        raise UnsupportedModelError(
            "this adapter was trained on a base model whose weights its initialisation had changed",
            where=name,
            found=f"init_lora_weights {init}",
            next_step="convert it to a plain LoRA with peft's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


def _refused(name: str, field: str, value: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "surgeon carries plain LoRA adapters only",
        where=name,
        expected="peft_type LORA without extensions",
        found=f"{field} {value[:80]}",
        next_step="merge the adapter into the dense model, and cut that",
    )


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / TENSORS
    if not file.is_file():
        pickled = (folder / PICKLED).exists()
        raise CheckpointError(
            "the adapter's weights are pickled, which can run code when read; surgeon reads safetensors only"
            if pickled
            else "the adapter's weights are missing",
            where=folder.name,
            expected=TENSORS,
            found=PICKLED if pickled else "",
            next_step="load the adapter once with peft and save_pretrained it to a new folder",
        )
    with file.open("rb") as handle:
        if is_git_lfs_pointer(handle.read(64)):
            raise pointer_error(TENSORS)
    try:
        with safe_open(file, "pt") as stored:
            return {name.removeprefix(PREFIX): stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError("a weight file is damaged", where=TENSORS, found=str(error)) from error
