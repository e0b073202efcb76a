"""adapt: write a LoRA adapter of the dense model as one of a folder that was cut from it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from surgery.adapt.card import adapter_card
from surgery.adapt.carry import PART, Target, kept_channels, targets
from surgery.adapt.peft_folder import PeftAdapter
from surgery.checkpoint.manifest import MANIFEST, SCHEMA_VERSION, source_json, versions
from surgery.checkpoint.output_folder import check_destination, complete_folder
from surgery.engine.open_model import Model
from surgery.errors import CheckpointError, UnsupportedModelError
from surgery.heal.adapter import CONFIG, PREFIX, TENSORS
from surgery.model.ffn import is_conv1d

A, B = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True)
class Carried:
    """An adapter for the cut model, and what became of each adapted module: `cut`, `copied`, `saved` (carried
    whole, as modules_to_save has them) and `refitted`.
    """

    adapter: PeftAdapter
    cut: list[str]
    copied: list[str]
    saved: list[str]
    refitted: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """What was done, for programs."""
        return {
            "cut": self.cut,
            "refitted": self.refitted,
            "copied": self.copied,
            "saved": self.saved,
        }

    def lines(self) -> list[str]:
        """What was done, for people."""
        said = [f"{len(self.cut)} modules cut to the kept channels, {len(self.copied)} copied as they are"]
        if self.refitted:
            said.append(f"{len(self.refitted)} down projections refitted")
        if self.saved:
            said.append(f"{len(self.saved)} modules carried whole, as modules_to_save has them")
        return said


@dataclass(frozen=True)
class Carrier:
    """An adapter and the cut model that it is to be carried onto; both have been checked against each other.

    Made by `check_adapter`.
    """

    model: Model
    adapter: PeftAdapter
    targets: dict[str, Target]

    @property
    def down(self) -> dict[str, Target]:
        """Module -> Target of the adapted down projections whose inputs were cut."""
        return {module: target for module, target in self.targets.items() if target.ffn is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter's tensors before the cut, which are more than those after it."""
        return sum(tensor.nbytes for tensor in self.adapter.tensors.values())

    @property
    def notes(self) -> list[str]:
        """What to say before the work: that the adapter names another model than the folder was cut from."""
        source = self.model.checkpoint.read_json(MANIFEST)["source"]["name"].rpartition("/")[2]
        if self.adapter.base in (None, source):
            return []
        return [f"The adapter was trained on {self.adapter.base}, {self.model.name} was cut from {source}"]

    @property
    def repaired(self) -> bool:
        """Whether a repair changed the weights of the folder's down projections."""
        plan: dict[str, Any] = self.model.checkpoint.read_json(MANIFEST)["plan"]
        return bool(plan.get("repair", "none") != "none")

    def carry(self, refits: dict[str, torch.Tensor] | None = None) -> Carried:
        """The adapter with the kept rows and columns, and with `refits` (module -> A' [r, K]) where given."""
        tensors, refits = {}, refits or {}
        for name, tensor in self.adapter.tensors.items():
            match = PART.fullmatch(name)
            if match is None:
                tensors[name] = tensor
            elif match["part"] == A and match["module"] in refits:
                tensors[name] = refits[match["module"]].to(tensor.dtype).contiguous()
            else:
                tensors[name] = self.targets[match["module"]].edit(name, match["part"]).apply(tensor)
        cut = [m for m, one in self.targets.items() if one.rows is not None or one.columns is not None]
        return Carried(
            adapter=replace(self.adapter, config=self._config(), tensors=tensors),
            cut=cut,
            copied=[module for module in self.targets if module not in cut],
            saved=sorted({plain(n)[0] for n in self.adapter.tensors if not PART.fullmatch(n)}),
            refitted=sorted(refits),
        )

    def _config(self) -> dict[str, Any]:
        """adapter_config.json: that of the dense model's adapter, with the name of the cut folder."""
        named = self.model.checkpoint.read_json(MANIFEST).get("repo") or self.model.name
        return {
            **self.adapter.config,
            "base_model_name_or_path": named,
            "revision": None,
            "inference_mode": True,
        }


