"""The types a GGUF file is written in: which tensor gets which, as llama.cpp's own quantiser chooses them.

The rules are those of `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp for the graphs that
surgeon writes, without an importance matrix: a base type, more bits for some layers' attn_v and ffn_down,
Q6_K for the head, and another type where a row is no multiple of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

from surgery.errors import UsageError
from surgery.export.architecture import GgufModel, GgufTensorPlan

Rule = Callable[[int, int, int], str | None]  # (place, places, query heads a key-value head) -> type or None
PLAIN = ("F32", "F16", "BF16")
# a row that is no multiple of the block falls back to a type of 32 weights a block
FALLBACK = {
    **{"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"},
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"), "F16"),
}


def _more_bits(place: int, places: int) -> bool:
    """The first and last eighth of the layers, and every third between them."""
    return place < places // 8 or place >= 7 * places // 8 or (place - places // 8) % 3 == 2


def _q6_for_some(place: int, places: int, _: int) -> str | None:
    return "Q6_K" if _more_bits(place, places) else None


def _q5_for_first_eighth(place: int, places: int, _: int) -> str | None:
    return "Q5_K" if place < places // 8 else None


def _q5_for_shared_values(_: int, __: int, shared: int) -> str | None:
    return "Q5_K" if shared >= 4 else None


def _always(kind: str) -> Rule:
    return lambda *_: kind


@dataclass(frozen=True)
class FileType:
    """A type as `--type` names it.

    `number` is llama.cpp's LLAMA_FTYPE, `base` the type of most matrices, `rules` those of some parts of a
    layer, by the part's GGUF name.
    """

    name: str
    number: int
    base: str
    rules: Mapping[str, Rule] = field(default_factory=dict)


_SOME_Q6 = {"attn_v": _q6_for_some, "ffn_down": _q6_for_some}
_IQ4 = {"attn_v": _q5_for_shared_values, "ffn_down": _q5_for_first_eighth}
FILE_TYPES: dict[str, FileType] = {
    found.name: found
    for found in (
        FileType("f32", 0, "F32"),
        FileType("f16", 1, "F16"),
        FileType("bf16", 32, "BF16"),
        FileType("q8_0", 7, "Q8_0"),
        FileType("q6_k", 18, "Q6_K"),
        FileType("q5_k_m", 17, "Q5_K", _SOME_Q6),
        FileType("q5_k_s", 16, "Q5_K"),
        FileType("q5_1", 9, "Q5_1"),
        FileType("q5_0", 8, "Q5_0"),
        FileType("q4_k_m", 15, "Q4_K", _SOME_Q6),
        FileType(
            "q4_k_s",
            14,
            "Q4_K",
            {"attn_v": lambda i, _, __: "Q5_K" if i < 4 else None, "ffn_down": _q5_for_first_eighth},
        ),
        FileType("q4_1", 3, "Q4_1"),
        FileType("q4_0", 2, "Q4_0"),
        FileType("iq4_xs", 30, "IQ4_XS", _IQ4),
        FileType("iq4_nl", 25, "IQ4_NL", _IQ4),
        FileType(
            "q3_k_l",
            13,
            "Q3_K",
            {part: _always("Q5_K") for part in ("attn_v", "ffn_down", "attn_output")},
        ),
        FileType(
            "q3_k_m",
            12,
            "Q3_K",
            {
                "attn_v": lambda i, _, __: "Q5_K" if i < 2 else "Q4_K",
                "ffn_down": lambda i, n, _: "Q5_K" if i < n // 16 else "Q4_K",
                "attn_output": _always("Q4_K"),
            },
        ),
        FileType("q3_k_s", 11, "Q3_K"),
        FileType(
            "q2_k",
            10,
            "Q2_K",
            {
                "attn_v": lambda _, __, shared: "Q4_K" if shared >= 4 else "Q3_K",
                "ffn_down": _always("Q3_K"),
                "attn_output": _always("Q3_K"),
            },
        ),
    )
}


def file_type(name: str) -> FileType:
    """The FileType of a name, in any case. Raises UsageError for one that surgeon does not write."""
    try:
        return FILE_TYPES[name.lower()]
    except KeyError as error:
        raise UsageError(
            "surgeon does not write this GGUF type",
            where="--type",
            expected=", ".join(FILE_TYPES),
            found=name,
            next_step="types of less than 3 bits a weight need an importance matrix: export f16 and run "
            "llama-quantize --imatrix on the file",
        ) from error


def tensor_types(
    model: GgufModel,
    chosen: FileType,
    *,
    kept: dict[str, str] | None = None,
    writable: set[str] | None = None,
) -> dict[str, str]:
    """GGUF name -> type of every tensor of a file of type `chosen`.

    Vectors are F32. `kept` names tensors with a type of their own. A type that is not `writable` (where that
    is given) is replaced by the next one with blocks of 32 weights.
    """
    head = "output.weight" if any(t.name == "output.weight" for t in model.tensors) else "token_embd.weight"
    shared = model.heads[0] // model.groups[0] if model.groups[0] else 1
    places: dict[str, list[str]] = {}
    for tensor in model.tensors:
        places.setdefault(tensor.name.split(".")[-2], []).append(tensor.name)
    types = dict.fromkeys(model.extra, "F32")
    for tensor in model.tensors:
        if len(tensor.shape) < 2:
            types[tensor.name] = "F32"
            continue
        part = tensor.name.split(".")[-2]
        kind = chosen.base
        if kind not in PLAIN:
            if tensor.name == head:
                kind = _head_type(kind, tensor.shape[-1])
            elif part in chosen.rules:
                same = places[part]
                kind = chosen.rules[part](same.index(tensor.name), len(same), shared) or kind
            kind = _fitting(kind, tensor, writable)
        types[tensor.name] = (kept or {}).get(tensor.name, kind)
    return types


def _head_type(base: str, columns: int) -> str:
    return "Q8_0" if base == "Q8_0" or columns % block_weights(base) else "Q6_K"


def _fitting(kind: str, tensor: GgufTensorPlan, writable: set[str] | None) -> str:
    """`kind`, or what it falls back to where rows or the quantiser do not allow it."""
    while tensor.shape[-1] % block_weights(kind) or (writable is not None and kind not in writable):
        if kind not in FALLBACK:
            break
        kind = FALLBACK[kind]
    return kind


def block_weights(kind: str) -> int:
    """Weights in a block of a type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return int(GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0])


def tensor_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of a type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    weights, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(prod(shape) // weights * nbytes)
