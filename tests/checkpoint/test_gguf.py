"""What surgeon takes from a GGUF file, and what it refuses by name."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers.tiny_gguf import EXPERTS, HIDDEN, TOKENS, surgeon_logprobs, write_gguf

from surgery.checkpoint.gguf import GgufCheckpoint
from surgery.checkpoint.gguf_file import GgufFile
from surgery.checkpoint.gguf_metadata import Metadata
from surgery.checkpoint.gguf_rope import llama3_factors, rope_parameters
from surgery.checkpoint.transformers_model import load_tokenizer
from surgery.errors import CheckpointError

YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}


def config(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = GgufCheckpoint(path, torch.float32).config
    return found


def test_the_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "qwen2", quantise=lambda _: "Q8_0")
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    assert {t.name: (t.tensor_type.name, tuple(reversed(t.shape.tolist()))) for t in theirs.tensors} == {
        t.name: (t.kind, t.shape) for t in ours.tensors.values()
    }
    own = {key for key in theirs.fields if not key.startswith("GGUF.")}
    assert own == set(ours.metadata)
    assert all(theirs.fields[key].contents() == ours.metadata[key] for key in own)
    for tensor in theirs.tensors:
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(ours.read(ours.tensors[tensor.name], torch.float32), expected)


def test_padded_vocabulary_counts_the_rows_of_the_embedding(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", rows=TOKENS + 20, keys={"vocab_size": TOKENS})
    assert config(path)["vocab_size"] == TOKENS + 20
    assert surgeon_logprobs(path).numel() == TOKENS + 20


def test_experts_have_the_names_that_save_pretrained_writes(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "mixtral")
    source, file = GgufCheckpoint(path, torch.float32), GgufFile(path)
    stacked = file.read(file.tensors["blk.1.ffn_up_exps.weight"], torch.float32)
    for expert in range(EXPERTS):
        found = source.read(f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight")
        assert torch.equal(found, stacked[expert])


@pytest.mark.parametrize(
    ("scale", "low", "high", "length", "theta", "dim"),
    [
        (8.0, 1.0, 4.0, 8192, 500000.0, 128),  # Llama 3.1
        (32.0, 1.0, 4.0, 8192, 500000.0, 64),  # Llama 3.2
        (16.0, 1.0, 2.5, 4096, 10000.0, 64),
    ],
)
def test_published_llama3_scaling_is_recovered(
    scale: float, low: float, high: float, length: int, theta: float, dim: int, tmp_path: Path
) -> None:
    wavelengths = 2 * math.pi * theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    factors = llama3_factors(wavelengths, scale, low, high, length).float().numpy()
    keys = {"rope.freq_base": theta, "context_length": 131072, "rope.dimension_count": dim}
    path = write_gguf(tmp_path / "m.gguf", "llama", keys=keys, extra={"rope_freqs.weight": factors})
    file = GgufFile(path)
    found = rope_parameters(Metadata(file), {"rope_freqs": torch.from_numpy(factors)}, dim, 131072)
    assert found["rope_type"] == "llama3"
    assert (found["factor"], found["low_freq_factor"]) == (scale, low)
    assert found["high_freq_factor"] == pytest.approx(high, rel=1e-3)
    assert found["original_max_position_embeddings"] == pytest.approx(length, rel=1e-3)


def test_digits_are_set_apart_where_llama_cpp_does_it(tmp_path: Path) -> None:
    source = GgufCheckpoint(write_gguf(tmp_path / "m.gguf", "llama", splits="smollm"), torch.float32)
    splitter = load_tokenizer(source).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in splitter.pre_tokenize_str("x   12 y")] == ["x", "ĠĠĠ", "1", "2", "Ġy"]


def test_attention_scale_of_gemma(tmp_path: Path) -> None:
    assert config(write_gguf(tmp_path / "a.gguf", "gemma3", tied=True))["query_pre_attn_scalar"] == 16
    path = write_gguf(tmp_path / "b.gguf", "gemma3", tied=True, keys={"attention.scale": 0.125})
    assert config(path)["query_pre_attn_scalar"] == 64


@pytest.mark.parametrize(
    ("family", "keys", "named"),
    [
        ("llama", {"attention.sliding_window": 64}, "llama.attention.sliding_window"),
        ("llama", {"attention.scale": 0.1}, "llama.attention.scale"),
        ("llama", {"final_logit_softcapping": 30.0}, "llama.final_logit_softcapping"),
        ("llama", {"logit_scale": 0.5}, "llama.logit_scale"),
        ("llama", {"rope.dimension_count": 8}, "llama.rope.dimension_count"),
        ("llama", {"attention.value_length": 8}, "llama.attention.value_length"),
        ("llama", {"feed_forward_length": [96, 96, 64, 96]}, "llama.feed_forward_length"),
        ("llama", {"attention.head_count": None}, "llama.attention.head_count"),
        ("llama", {"rope.scaling.attn_factor": 1.2}, "llama.rope.scaling.attn_factor"),
        ("llama", {"rope.scaling.type": "su"}, "llama.rope.scaling.type"),
        ("llama", {"swin_norm": True}, "llama.swin_norm"),
        ("llama", {"a_new_key": 1}, "llama.a_new_key"),
        ("qwen2", {**YARN, "rope.scaling.yarn_ext_factor": 0.5}, "qwen2.rope.scaling.yarn_ext_factor"),
        ("qwen2", {**YARN, "rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ("phi3", YARN, "phi3.rope.scaling.type"),
        ("mixtral", {"expert_gating_func": 2}, "llama.expert_gating_func"),
        ("qwen2moe", {"expert_feed_forward_length": 48}, "qwen2moe.expert_feed_forward_length"),
        ("gemma3", {"attention.sliding_window_pattern": [True, False]}, "sliding_window_pattern"),
    ],
)
def test_keys_that_are_refused(family: str, keys: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", family, keys=keys)
    with pytest.raises(CheckpointError, match=named):
        GgufCheckpoint(path, torch.float32)


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("llama", "blk.0.attn_q_norm.weight", (16,)),
        ("llama", "blk.0.attn_q.scale", (1,)),
        ("qwen2", "output.bias", (TOKENS,)),
        ("qwen3", "blk.2.attn_q.bias", (64,)),
        ("phi3", "rope_factors_long.weight", (5,)),
        ("gpt2", "rope_freqs.weight", (8,)),
        ("mixtral", "blk.0.attn_q.bias", (64,)),
        ("llama", "v.patch_embd.weight", (4, 4)),
    ],
)
def test_tensors_that_are_refused(family: str, name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", family, extra={name: np.full(shape, 2.0)})
    with pytest.raises(CheckpointError, match=name):
        GgufCheckpoint(path, torch.float32)


def test_shapes_are_checked_in_the_header(tmp_path: Path) -> None:
    name = "blk.1.ffn_up.weight"
    path = write_gguf(tmp_path / "m.gguf", "llama", drop=(name,), extra={name: np.zeros((95, HIDDEN))})
    with pytest.raises(CheckpointError, match=rf"{name}.*\[96, 64\].*\[95, 64\]"):
        GgufCheckpoint(path, torch.float32)
    name = "blk.1.ffn_up_exps.weight"
    path = write_gguf(tmp_path / "e.gguf", "mixtral", drop=(name,), extra={name: np.zeros((3, 32, HIDDEN))})
    with pytest.raises(CheckpointError, match=rf"{name}.*4 matrices"):
        GgufCheckpoint(path, torch.float32)


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", rows=TOKENS - 1)
    with pytest.raises(CheckpointError, match="more tokens than rows"):
        GgufCheckpoint(path, torch.float32)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", "llama").read_bytes()
    damaged = {
        "cut.gguf": whole[:-100],
        "header.gguf": whole[:5000],
        "magic.gguf": b"GGUX" + whole[4:],
        "version.gguf": whole[:4] + struct.pack("<I", 1) + whole[8:],
        "big.gguf": whole[:4] + struct.pack(">I", 3) + whole[8:],
        "count.gguf": whole[:16] + struct.pack("<Q", 1 << 60) + whole[24:],
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=name):
            GgufCheckpoint(tmp_path / name, torch.float32)


def test_an_architecture_without_a_table_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="rwkv7"):
        GgufCheckpoint(tmp_path / "m.gguf", torch.float32)
