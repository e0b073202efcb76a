"""Tiny random GGUF files of every architecture that surgeon reads, and what llama.cpp computes from them.

The tensors are random numbers of the right shapes, written under the names and with the keys that llama.cpp
reads; nothing of transformers or surgeon is used to make them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

HIDDEN, HEADS, KV_HEADS, HEAD, WIDTH, TOKENS, EXPERTS = 64, 4, 2, 16, 96, 300, 4
Shapes = dict[str, tuple[int, ...]]
LETTER = sorted(pre_tokenizers.ByteLevel.alphabet()).index("a")
PROMPT = [int(i) for i in torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(3))]

ATTENTION: Shapes = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HEADS * HEAD, HIDDEN),
    "attn_k": (KV_HEADS * HEAD, HIDDEN),
    "attn_v": (KV_HEADS * HEAD, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD),
}
GATED: Shapes = {
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (WIDTH, HIDDEN),
    "ffn_up": (WIDTH, HIDDEN),
    "ffn_down": (HIDDEN, WIDTH),
}
HEAD_NORMS: Shapes = {"attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,)}
SANDWICH: Shapes = {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
EXPERT: Shapes = {
    "ffn_norm": (HIDDEN,),
    "ffn_gate_inp": (EXPERTS, HIDDEN),
    "ffn_gate_exps": (EXPERTS, 32, HIDDEN),
    "ffn_up_exps": (EXPERTS, 32, HIDDEN),
    "ffn_down_exps": (EXPERTS, HIDDEN, 32),
}
SHARED: Shapes = {
    "ffn_gate_inp_shexp": (HIDDEN,),
    "ffn_gate_shexp": (48, HIDDEN),
    "ffn_up_shexp": (48, HIDDEN),
    "ffn_down_shexp": (HIDDEN, 48),
}
QKV_BIAS: Shapes = {f"attn_{n}": ATTENTION[f"attn_{n}"][:1] for n in "qkv"}
PHI3: Shapes = {
    "attn_norm": (HIDDEN,),
    "attn_qkv": ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD),
    "ffn_norm": (HIDDEN,),
    "ffn_up": (2 * WIDTH, HIDDEN),
    "ffn_down": (HIDDEN, WIDTH),
}
UNGATED: Shapes = {"ffn_norm": (HIDDEN,), "ffn_up": (WIDTH, HIDDEN), "ffn_down": (HIDDEN, WIDTH)}
RMS, LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"


class Tiny:
    """An architecture's layer: `weights` and `biases` by name, `keys` beside the usual ones."""

    def __init__(self, weights: Shapes, biases: Shapes | None = None, norm: str = RMS, **keys: Any) -> None:
        self.weights, self.biases, self.norm = weights, biases or {}, norm
        self.keys = {key.replace("__", "."): value for key, value in keys.items()}


def _all_biases(weights: Shapes) -> Shapes:
    return {name: shape[:1] for name, shape in weights.items()}


EXPERT_KEYS = {"expert_count": EXPERTS, "expert_used_count": 2}
SHARED_KEYS = {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 48}
WINDOW = {"attention__sliding_window": 32, "attention__key_length": HEAD, "attention__value_length": HEAD}
NORMS = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
TINY = {
    "llama": Tiny(ATTENTION | GATED, rope__dimension_count=HEAD),
    "mixtral": Tiny(ATTENTION | EXPERT, rope__dimension_count=HEAD, feed_forward_length=32, **EXPERT_KEYS),
    "qwen2": Tiny(ATTENTION | GATED, QKV_BIAS),
    "qwen3": Tiny(ATTENTION | HEAD_NORMS | GATED, attention__key_length=HEAD, attention__value_length=HEAD),
    "qwen2moe": Tiny(ATTENTION | EXPERT | SHARED, QKV_BIAS, **SHARED_KEYS, **EXPERT_KEYS),
    "qwen3moe": Tiny(ATTENTION | HEAD_NORMS | EXPERT, expert_feed_forward_length=32, **EXPERT_KEYS),
    "phi3": Tiny(PHI3, rope__dimension_count=HEAD, attention__sliding_window=0),
    "gemma": Tiny(ATTENTION | GATED, attention__key_length=HEAD, attention__value_length=HEAD),
    "gemma2": Tiny(
        ATTENTION | GATED | SANDWICH, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **WINDOW
    ),
    "gemma3": Tiny(ATTENTION | HEAD_NORMS | GATED | SANDWICH, **WINDOW),
    "stablelm": Tiny(
        ATTENTION | GATED, QKV_BIAS | NORMS, LAYER, rope__dimension_count=8, use_parallel_residual=False
    ),
    "starcoder2": Tiny(ATTENTION | UNGATED, _all_biases(ATTENTION | UNGATED), LAYER),
    "nemotron": Tiny(ATTENTION | UNGATED, NORMS, LAYER, rope__dimension_count=8),
}
FALCON: Shapes = {
    "attn_norm": (HIDDEN,),
    "attn_qkv": ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD),
    "ffn_up": (WIDTH, HIDDEN),
    "ffn_down": (HIDDEN, WIDTH),
}
ONE_GROUP: Shapes = {"attn_qkv": ((HEADS + 2) * HEAD, HIDDEN)}
ALL_HEADS: Shapes = {"attn_qkv": (3 * HEADS * HEAD, HIDDEN), "ffn_norm": (HIDDEN,)}
TINY |= {
    "gpt2": Tiny(
        FALCON | ALL_HEADS,
        _all_biases(FALCON | ALL_HEADS),
        LAYER,
        attention__head_count_kv=None,
        rope__freq_base=None,
    ),
    "falcon": Tiny(FALCON | ONE_GROUP, {"attn_norm": (HIDDEN,)}, LAYER, attention__head_count_kv=1),
    "falcon with two norms": Tiny(
        FALCON | {"attn_norm_2": (HIDDEN,)}, {"attn_norm": (HIDDEN,), "attn_norm_2": (HIDDEN,)}, LAYER
    ),
}
ARCHITECTURES = {"mixtral": "llama", "falcon with two norms": "falcon"}
NORM_BIAS = ("stablelm", "starcoder2", "nemotron", "gpt2", "falcon", "falcon with two norms")


