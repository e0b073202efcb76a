"""The adapter of a heal as a folder of peft: adapter_config.json and adapter_model.safetensors.

`peft.PeftModel.from_pretrained(student, folder)` then computes what the healed model does, up to the rounding
of merged weights. The files are written without peft, whose import takes seconds and brings nothing that two
files need: it fills in what the config does not say. Names of tensors are those of peft:

- `base_model.model.<module>.lora_A.weight` [r, I] and `lora_B.weight` [O, r], float32.
- `base_model.model.<module>.<parameter>` of the modules of `modules_to_save`: the norms, which were trained
  themselves, in the dtype that the student stores them in.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from surgery.checkpoint.output_folder import check_destination, complete_folder
from surgery.engine.open_model import Model
from surgery.errors import DestinationError, UnsupportedModelError, UsageError
from surgery.heal.trainable import (
    A,
    B,
    Trainables,
    TrainMode,
    adapted_linears,
    direct_parameters,
    trained_numbers,
)
from surgery.model.ffn import is_conv1d
from surgery.model.meta_model import MetaModel

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# names that peft takes for those of single experts, in a model whose experts are stacked in one parameter
EXPERTS_OF_PEFT = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def check_mode(mode: TrainMode) -> None:
    """Raise UsageError for a mode that trains no adapter."""
    if mode.kind != "lora":
        raise UsageError(
            "nothing but an adapter can be saved as one",
            where="--save-adapter",
            expected="--train lora:R",
            found=f"--train {mode}",
        )


def adapter_bytes(meta_model: MetaModel, mode: TrainMode) -> int:
    """Bytes of the tensors of an adapter's folder, at most."""
    return 4 * sum(trained_numbers(meta_model, mode))


def check_adapter(student: Model, mode: TrainMode, folder: Path, out: Path, *, overwrite: bool) -> None:
    """Raise UsageError, UnsupportedModelError or DestinationError for an adapter that can't be written.

    `folder` is that of the adapter, `out` that of the healed model.
    """
    check_mode(mode)
    _check_modules(student.meta_model, mode)
    one, other = folder.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise DestinationError(
            "the adapter's folder and that of the result are one, or one lies in the other",
            where=str(folder),
            next_step="name another folder with --save-adapter",
        )
    needs = adapter_bytes(student.meta_model, mode)
    check_destination(
        folder, overwrite=overwrite, source=student.folder, needs_bytes=needs, option="--save-adapter"
    )


def _check_modules(meta_model: MetaModel, mode: TrainMode) -> None:
    """Raise UnsupportedModelError for layers of which peft would not find all that was trained."""
    for number, layer in enumerate(meta_model.layers):
        trained = direct_parameters(layer, mode)
        for module in sorted({path.rpartition(".")[0] for path in trained}):
            state = {f"{module}.{name}" for name in layer.get_submodule(module).state_dict()}
            if not state <= trained.keys():
                raise UnsupportedModelError(
                    "peft stores whole modules, and of one not all tensors are trained",
                    where=f"layer {number}, {module}",
                    found=", ".join(sorted(state - trained.keys())),
                    next_step="leave out --save-adapter",
                )
    stacked = any(ffn.stacked for ffns in meta_model.ffns for ffn in ffns)
    adapted = {path for layer in meta_model.layers for path in adapted_linears(layer)}
    taken = {path for path in adapted if stacked and path.rpartition(".")[2] in EXPERTS_OF_PEFT}
    if taken:
        raise UnsupportedModelError(
            "peft would take linears beside stacked experts for experts, and misplace their adapters",
            where=meta_model.checkpoint.name,
            found=", ".join(sorted(taken)),
            next_step="leave out --save-adapter",
        )


def write_adapter(student: Model, trainables: Trainables, folder: Path) -> None:
    """Write the two files of the adapter into `folder`."""
    meta_model = trainables.meta_model
    tensors: dict[str, torch.Tensor] = {}
    for number in range(len(meta_model.layers)):
        for path, master in trainables.of_layer(number).items():
            name = f"{PREFIX}{meta_model.layers_path}.{number}.{path}"
            if path.endswith((A, B)):
                tensors[f"{name}.weight"] = master.detach().cpu()
            else:
                stored = meta_model.stored_parameter(number, path).stored[0]
                tensors[name] = master.detach().cpu().to(meta_model.checkpoint.tensors[stored].dtype)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    text = json.dumps(adapter_config(student, trainables), indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def adapter_folder(student: Model, trainables: Trainables, folder: Path | None) -> Iterator[None]:
    """Write the adapter; `folder` appears when the block succeeds. Without one nothing is written."""
    if folder is None:
        yield
        return
    with complete_folder(folder) as partial:
        write_adapter(student, trainables, partial)
        yield


def adapter_config(student: Model, trainables: Trainables) -> dict[str, Any]:
    """The fields of peft's LoraConfig that are not its defaults: every module by its whole path.

    The base model is named as in surgeon.json, by its folder's name or Hub id. An output is scaled by
    lora_alpha / r.
    """
    meta_model, mode = trainables.meta_model, trainables.mode
    paths, norms, transposed = [], [], False
    for number, layer in enumerate(meta_model.layers):
        start = f"{meta_model.layers_path}.{number}."
        paths += [start + path for path in adapted_linears(layer)]
        transposed |= any(is_conv1d(layer.get_submodule(path)) for path in adapted_linears(layer))
        modules = dict.fromkeys(path.rpartition(".")[0] for path in direct_parameters(layer, mode))
        norms += [start + module for module in modules]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": student.name,
        "revision": student.checkpoint.revision,
        "inference_mode": True,
        "r": mode.rank,
        "lora_alpha": mode.rank * trainables.scale,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": paths,
        "modules_to_save": norms or None,
    }
