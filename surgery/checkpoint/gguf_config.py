"""The config of a GGUF file: transformers' fields from the metadata and from which tensors there are."""

from __future__ import annotations

from typing import Any

import torch

from surgery.checkpoint.gguf_families import FAMILIES, GgufFamily
from surgery.checkpoint.gguf_file import GgufFile
from surgery.checkpoint.gguf_metadata import Metadata
from surgery.checkpoint.gguf_rope import rope_parameters
from surgery.errors import CheckpointError

ROPE_TENSORS = ("rope_freqs", "rope_factors_short", "rope_factors_long")
# model types whose config states the width of a head
WITH_HEAD_DIM = ("llama", "mixtral", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "nemotron")
TOKEN_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


def read_config(file: GgufFile) -> tuple[GgufFamily, dict[str, Any]]:
    """(family, fields of its transformers config). Raises CheckpointError for what surgeon doesn't read."""
    family = _family(file)
    meta = Metadata(file)
    heads, hidden = meta.count("attention.head_count"), meta.count("embedding_length")
    groups = meta.count("attention.head_count_kv", heads)
    if heads % groups:
        meta.refuse("attention.head_count_kv", f"a divisor of {heads}, the number of heads")
    head_dim = meta.count("attention.key_length", hidden // heads or None)
    if meta.number("attention.value_length", head_dim) != head_dim:
        meta.refuse("attention.value_length", f"{head_dim}, as attention.key_length")
    context = meta.count("context_length")
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "num_hidden_layers": meta.count("block_count"),
        "hidden_size": hidden,
        "max_position_embeddings": context,
        "intermediate_size": _width(meta, file),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": _vocabulary(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    _check_sizes(meta, config, heads * head_dim)
    for key, name in TOKEN_IDS.items():
        config[name] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if head_dim != hidden // heads or family.model_type in WITH_HEAD_DIM:
        config["head_dim"] = head_dim
    for key, name in family.keys.items():
        config[name] = meta.number(key)
    if family.rope_types:
        config["rope_parameters"] = _rope(meta, file, family, head_dim, context)
    if family.configure is not None:
        family.configure(meta, config)
    _check_attention_scale(meta, head_dim)
    meta.refuse_unread()
    return family, config


def _family(file: GgufFile) -> GgufFamily:
    name = file.architecture
    if file.metadata.get("split.count", 0) not in (0, 1):
        raise CheckpointError(
            "this GGUF file is one part of several, and surgeon reads single files",
            where=file.path.name,
            found=f"split.count {file.metadata['split.count']}",
            next_step="merge the parts with llama-gguf-split --merge",
        )
    if name == "llama" and file.metadata.get("llama.expert_count"):
        name = "llama with experts"
    if name == "falcon" and "blk.0.attn_norm_2.weight" in file.tensors:
        name = "falcon with two norms"
    if name not in FAMILIES:
        raise CheckpointError(
            "surgeon does not read GGUF files of this architecture",
            where=file.path.name,
            expected=", ".join(FAMILIES),
            found=repr(name)[:60] if name else "no general.architecture",
            next_step="use the safetensors checkpoint it was converted from",
        )
    return FAMILIES[name]


def _width(meta: Metadata, file: GgufFile) -> int:
    """Width of the dense FFNs; a file of experts only may have none."""
    stacked = file.tensors.get("blk.0.ffn_down_exps.weight")
    return meta.count("feed_forward_length", stacked.shape[-1] if stacked else None)


def _check_sizes(meta: Metadata, config: dict[str, Any], attention: int) -> None:
    """Refuse sizes in the metadata that the tensors do not have, before a model of such a size is built."""
    sizes = [
        ("embedding_length", config["hidden_size"], "token_embd.weight", 1),
        ("context_length", config["max_position_embeddings"], "position_embd.weight", 0),
        ("feed_forward_length", config["intermediate_size"], "blk.0.ffn_down.weight", -1),
        ("attention.head_count", attention, "blk.0.attn_output.weight", -1),
    ]
    for key, size, name, dimension in sizes:
        tensor = meta.file.tensors.get(name)
        if tensor is None:
            continue
        if len(tensor.shape) != 2 or tensor.shape[dimension] != size:
            meta.refuse(key, f"the shape of {name}, {list(tensor.shape)}")
    layers = {name.split(".")[1] for name in meta.file.tensors if name.startswith("blk.")}
    if len(layers) != config["num_hidden_layers"]:
        meta.refuse("block_count", f"{len(layers)}, the layers that have tensors")


def _vocabulary(file: GgufFile) -> int:
    """Rows of the embedding: the vocabulary with its padding. The tokens may be fewer, not more."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(
            "the GGUF file has no token embedding", where=file.path.name, expected="token_embd.weight"
        )
    tokens = len(file.metadata.get("tokenizer.ggml.tokens", ()))
    if tokens > embedding.shape[0]:
        raise CheckpointError(
            "the GGUF file has more tokens than rows in its embedding",
            where=f"{file.path.name}: token_embd.weight",
            expected=f"at least {tokens} rows",
            found=str(list(embedding.shape)),
        )
    return embedding.shape[0]


def _rope(meta: Metadata, file: GgufFile, family: GgufFamily, head_dim: int, context: int) -> dict[str, Any]:
    factors = {
        name: file.read(file.tensors[f"{name}.weight"], torch.float32)
        for name in ROPE_TENSORS
        if f"{name}.weight" in file.tensors
    }
    rope = rope_parameters(meta, factors, head_dim, context)
    if "partial_rotary_factor" in rope and not family.partial_rotary:
        meta.refuse("rope.dimension_count", f"{head_dim}, the whole head, as {family.model_type} turns it")
    if rope["rope_type"] not in family.rope_types:
        meta.refuse("rope.scaling.type", f"what {family.model_type} computes: {', '.join(family.rope_types)}")
    return rope


def _check_attention_scale(meta: Metadata, head_dim: int) -> None:
    if "attention.scale" in meta.read:
        return
    usual = head_dim**-0.5
    if abs(meta.number("attention.scale", usual) - usual) > 1e-6 * usual:
        meta.refuse("attention.scale", f"{usual:.7g}, one over the root of the head's width")
