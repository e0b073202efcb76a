"""MetaModel: the transformers model on the meta device, whose weights are loaded and dropped layer by layer.

Stored tensor names are mapped to parameter names by transformers' own weight mapping
(`get_model_conversion_mapping`), never guessed. A family whose checkpoints use older or other names, or store
experts one by one that are stacked in memory, therefore loads as with `from_pretrained`.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.transformers_model import build_config, build_model
from surgery.errors import CheckpointError, UnsupportedModelError
from surgery.model.experts import show_experts
from surgery.model.families import Family, family_of
from surgery.model.ffn import Ffn, find_ffns
from surgery.model.infer_family import infer_family
from surgery.model.leftovers import CARRY, DROP, Leftover, find_leftovers

LayerEdit = Callable[[int, nn.Module], None]  # (layer index, resident layer): changes its weights


@dataclass
class StoredParameter:
    """Stored tensors and the parameters made from them: one to one, or by a transformers WeightConverter.

    `sources` are pairs (stored name, converter pattern that it matched), `targets` parameter names,
    `converter` is None for one to one.
    """

    targets: list[str]
    sources: list[tuple[str, str]] = field(default_factory=list)
    converter: Any = None

    @property
    def stored(self) -> list[str]:
        """Names of the stored tensors."""
        return [name for name, _ in self.sources]

    @property
    def steps(self) -> set[str]:
        """Class names of the converter's operations; empty without a converter."""
        return {type(step).__name__ for step in getattr(self.converter, "operations", ())}


