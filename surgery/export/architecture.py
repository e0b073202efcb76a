"""What a checkpoint is to llama.cpp: an architecture, its keys, and a GGUF name for every tensor.

Names come from the tables that surgeon reads GGUF by (checkpoint/gguf_families.py), turned around. Layers of
their own widths or head counts go out as `deci`, which is Llama's graph with `feed_forward_length`,
`attention.head_count` and `attention.head_count_kv` as arrays. Everything is decided from config.json and the
headers, so that a model which llama.cpp can't compute is refused before a weight is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.checkpoint.gguf_families import FAMILIES
from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.transformers_model import build_config, text_config
from surgery.errors import UnsupportedModelError
from surgery.export.rope import rope_keys

# model type -> the architecture of its uniform checkpoints, which is also the reader's family
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
PER_LAYER = ("llama", "mistral", "qwen2")  # model types whose graph `deci` has
PER_LAYER_KEYS = {"intermediate_size", "num_attention_heads", "num_key_value_heads"}
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # in releases of 2023
CONVERTER = "llama.cpp's convert_hf_to_gguf.py takes uniform folders of other families"


@dataclass(frozen=True)
class GgufTensorPlan:
    """One tensor of the file: its GGUF name, the stored one, its shape, and heads to permute (0: none)."""

    name: str
    stored: str
    shape: tuple[int, ...]
    heads: int = 0

    @property
    def layer(self) -> int | None:
        """The decoder layer, None for a tensor outside of them."""
        found = re.match(r"blk\.(\d+)\.", self.name)
        return int(found[1]) if found else None

    def laid_out(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` as llama.cpp has it: the two halves of each head interleaved, where it rotates pairs."""
        if not self.heads:
            return tensor
        parts = tensor.reshape(self.heads, 2, -1, *tensor.shape[1:])
        return parts.transpose(1, 2).reshape(tensor.shape)


@dataclass(frozen=True)
class GgufModel:
    """architecture; `keys` under its name; tensors from the checkpoint, `extra` ones made from the config.

    `notes` are sentences about what the file holds otherwise than the folder. `widths` and `heads` are those
    of the layers, `groups` their key-value heads.
    """

    architecture: str
    keys: dict[str, Any]
    tensors: tuple[GgufTensorPlan, ...]
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Layer:
    """Widths of a layer: FFN channels, query heads, key-value heads; 0 heads: no attention."""

    width: int
    heads: int
    groups: int


