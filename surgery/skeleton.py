"""The model as transformers builds it, on the meta device, with weights put in and taken out layer by layer.

Names on disk and names in memory are joined by transformers' own weight mapping (`get_model_conversion_mapping`),
never guessed, so that a family whose checkpoints use older or other names loads as `from_pretrained` would load it.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError, UnsupportedModelError
from surgery.families import FfnLayout, layout_of


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own log lines and bars off the terminal while a model is built."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class Skeleton:
    """A causal LM whose parameters are on the meta device until they are filled.

    `model` is the transformers model, `layers` its decoder layers, `layout` where their FFNs are. `outside` lists the
    stored tensors that belong to no layer, `inside[i]` those of layer i, both as (stored name, parameter name).
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.layout: FfnLayout = layout_of(checkpoint.config, checkpoint.name)
        self.model = _build(checkpoint, dtype)
        self.layers_path, self.layers = _find_layers(self.model, checkpoint.name)
        self.parameters: dict[str, torch.Tensor] = dict(self.model.state_dict())
        self.outside: list[tuple[str, str]] = []
        self.inside: list[list[tuple[str, str]]] = [[] for _ in self.layers]
        self.ties: dict[str, str] = {}
        self._map_names()

    def _map_names(self) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix = self.model.base_model_prefix
        missing = set(self.parameters)
        for stored in self.checkpoint.tensors:
            target, _ = rename_source_key(stored, renamings, converters, prefix, self.parameters)
            if target not in self.parameters:
                continue  # e.g. rotary buffers that older releases stored
            self._check_shape(stored, target)
            missing.discard(target)
            if target.startswith(self.layers_path + "."):
                number = int(target[len(self.layers_path) + 1 :].split(".", 1)[0])
                self.inside[number].append((stored, target))
            else:
                self.outside.append((stored, target))
        ties = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        # A tied weight that is stored all the same is kept as stored, as from_pretrained does.
        self.ties = {target: source for target, source in ties.items() if target in missing}
        missing -= set(self.ties)
        if missing:
            raise CheckpointError(
                f"{len(missing)} tensors the model needs are not in the checkpoint",
                where=self.checkpoint.name,
                expected=sorted(missing)[0],
                next_step="fetch the complete checkpoint",
            )

    def _check_shape(self, stored: str, target: str) -> None:
        found, expected = self.checkpoint.tensors[stored].shape, tuple(self.parameters[target].shape)
        if found != expected:
            raise CheckpointError(
                "a stored tensor does not have the shape the config asks for",
                where=stored,
                expected=str(list(expected)),
                found=str(list(found)),
            )

    def stored_name(self, layer: int, parameter: str) -> str | None:
        """Name on disk of a parameter given by its path inside decoder layer `layer`; None where there is none."""
        target = f"{self.layers_path}.{layer}.{parameter}"
        return next((stored for stored, name in self.inside[layer] if name == target), None)

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put tensors (parameter name -> tensor on the compute device) into the model, without gradients."""
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[leaf] = tensor

    def drop(self, names: list[tuple[str, str]]) -> None:
        """Return parameters, given as (stored name, parameter name), to the meta device, which frees them."""
        for _, name in names:
            self._set_parameter(name, self.parameters[name])
        for name in self.ties:
            if self.ties[name] in (target for _, target in names):
                self._set_parameter(name, self.parameters[name])

    def _set_parameter(self, name: str, tensor: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def tie(self) -> None:
        """Let tied weights (usually the output head) share the tensor they are tied to."""
        for target, source in self.ties.items():
            path, _, leaf = target.rpartition(".")
            parameter = self.model.get_parameter(source)
            self.model.get_submodule(path)._parameters[leaf] = parameter


def _build(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = checkpoint.config["model_type"]
    try:
        config_class = CONFIG_MAPPING[family]
    except KeyError as error:
        raise UnsupportedModelError(
            "the installed transformers does not know this model type",
            where=checkpoint.name,
            found=family,
            next_step="upgrade transformers",
        ) from error
    with quiet_transformers():
        try:
            config = config_class.from_dict(checkpoint.config)
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UnsupportedModelError(
                "transformers can't build a causal language model from this config",
                where=checkpoint.name,
                found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            ) from error
    return model.eval().requires_grad_(False)


def _find_layers(model: Any, where: str) -> tuple[str, nn.ModuleList]:
    """The ModuleList holding the decoder layers, and its path."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and all(isinstance(item, GradientCheckpointingLayer) for item in module)
        ):
            return path, module
    raise UnsupportedModelError("no list of decoder layers found", where=where, expected=f"{count} layers")
