"""The model as transformers builds it, on the meta device, with weights put in and taken out layer by layer.

Names on disk and names in memory are joined by transformers' own weight mapping (`get_model_conversion_mapping`),
never guessed, so that a family whose checkpoints use older or other names, or store experts one by one that are
stacked in memory, loads as `from_pretrained` would load it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError, UnsupportedModelError
from surgery.families import Family, family_of, text_config
from surgery.ffn import Ffn, bind, show_experts
from surgery.inference import infer_family

CONFIG_ERRORS = (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError)


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


@dataclass
class Assembly:
    """Stored tensors that become parameters: one for one, or several through a converter of transformers'.

    `sources` are (stored name, pattern of the converter it matched); `targets` parameter names.
    """

    targets: list[str]
    sources: list[tuple[str, str]] = field(default_factory=list)
    converter: Any = None

    @property
    def stored(self) -> list[str]:
        """Names on disk."""
        return [name for name, _ in self.sources]

    @property
    def steps(self) -> set[str]:
        """Names of the converter's operations; none where a tensor is taken as it is."""
        return {type(step).__name__ for step in getattr(self.converter, "operations", ())}


class Skeleton:
    """A causal LM whose parameters are on the meta device until they are filled.

    `model` is the transformers model, `layers` its decoder layers, `ffns[i]` the FFNs of layer i. `outside` lists the
    assemblies that belong to no layer but are needed to run text, `inside[i]` those of layer i.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        known = family_of(checkpoint.config, checkpoint.name)
        self.config = build_config(checkpoint.config, checkpoint.name)
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
        self.ffns: list[list[Ffn]] = [bind(self.family.sites, layer) for layer in self.layers]
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
        self.parameters: dict[str, torch.Tensor] = dict(self.model.state_dict())
        self.outside: list[Assembly] = []
        self.inside: list[list[Assembly]] = [[] for _ in self.layers]
        self.ties: dict[str, str] = {}
        self._dtype_plan: list[tuple[re.Pattern[str], torch.dtype]] = [
            (re.compile(glob.replace("*", ".*")), wanted)
            for glob, wanted in self.model._get_dtype_plan(dtype).items()
        ]
        self._map_names()

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
        assemblies: dict[str, Assembly] = {}
        for stored in sorted(self.checkpoint.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(stored, renamings, converters, prefix, self.parameters)
            if target not in self.parameters and stored in self.parameters:
                target, pattern = stored, None
            converter = by_pattern[pattern] if pattern is not None else None
            if target not in self.parameters:
                continue  # e.g. rotary buffers that older releases stored
            if converter is None:
                self._check_shape(stored, target)
            assembly = assemblies.setdefault(
                target, Assembly(_targets(target, converter), converter=converter)
            )
            assembly.sources.append((stored, pattern or stored))
        needed = self._needed_prefixes()
        for target, assembly in assemblies.items():
            if target.startswith(self.layers_path + "."):
                number = int(target[len(self.layers_path) + 1 :].split(".", 1)[0])
                self.inside[number].append(assembly)
            elif target.startswith(needed):
                self.outside.append(assembly)
        present = {name for assembly in assemblies.values() for name in assembly.targets}
        self._check_missing({name for name in self.parameters if name not in present})

    def _check_missing(self, missing: set[str]) -> None:
        ties = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        # A tied weight that is stored all the same is kept as stored, as from_pretrained does.
        self.ties = {target: source for target, source in ties.items() if target in missing}
        missing = {n for n in missing - set(self.ties) if self.parameters[n].is_meta}
        if missing:
            raise CheckpointError(
                f"{len(missing)} tensors the model needs are not in the checkpoint",
                where=self.checkpoint.name,
                expected=sorted(missing)[0],
                next_step="fetch the complete checkpoint",
            )

    def _needed_prefixes(self) -> tuple[str, ...]:
        """Where the parameters are that run text: the decoder and the head, not a vision tower."""
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        if decoder is None or decoder is self.model or not self.config.sub_configs:
            return ("",)
        names = {id(module): name for name, module in self.model.named_modules()}
        return tuple(f"{names[id(m)]}." for m in (decoder, head) if m is not None and id(m) in names)

    def widths(self) -> dict[str, int]:
        """Config key -> FFN width it holds, the key with most channels first."""
        widths: dict[str, int] = {}
        channels: dict[str, int] = {}
        for ffns in self.ffns:
            for ffn in ffns:
                key = ffn.site.width_key
                widths[key] = max(widths.get(key, 0), ffn.width // self._times(ffn))
                channels[key] = channels.get(key, 0) + ffn.width * len(ffn.units)
        return {key: widths[key] for key in sorted(widths, key=lambda k: -channels[k])}

    def _times(self, ffn: Ffn) -> int:
        times = ffn.site.times
        if times is None:
            return 1
        return int(times) if times.isdigit() else int(getattr(self.config.get_text_config(), times) or 1)

    def _check_shape(self, stored: str, target: str) -> None:
        found, expected = self.checkpoint.tensors[stored].shape, tuple(self.parameters[target].shape)
        if found != expected:
            raise CheckpointError(
                "a stored tensor does not have the shape the config asks for",
                where=stored,
                expected=str(list(expected)),
                found=str(list(found)),
            )

    def assemble(self, assembly: Assembly, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parameters by name from the stored tensors of an assembly, in their order, as from_pretrained makes them."""
        if assembly.converter is None:
            return {assembly.targets[0]: tensors[0]}
        converter = copy.deepcopy(assembly.converter)
        first = assembly.targets[0]
        for (stored, pattern), tensor in zip(assembly.sources, tensors, strict=True):
            converter.add_tensor(first, stored, pattern, tensor)
        made = converter.convert(first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def compute_dtype(self, name: str) -> torch.dtype:
        """The dtype a parameter is computed in: the model's, but where a family insists on float32."""
        dtype = self.parameters[name].dtype
        if not dtype.is_floating_point:
            return dtype
        return next((wanted for pattern, wanted in self._dtype_plan if pattern.search(name)), dtype)

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put tensors (parameter name -> tensor on the compute device) into the model, without gradients."""
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[leaf] = tensor

    def drop(self, assemblies: list[Assembly]) -> None:
        """Return the parameters of assemblies to the meta device, which frees them."""
        names = [name for assembly in assemblies for name in assembly.targets]
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
        """Let tied weights (usually the output head) share the tensor they are tied to."""
        for target, source in self.ties.items():
            path, _, leaf = target.rpartition(".")
            parameter = self.model.get_parameter(source)
            self.model.get_submodule(path)._parameters[leaf] = parameter


def _targets(first: str, converter: Any) -> list[str]:
    """Names of all parameters a converter makes, given the first."""
    if converter is None or len(converter.target_patterns) == 1:
        return [first]
    patterns = converter.target_patterns
    return [first.replace(patterns[0], pattern) for pattern in patterns]


def check_model(checkpoint: Checkpoint) -> None:
    """Refuse, from the config alone, what can't be indexed. Raises UnsupportedModelError."""
    family_of(checkpoint.config, checkpoint.name)
    build_config(checkpoint.config, checkpoint.name)


def build_config(config: dict[str, Any], where: str) -> Any:
    """The transformers config object of a config.json. Raises UnsupportedModelError when transformers has no such."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = config["model_type"]
    try:
        config_class = CONFIG_MAPPING[family]
    except KeyError as error:
        raise UnsupportedModelError(
            "the installed transformers does not know this model type",
            where=where,
            found=family,
            next_step="upgrade transformers",
        ) from error
    if text_config(config).get("per_layer_config"):
        import surgery.loading  # noqa: F401  (teaches transformers to build it)
    with quiet_transformers():
        try:
            return config_class.from_dict(config_class._decode_special_floats(copy.deepcopy(config)))
        except CONFIG_ERRORS as error:
            raise _cannot_build(error, where) from error


def auto_class(config: Any) -> Any:
    """The Auto class that builds a model of this config: AutoModelForCausalLM, or for images and text.

    Where both know the config, the class that the checkpoint names as its own decides.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    known = [
        automatic
        for automatic in (AutoModelForCausalLM, AutoModelForImageTextToText)
        if type(config) in automatic._model_mapping
    ]
    for automatic in known:
        if automatic._model_mapping[type(config)].__name__ in (config.architectures or []):
            return automatic
    return known[0] if known else AutoModelForCausalLM


def build_model(config: Any, dtype: torch.dtype, where: str) -> Any:
    """A model whose parameters are on the meta device and whose buffers are real."""
    from accelerate import init_empty_weights

    with quiet_transformers():
        try:
            with init_empty_weights(include_buffers=False):
                model = auto_class(config).from_config(config, dtype=dtype)
        except CONFIG_ERRORS as error:
            raise _cannot_build(error, where) from error
    return model.eval().requires_grad_(False)


def _cannot_build(error: Exception, where: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "transformers can't build a causal language model from this config",
        where=where,
        found=" ".join(str(error).split())[:200] or type(error).__name__,
    )


def _find_layers(model: Any, where: str) -> tuple[str, nn.ModuleList]:
    """The ModuleList holding the decoder layers, and its path."""
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