class MetaModel:
    """A causal LM whose parameters are on the meta device until they are filled.

    - `model`: the transformers model; `layers`: its decoder layers; `ffns[i]`: the FFNs of layer i.
    - `layer_parameters[i]`: the stored parameters of layer i.
    - `other_parameters`: the stored parameters outside the layers that text needs (embeddings, final norm,
      head).
    - `leftovers`: stored tensors that are not part of the model, and what becomes of them.

    Raises UnsupportedModelError for a model that surgeon can't index, CheckpointError for missing tensors or
    wrong shapes.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        known = family_of(checkpoint.config, checkpoint.name)
        self.config = build_config(checkpoint.config, checkpoint.name)
        self._check_depth()
        self.model = build_model(self.config, dtype, checkpoint.name)
        show_experts(self.model)
        self.layers_path, self.layers = _find_layers(self.model, checkpoint.name)
        self.inferred = known is None
        self.family: Family = known or infer_family(
            self.config,
            self.model,
            self.layers_path,
            lambda config: build_model(config, dtype, checkpoint.name),
            checkpoint.name,
        )
        self.parameters: dict[str, torch.Tensor] = dict(self.model.state_dict())
        self.other_parameters: list[StoredParameter] = []
        self.layer_parameters: list[list[StoredParameter]] = [[] for _ in self.layers]
        self.ties: dict[str, str] = {}
        self.leftovers: list[Leftover] = []
        self._dtype_plan: list[tuple[re.Pattern[str], torch.dtype]] = [
            (re.compile(glob.replace("*", ".*")), wanted)
            for glob, wanted in self.model._get_dtype_plan(dtype).items()
        ]
        self._map_names()
        self.ffns: list[list[Ffn]] = [find_ffns(self.family.sites, layer) for layer in self.layers]
        if not any(self.ffns):
            raise UnsupportedModelError(
                "no decoder layer has the feed-forward network its family should have",
                where=checkpoint.name,
                expected=", ".join(site.down for site in self.family.sites),
            )
        for number, ffns in enumerate(self.ffns):
            if len(ffns) > 1 and not any(ffn.stacked for ffn in ffns):
                raise UnsupportedModelError(
                    "a decoder layer has several feed-forward networks and no routed experts",
                    where=f"layer {number}",
                    expected="one",
                    found=", ".join(ffn.site.down for ffn in ffns),
                )

    def _check_depth(self) -> None:
        """Refuse a config with more layers than there are tensors before a model of that depth is built."""
        count = getattr(self.config.get_text_config(), "num_hidden_layers", None)
        if isinstance(count, int) and count > len(self.checkpoint.tensors):
            raise CheckpointError(
                "the config has more layers than the checkpoint has tensors",
                where=self.checkpoint.name,
                expected=f"{count} layers",
                found=f"{len(self.checkpoint.tensors)} tensors",
                next_step="fetch the complete checkpoint, or its own config.json",
            )

    def _map_names(self) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix = self.model.base_model_prefix
        stored_parameters: dict[str, StoredParameter] = {}
        unknown: dict[str, str] = {}
        for stored in sorted(self.checkpoint.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(stored, renamings, converters, prefix, self.parameters)
            if target not in self.parameters and stored in self.parameters:
                target, pattern = stored, None
            converter = by_pattern[pattern] if pattern is not None else None
            if target not in self.parameters:
                unknown[stored] = target
                continue
            if converter is None:
                self._check_shape(stored, target)
            stored_parameter = stored_parameters.setdefault(
                target, StoredParameter(_targets(target, converter), converter=converter)
            )
            stored_parameter.sources.append((stored, pattern or stored))
        self.leftovers = find_leftovers(
            unknown, self.checkpoint.tensors, self.checkpoint.config, self.model, self.layers_path
        )
        for target, stored_parameter in stored_parameters.items():
            self._check_experts(target, stored_parameter)
        needed = self._needed_prefixes()
        for target, stored_parameter in stored_parameters.items():
            if target.startswith(self.layers_path + "."):
                number = int(target[len(self.layers_path) + 1 :].split(".", 1)[0])
                self.layer_parameters[number].append(stored_parameter)
            elif target.startswith(needed):
                self.other_parameters.append(stored_parameter)
        present = {
            name for stored_parameter in stored_parameters.values() for name in stored_parameter.targets
        }
        self._check_missing({name for name in self.parameters if name not in present})

    def _check_experts(self, target: str, stored_parameter: StoredParameter) -> None:
        """Experts stored one by one must be as many as the config says."""
        if "MergeModulelist" not in stored_parameter.steps:
            return
        wanted = self.parameters[target].shape[0]
        text = self.config.get_text_config()
        chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "moe_topk", None)
        if isinstance(chosen, int) and chosen > wanted:
            raise CheckpointError(
                "the config routes a token to more experts than there are",
                where=target,
                expected=f"num_experts_per_tok up to {wanted}",
                found=str(chosen),
                next_step="fetch the checkpoint's own config.json",
            )
        counts = Counter(pattern for _, pattern in stored_parameter.sources)
        for count in counts.values():
            if count != wanted:
                raise CheckpointError(
                    "the checkpoint does not have the number of experts the config asks for",
                    where=target,
                    expected=str(wanted),
                    found=str(count),
                    next_step="fetch the complete checkpoint, or its own config.json",
                )

    def _check_missing(self, missing: set[str]) -> None:
        ties = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        # A tied weight that is stored anyway is loaded as stored, as from_pretrained does. Either of the two
        # names may be the one that is stored.
        self.ties = {target: source for target, source in ties.items() if target in missing}
        self.ties |= {
            source: target for target, source in ties.items() if source in missing and target not in missing
        }
        missing = {
            name
            for name in missing
            if self.parameters[name].is_meta and (name not in self.ties or self.ties[name] in missing)
        }
        head = self.model.get_output_embeddings()
        heads = {f"{name}.weight" for name, module in self.model.named_modules() if module is head}
        if missing and missing <= heads:
            raise UnsupportedModelError(
                "the checkpoint has no output head: it is an embedding model or an encoder, not a causal LM",
                where=self.checkpoint.name,
                expected=sorted(missing)[0],
                next_step="use the language model it was made from",
            )
        if missing:
            raise CheckpointError(
                f"{len(missing)} tensors the model needs are not in the checkpoint",
                where=self.checkpoint.name,
                expected=sorted(missing)[0],
                next_step="fetch the complete checkpoint",
            )

    def _needed_prefixes(self) -> tuple[str, ...]:
        """Name prefixes of the parameters that text needs: the decoder and the head, not a vision tower."""
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        if decoder is None or decoder is self.model or not self.config.sub_configs:
            return ("",)
        names = {id(module): name for name, module in self.model.named_modules()}
        return tuple(f"{names[id(m)]}." for m in (decoder, head) if m is not None and id(m) in names)

    @property
    def beside(self) -> set[str]:
        """Names of stored tensors that are not part of the model but are carried beside it."""
        return {one.name for one in self.leftovers if one.fate == CARRY}

    @property
    def dropped(self) -> set[str]:
        """Names of stored tensors that no result has."""
        return {one.name for one in self.leftovers if one.fate == DROP}

    @property
    def may_be_unexpected(self) -> set[str]:
        """Names under which transformers may report the carried tensors as unexpected."""
        carried = [one for one in self.leftovers if one.fate == CARRY]
        return {name for one in carried for name in (one.name, one.target)}

    @property
    def casts_stored_weights(self) -> bool:
        """Whether any tensor of a layer is stored in another dtype than its compute dtype."""
        tensors = self.checkpoint.tensors
        return any(
            tensors[name].dtype != self.compute_dtype(stored_parameter.targets[0])
            for stored_parameters in self.layer_parameters
            for stored_parameter in stored_parameters
            for name in stored_parameter.stored
        )

    def stored_parameter(self, layer: int, name: str) -> StoredParameter:
        """The StoredParameter of the parameter at path `name` inside layer `layer`."""
        target = f"{self.layers_path}.{layer}.{name}"
        return next(stored for stored in self.layer_parameters[layer] if target in stored.targets)

    def widths(self) -> dict[str, int]:
        """Config key -> the FFN width it holds, ordered by the key's number of channels, largest first."""
        widths: dict[str, int] = {}
        channels: dict[str, int] = {}
        for ffns in self.ffns:
            for ffn in ffns:
                key = ffn.site.width_key
                widths[key] = max(widths.get(key, 0), ffn.width // self.width_multiplier(ffn))
                channels[key] = channels.get(key, 0) + ffn.width
        return {key: widths[key] for key in sorted(widths, key=lambda k: -channels[k])}

    def width_multiplier(self, ffn: Ffn) -> int:
        """How many times the width under its config key an FFN is wide: a shared FFN may be several."""
        key = ffn.site.width_multiplier_key
        if key is None:
            return 1
        # an inferred family has the number itself
        return int(key) if key.isdigit() else int(getattr(self.config.get_text_config(), key) or 1)

    def _check_shape(self, stored: str, target: str) -> None:
        found, expected = self.checkpoint.tensors[stored].shape, tuple(self.parameters[target].shape)
        if found != expected:
            raise CheckpointError(
                "a stored tensor does not have the shape the config asks for",
                where=stored,
                expected=str(list(expected)),
                found=str(list(found)),
            )

    def assemble(
        self, stored_parameter: StoredParameter, tensors: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Parameter name -> tensor, converted as from_pretrained does.

        `tensors` are in the order of `stored_parameter.stored`.
        """
        if stored_parameter.converter is None:
            return {stored_parameter.targets[0]: tensors[0]}
        converter = copy.deepcopy(stored_parameter.converter)
        first = stored_parameter.targets[0]
        for (stored, pattern), tensor in zip(stored_parameter.sources, tensors, strict=True):
            converter.add_tensor(first, stored, pattern, tensor)
        converted = converter.convert(first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def compute_dtype(self, name: str) -> torch.dtype:
        """The compute dtype of a parameter: the model's, except where the family requires float32."""
        dtype = self.parameters[name].dtype
        if not dtype.is_floating_point:
            return dtype
        return next((wanted for pattern, wanted in self._dtype_plan if pattern.search(name)), dtype)

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set parameters of the model (name -> tensor on the compute device), with requires_grad false."""
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[leaf] = tensor

    def drop(self, stored_parameters: list[StoredParameter]) -> None:
        """Move parameters, and those tied to them, back to the meta device, which frees their memory."""
        names = [name for stored_parameter in stored_parameters for name in stored_parameter.targets]
        for name in names:
            self._set_parameter(name, self.parameters[name])
        for name in self.ties:
            if self.ties[name] in names:
                self._set_parameter(name, self.parameters[name])

    def _set_parameter(self, name: str, tensor: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def tie(self) -> None:
        """Make tied weights (usually the output head) share the parameter they are tied to."""
        for target, source in self.ties.items():
            path, _, leaf = target.rpartition(".")
            parameter = self.model.get_parameter(source)
            self.model.get_submodule(path)._parameters[leaf] = parameter


def _targets(first: str, converter: Any) -> list[str]:
    """Names of all parameters that a converter makes, given the first."""
    if converter is None or len(converter.target_patterns) == 1:
        return [first]
    patterns = converter.target_patterns
    return [first.replace(patterns[0], pattern) for pattern in patterns]


def check_model(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedModelError, from the config alone, for a model that can't be indexed."""
    family_of(checkpoint.config, checkpoint.name)
    build_config(checkpoint.config, checkpoint.name)


def _find_layers(model: Any, where: str) -> tuple[str, nn.ModuleList]:
    """Path and ModuleList of the decoder layers. Raises UnsupportedModelError where none is found."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    count = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(module) for module in (decoder or model).modules()}
    for path, module in model.named_modules():
        if (
            id(module) in inside
            and isinstance(module, nn.ModuleList)
            and len(module) == count
            and all(isinstance(item, GradientCheckpointingLayer) for item in module)
        ):
            return path, module
    raise UnsupportedModelError("no list of decoder layers found", where=where, expected=f"{count} layers")
