"""Target: how large or slow a result may be: parameters, bytes on disk or in memory with a cache, time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from surgery.budget.kv_cache import cached_numbers, unpredictable
from surgery.byte_units import format_bytes
from surgery.checkpoint.shard_writer import TensorSpec
from surgery.checkpoint.transformers_model import build_config

PARAMS, SIZE, MEMORY, SPEED = "params", "size", "memory", "speed"
OTHER_CACHES = ("kv_lora_rank", "multi_query")  # config keys of caches that differ between runtimes


@dataclass(frozen=True)
class SpeedModel:
    """Seconds a token on one machine, t = `ends` + `layer` L + `number` P for L layers with P parameters.

    `of` is what is timed, "decode" or "prefill"; `ends_parameters` are those outside the layers. Measured by
    `surgery.bench.layer_speed`.
    """

    of: str
    ends: float
    layer: float
    number: float
    ends_parameters: int

    def seconds(self, layers: int, parameters: int) -> float:
        """Seconds a token of a model with so many layers and, in all, parameters."""
        return self.ends + self.layer * layers + self.number * (parameters - self.ends_parameters)


@dataclass(frozen=True)
class Target:
    """At most `amount` of `unit`: parameters, bytes of the tensors as written, bytes of these and of the KV
    cache of one sequence of `context` tokens in the dtype that the weights are stored in, or nanoseconds a
    token by `speed`. With `packed` bytes are those after packing as INT4.
    """

    unit: str
    amount: int
    context: int = 0
    packed: bool = False
    speed: SpeedModel | None = None

    @property
    def option(self) -> str:
        """The option that states the target, for errors."""
        return f"--target-{self.unit}"

    def text(self, amount: int) -> str:
        """An amount in the target's unit."""
        if self.speed is not None:
            return f"{1e9 / amount:,.2f} tokens a second ({self.speed.of})"
        return f"{amount / 1e6:,.1f} M parameters" if self.unit == PARAMS else format_bytes(amount)

    def measure(self, specs: dict[str, TensorSpec], config: dict[str, Any], where: str) -> int:
        """What a result of these tensors and this config.json has of the unit.

        Raises UnsupportedModelError for a memory target and a model whose cache is not keys and values.
        """
        parameters = sum(spec.numel for spec in specs.values())
        if self.unit == PARAMS:
            return parameters
        if self.speed is not None:
            layers = build_config(config, where).get_text_config().num_hidden_layers
            return round(1e9 * self.speed.seconds(layers, parameters))
        size = sum(spec.nbytes for spec in specs.values())
        if self.unit == SIZE:
            return size
        itemsize = max(spec.dtype.itemsize for spec in specs.values() if spec.dtype.is_floating_point)
        return size + cached_values(config, self.context, where) * itemsize


def cached_values(config: dict[str, Any], context: int, where: str) -> int:
    """Keys and values that a model of this config.json caches for `context` tokens of one sequence.

    Raises UnsupportedModelError for a model with recurrent states, and for one with latent attention or
    Falcon's heads, which runtimes cache in different forms.
    """
    text = build_config(config, where).get_text_config()
    other = next((key for key in OTHER_CACHES if getattr(text, key, None) is not None), None)
    if other is not None:
        raise unpredictable(where, other)
    return cached_numbers(config, context, where)