def gguf_model(checkpoint: Checkpoint) -> GgufModel:
    """The plan of a checkpoint's GGUF file. Raises UnsupportedModelError for what llama.cpp can't compute."""
    family = str(text_config(checkpoint.config).get("model_type"))
    if family not in ARCHITECTURES or text_config(checkpoint.config) is not checkpoint.config:
        raise UnsupportedModelError(
            "surgeon does not write this model type as GGUF",
            where=checkpoint.name,
            expected=", ".join(ARCHITECTURES),
            found=str(checkpoint.config.get("model_type")),
            next_step=CONVERTER,
        )
    config = build_config(checkpoint.config, checkpoint.name)
    layers = _layers(checkpoint, config)
    uneven = len(set(layers)) > 1
    if uneven:
        _check_uneven(checkpoint, family, layers)
    _check_activation(checkpoint, config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # llama.cpp's qwen2 has heads that fill the hidden size; deci has the same graph without that limit
    narrow = family == "qwen2" and layers[0].heads * head_dim != config.hidden_size
    architecture = "deci" if uneven or narrow else ARCHITECTURES[family]
    rope, extra = rope_keys(config, head_dim)
    context, notes = _context(config)
    keys = {
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": len(layers),
        "feed_forward_length": _one_or_all([layer.width for layer in layers], uneven),
        "attention.head_count": _one_or_all([layer.heads for layer in layers], uneven),
        "attention.head_count_kv": _one_or_all([layer.groups for layer in layers], uneven),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
        **rope,
    }
    tensors, dropped = _tensors(checkpoint, config, layers, architecture, head_dim)
    return GgufModel(
        architecture,
        keys,
        tensors,
        extra,
        (*notes, *dropped),
        tuple(layer.width for layer in layers),
        tuple(layer.heads for layer in layers),
        tuple(layer.groups for layer in layers),
    )


def _one_or_all(values: list[int], uneven: bool) -> int | list[int]:
    return values if uneven else values[0]


def _layers(checkpoint: Checkpoint, config: Any) -> list[_Layer]:
    """The widths of every layer; refuses per-layer settings that llama.cpp has no key for."""
    stated = text_config(checkpoint.config).get("per_layer_config") or {}
    stated = {int(number): own for number, own in stated.items()}  # stored as "7" or "07"
    layers = []
    for number in range(config.num_hidden_layers):
        own = {"skip": [], **stated.get(number, {})}
        skip = set(own.pop("skip"))
        other = sorted({*own} - PER_LAYER_KEYS) + sorted(skip - {"attention", "mlp"})
        if other:
            raise UnsupportedModelError(
                "llama.cpp has no key for this setting of a single layer",
                where=f"{checkpoint.name}, layer {number}",
                expected=", ".join(sorted(PER_LAYER_KEYS)),
                found=", ".join(other),
                next_step="run the folder in transformers",
            )
        heads = own.get("num_attention_heads", config.num_attention_heads)
        groups = own.get("num_key_value_heads", config.num_key_value_heads)
        width = own.get("intermediate_size", config.intermediate_size)
        if "attention" in skip or not heads:
            heads, groups = 0, 0
        layers.append(_Layer(0 if "mlp" in skip else width, heads, groups))
    return layers


def _check_uneven(checkpoint: Checkpoint, family: str, layers: list[_Layer]) -> None:
    """Refuse layers that `deci` does not compute, or computes wrongly without a word."""
    if family not in PER_LAYER:
        raise UnsupportedModelError(
            "llama.cpp has no architecture for layers of their own widths in this family",
            where=checkpoint.name,
            expected=", ".join(PER_LAYER),
            found=family,
            next_step="prune with --allocation uniform, or with --pad: one width goes out as GGUF",
        )
    for number, layer in enumerate(layers):
        if layer.width == 0:
            # deci's graph leaves the layer before the attention's output is added, whatever it computed
            kind = "neither attention nor FFN" if layer.heads == 0 else "attention and no FFN"
            raise UnsupportedModelError(
                "llama.cpp computes a layer without FFN wrongly",
                where=f"{checkpoint.name}, layer {number}",
                expected="at least one FFN channel in every layer",
                found=kind,
                next_step="leave a minimal FFN in the layer, or drop the whole layer",
            )


def _check_activation(checkpoint: Checkpoint, config: Any) -> None:
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModelError(
            "llama.cpp computes this family with another activation",
            where=f"{checkpoint.name}, config.json: hidden_act",
            expected="silu",
            found=str(config.hidden_act),
            next_step="run the folder in transformers",
        )


def _context(config: Any) -> tuple[int, list[str]]:
    """(context length in tokens, notes): a sliding window bounds it, for these graphs have no window."""
    context, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    if not window or window >= context:
        return context, []
    note = (
        f"context length {window:,} tokens in place of {context:,}: the model's attention has a window of "
        f"{window:,} tokens, which llama.cpp does not compute for it; texts up to that length come out alike"
    )
    return int(window), [note]


def _expected(config: Any, layers: list[_Layer], head_dim: int) -> dict[str, tuple[int, ...]]:
    """GGUF name without ending -> shape of its weight, for every matrix and norm of the model."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (config.vocab_size, hidden),
        "output_norm": (hidden,),
        "output": (config.vocab_size, hidden),
    }
    for number, layer in enumerate(layers):
        queries, keys = layer.heads * head_dim, layer.groups * head_dim
        attention = {
            "attn_norm": (hidden,),
            "attn_q": (queries, hidden),
            "attn_k": (keys, hidden),
            "attn_v": (keys, hidden),
            "attn_output": (hidden, queries),
            "attn_q_norm": (head_dim,),
            "attn_k_norm": (head_dim,),
        }
        ffn = {
            "ffn_norm": (hidden,),
            "ffn_gate": (layer.width, hidden),
            "ffn_up": (layer.width, hidden),
            "ffn_down": (hidden, layer.width),
        }
        parts = {**(attention if layer.heads else {}), **ffn}
        shapes |= {f"blk.{number}.{part}": shape for part, shape in parts.items()}
    return shapes


def _tensors(
    checkpoint: Checkpoint, config: Any, layers: list[_Layer], architecture: str, head_dim: int
) -> tuple[tuple[GgufTensorPlan, ...], list[str]]:
    """(the file's tensors in the order of the layers, notes on what is left out)."""
    family = FAMILIES["llama" if architecture == "deci" else architecture]
    names = {template: gguf for gguf, template in family.names.items()}
    interleaved = architecture in ("llama", "deci")
    shapes = _expected(config, layers, head_dim)
    tied = bool(config.tie_word_embeddings)
    found: dict[str, GgufTensorPlan] = {}
    dropped = []
    for stored, entry in checkpoint.tensors.items():
        base, _, ending = stored.rpartition(".")
        layer = re.match(r"model\.layers\.(\d+)\.", base)
        template = re.sub(r"^model\.layers\.\d+\.", "model.layers.{}.", base)
        part = names.get(template, "").replace("{}", layer[1] if layer else "")
        unused = layer and part.endswith(".attn_norm") and not layers[int(layer[1])].heads
        if unused or IGNORED.fullmatch(stored) or (tied and part == "output"):
            dropped.append(stored)
            continue
        shape = shapes.get(part) if ending == "weight" else shapes.get(part, ())[:1]
        if not part or ending not in ("weight", "bias") or not shape or tuple(entry.shape) != shape:
            raise _no_place(checkpoint, stored, entry.shape, shape)
        kind = part.rpartition(".")[2]
        heads = 0
        if interleaved and layer and kind in ("attn_q", "attn_k"):
            own = layers[int(layer[1])]
            heads = own.heads if kind == "attn_q" else own.groups
        found[f"{part}.{ending}"] = GgufTensorPlan(f"{part}.{ending}", stored, shape, heads)
    required = {f"{part}.weight" for part in shapes if f"blk.{{}}.{part.rpartition('.')[2]}" in family.names}
    required |= {"token_embd.weight", "output_norm.weight", *([] if tied else ["output.weight"])}
    if missing := sorted(required - {*found}):
        raise UnsupportedModelError(
            "a tensor that llama.cpp needs is not in the checkpoint",
            where=checkpoint.name,
            expected=missing[0],
        )
    notes = [f"left out: {len(dropped)} tensors such as {dropped[0]}"] if dropped else []
    ordered = sorted(found.values(), key=lambda t: (-1 if t.layer is None else t.layer, t.name))
    return tuple(ordered), notes


def _no_place(
    checkpoint: Checkpoint, stored: str, shape: Any, wanted: tuple[int, ...] | None
) -> UnsupportedModelError:
    return UnsupportedModelError(
        "a stored tensor has no place in llama.cpp's architecture",
        where=f"{checkpoint.name}: {stored}",
        expected=f"shape {list(wanted)}" if wanted else "",
        found=f"shape {list(shape)}",
        next_step=CONVERTER,
    )
