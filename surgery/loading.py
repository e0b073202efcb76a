"""Import this module to load checkpoints whose layers differ in width, or have no attention or no FFN.

    import surgery.loading
    model = AutoModelForCausalLM.from_pretrained(folder)

config.json says how in transformers' own `per_layer_config`, which its model classes do not use yet
(transformers 5.23). When such a config is read, this module registers a subclass of the family's decoder
layer with transformers' public patch mapping; the subclass builds each layer from its own config. No code of
the checkpoint is run. Configs without `per_layer_config` are unaffected. `save_pretrained` keeps the format.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations.heterogeneity.configuration_utils import HeterogeneousConfigMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.monkey_patching import get_patch_mapping, register_patch_mapping

ATTENTION_MODULES = ("self_attn", "attn", "attention", "self_attention")
FFN_MODULES = ("mlp", "feed_forward", "ffn")
CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")
LAYER_NUMBER = ("layer_idx", "layer_id", "layer_index", "idx")


def own_config(config: Any, layer: int) -> Any:
    """The config of layer `layer`; the model's config if all layers have the same."""
    return config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config


class NoAttention(nn.Module):
    """In place of an attention that was removed: adds nothing to the residual stream.

    Tokens are counted in the cache, as other layers' are: by keys and values of width 1 (of width 0 they
    would not be).
    """

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor, *_: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        cache = next((found for name in CACHE_ARGUMENTS if (found := kwargs.get(name)) is not None), None)
        if cache is not None:
            none = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(none, none, self.layer)
        return hidden_states * 0, None  # not new zeros: the norm before it stays part of the graph


class NoFfn(nn.Module):
    """In place of an FFN that was removed: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states * 0  # as in NoAttention


def per_layer(layer_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a decoder layer class that is built from the config of its own layer."""

    def __init__(self: Any, config: Any, layer_idx: int, *args: Any, **kwargs: Any) -> None:
        own = own_config(config, layer_idx)
        layer_class.__init__(self, own, layer_idx, *args, **kwargs)
        skip = getattr(own, "skip", None) or ()
        if "attention" in skip:
            setattr(self, _present(self, ATTENTION_MODULES), NoAttention(layer_idx))
        if "mlp" in skip:
            setattr(self, _present(self, FFN_MODULES), NoFfn())

    fields = {"__init__": __init__, "__module__": layer_class.__module__, "__doc__": layer_class.__doc__}
    return type(layer_class.__name__, (layer_class,), fields)


def _present(layer: nn.Module, names: tuple[str, ...]) -> str:
    return next(name for name in names if name in layer._modules)


def register_family(config: PreTrainedConfig) -> None:
    """Register `per_layer` subclasses of the decoder layer classes of a config's family, once."""
    module_name = type(config).__module__.replace(".configuration_", ".modeling_")
    module = importlib.import_module(module_name)
    known = get_patch_mapping()
    for name, found in vars(module).items():
        if not (isinstance(found, type) and issubclass(found, GradientCheckpointingLayer)):
            continue
        if found.__module__ != module_name or f"^{name}$" in known:
            continue
        parameters = list(inspect.signature(found).parameters)
        if parameters[:1] == ["config"] and parameters[1:2] and parameters[1] in LAYER_NUMBER:
            register_patch_mapping({f"^{name}$": per_layer(found)})


def _install() -> None:
    original = HeterogeneousConfigMixin.per_layer_config
    assert original.fset is not None

    def set_widths(self: Any, value: Any) -> None:
        original.__set__(self, value)
        if value is not None:
            self.allow_global_per_layer_attribute_access = True
            register_family(self)

    HeterogeneousConfigMixin.per_layer_config = property(original.fget, set_widths)


_install()