def plain(name: str) -> tuple[str, str]:
    """(Module, parameter) of a tensor that peft saved whole; it names adapted modules by their base layer."""
    module, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
    return module, leaf


def check_adapter(model: Model, adapter: PeftAdapter) -> Carrier:
    """Raise CheckpointError or UnsupportedModelError unless an adapter can be carried onto a cut model."""
    found = targets(model.meta_model, kept_channels(model), list(adapter.tensors))
    if not found:
        raise CheckpointError("the adapter has no LoRA tensors", where=adapter.name, expected=A)
    for name, tensor in adapter.tensors.items():
        if PART.fullmatch(name) is None:
            _check_saved(model, name, tensor)
    for target in found.values():
        _check_shapes(adapter, target)
    return Carrier(model, adapter, found)


def _check_shapes(adapter: PeftAdapter, target: Target) -> None:
    """Raise CheckpointError unless A is [r, I] and B [O, r], for O and I of the dense model's linear."""
    names = (A, B) if f"{target.module}.{A}" in adapter.tensors else ("lora_embedding_A", "lora_embedding_B")
    down, up = (adapter.tensors.get(f"{target.module}.{name}") for name in names)
    shapes = [list(tensor.shape) if tensor is not None else None for tensor in (down, up)]
    rank = 0 if down is None else len(down)
    outputs, inputs = target.shape
    if shapes != [[rank, inputs], [outputs, rank]]:
        raise CheckpointError(
            "the adapter does not fit the model that this folder was cut from",
            where=f"{adapter.name}, {target.module}",
            expected=f"A [r, {inputs}] and B [{outputs}, r]",
            found=f"{shapes[0]} and {shapes[1]}",
            next_step="name an adapter of the dense model",
        )


def _check_saved(model: Model, name: str, tensor: torch.Tensor) -> None:
    """Raise for a tensor of modules_to_save that can't replace the cut model's: linears that the cut or its
    repair changed, and in a healed model everything inside the layers.
    """
    meta_model = model.meta_model
    module, leaf = plain(name)
    try:
        owner = meta_model.model.get_submodule(module)
        shape: list[int] | None = list(getattr(owner, leaf).shape)
    except AttributeError:
        owner, shape = nn.Identity(), None
    inside = module.startswith(meta_model.layers_path + ".")
    healed = "heals" in model.checkpoint.read_json(MANIFEST)
    if inside and (healed or isinstance(owner, nn.Linear) or is_conv1d(owner)):
        raise UnsupportedModelError(
            "the adapter replaces a module of the decoder layers that "
            + ("healing trained" if healed else "the cut or its repair may have changed"),
            where="modules_to_save",
            found=module,
            next_step="train the adapter with target_modules in place of modules_to_save",
        )
    if shape != list(tensor.shape):
        raise CheckpointError(
            "the adapter has a tensor that the cut model does not have so",
            where=f"adapter tensor {name}",
            expected="a LoRA tensor, or a parameter of the model" if shape is None else str(shape),
            found=str(list(tensor.shape)),
        )


def write_carried(
    carrier: Carrier,
    carried: Carried,
    out: Path,
    *,
    overwrite: bool = False,
    refit: dict[str, Any] | None = None,
    command: str | None = None,
) -> None:
    """Write an adapter as a folder of peft, with a card and a surgeon.json; it appears when it is complete.

    `refit` says on what text down projections were refitted and how well, `command` what makes the folder
    again. Raises DestinationError.
    """
    check_destination(out, overwrite=overwrite, needs_bytes=carrier.nbytes)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "adapter": {
            "source": {"name": carrier.adapter.name, "base": carrier.adapter.base},
            "onto": source_json(carrier.model.checkpoint),
            **carried.as_json(),
            "refit": refit,
        },
        "repo": None,
        "command": command,
        "versions": versions(),
    }
    with complete_folder(out) as folder:
        tensors = {PREFIX + name: tensor.contiguous() for name, tensor in carried.adapter.tensors.items()}
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        text = json.dumps(carried.adapter.config, indent=2) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(adapter_card(manifest, carried.adapter.config), encoding="utf-8")