def write_gguf(
    path: Path,
    family: str,
    *,
    keys: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    tied: bool = False,
    rows: int = TOKENS,
    layers: int | None = None,
    quantise: Callable[[str], str] | None = None,
    drop: tuple[str, ...] = (),
    splits: str = "default",
) -> Path:
    """Write a file of `family` (a key of TINY) with metadata `keys` (value None: none) and `extra` tensors.

    `rows` are the embedding's, of which TOKENS are tokens; `quantise` gives the type of a tensor by its name;
    `splits` names how text is split before it is tokenised.
    """
    tiny = TINY[family]
    layers = layers or (
        6 if family == "gemma3" else 4
    )  # Gemma 3 has five layers with a window to one without
    architecture = ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(path, architecture)
    values = {
        "context_length": 256,
        "embedding_length": HIDDEN,
        "block_count": layers,
        "feed_forward_length": WIDTH,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.freq_base": 10000.0,
        tiny.norm: 1e-5,
        **tiny.keys,
        **(keys or {}),
    }
    for key, value in values.items():
        _add(writer, f"{architecture}.{key}", value)
    _add_tokens(writer, splits)
    shapes: Shapes = {"token_embd.weight": (rows, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if family in NORM_BIAS:
        shapes["output_norm.bias"] = (HIDDEN,)
    if family == "gpt2":
        shapes["position_embd.weight"] = (256, HIDDEN)
    if not tied:
        shapes["output.weight"] = (rows, HIDDEN)
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in tiny.weights.items()}
        shapes |= {f"blk.{layer}.{name}.bias": shape for name, shape in tiny.biases.items()}
    for name, shape in shapes.items():
        if name not in drop:
            _add_tensor(writer, name, _values(name, shape), quantise(name) if quantise else "F32")
    for name, array in (extra or {}).items():
        _add_tensor(writer, name, array.astype(np.float32), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    random = np.random.default_rng(zlib.crc32(name.encode()))
    values = random.standard_normal(shape).astype(np.float32)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * values
    return values * (0.1 if name.endswith("bias") else 0.2)


def _add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    if kind == "F32" or array.ndim == 1:
        writer.add_tensor(name, np.ascontiguousarray(array))
    else:
        chosen = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(array, chosen), raw_dtype=chosen)


def _add_tokens(writer: gguf.GGUFWriter, splits: str) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = [f"<x{i}>" for i in range(TOKENS - len(letters) - 3)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits)
    writer.add_token_list([*letters, "<s>", "</s>", "ab", *others])
    writer.add_token_types([1] * len(letters) + [3, 3, 1] + [3] * len(others))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)


def llama_cpp_server(path: Path, context: int = 256) -> Any:
    """llama.cpp's server for a file, which computes in float32 on one thread."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's bindings are not installed")
    options = xllamacpp.CommonParams()
    options.model.path = str(path)
    options.n_ctx, options.n_parallel, options.warmup, options.verbosity = context, 1, False, -1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = (
        xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )  # it rounds to float16
    return xllamacpp.Server(options)


def llama_cpp_logprobs(
    path: Path, prompt: list[int] = PROMPT, context: int = 256, tokens: int = TOKENS
) -> torch.Tensor:
    """llama.cpp's log-probabilities [tokens] of the token after `prompt`."""
    server = llama_cpp_server(path, context)
    # the token taken must be a letter, for half a character has no answer; the bias is not in the logprobs
    request = {"prompt": prompt, "max_tokens": 1, "logprobs": tokens, "logit_bias": [[LETTER, 1000.0]]}
    answer = server.handle_completions(request)
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    result = torch.full((tokens,), float("nan"))
    for token in found:
        result[token["id"]] = token["logprob"]
    assert len(found) == tokens
    return result


def surgeon_model(path: Path) -> Any:
    """surgeon's MetaModel of the file, filled with all its tensors in float32."""
    from surgery.engine.open_model import open_model

    model = open_model(path, device="cpu", dtype="float32")
    meta = model.meta_model
    for stored in (*meta.other_parameters, *(s for layer in meta.layer_parameters for s in layer)):
        meta.fill(meta.assemble(stored, [model.checkpoint.read(name) for name in stored.stored]))
    meta.tie()
    return meta


def surgeon_logprobs(path: Path, prompt: list[int] = PROMPT) -> torch.Tensor:
    """What `llama_cpp_logprobs` gives, from surgeon's reading; also for rows that are no tokens."""
    with torch.no_grad():
        logits = surgeon_model(path).model(torch.tensor([prompt])).logits[0, -1]
    return torch.log_softmax(logits.float(), -1)
