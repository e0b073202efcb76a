"""Tiny random models of every family, a byte tokenizer, and a guard that keeps tests off the network."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
REAL_MODEL = ROOT / ".cache" / "SmolLM2-135M-Instruct"
CALIBRATION = ["--calibration", "text.txt", "--blocks", "4", "--block-size", "32"]
REAL_TEXT = ROOT / ".cache" / "wikipedia.txt"

TINY: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
WINDOW = {"sliding_window": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama-tied-bias": {"model_type": "llama", "tie_word_embeddings": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", **WINDOW},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
    "olmo2": {"model_type": "olmo2"},
    "gemma": {"model_type": "gemma"},
    "gemma2": {"model_type": "gemma2", **WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {"model_type": "gemma3_text", **WINDOW, "query_pre_attn_scalar": 8},
    "smollm3": {"model_type": "smollm3"},
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection that leaves this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_INET and address[0] != "127.0.0.1":
            raise OSError(f"tests must not use the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ messages[0].content }}"
    return fast


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model of a family of `FAMILIES`, weights large enough that its layers matter."""
    config = AutoConfig.for_model(**{**TINY, **FAMILIES[family], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.to(dtype)


@pytest.fixture
def save_tiny(tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny model with its tokenizer; returns the folder."""

    def save(family: str, shard: str | None = None, name: str = "tiny", **changes: Any) -> Path:
        folder = tmp_path / name
        tiny_model(family, **changes).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
        byte_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def license_text() -> str:
    """Eleven kilobytes of English that are in the repo anyway."""
    return (ROOT / "LICENSE").read_text()


@pytest.fixture
def surgeon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, license_text: str) -> Callable[..., Any]:
    """Run a surgeon command in the test's folder; returns click's result."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(license_text)

    from surgery.cli import main

    def run(*arguments: str, code: int = 0) -> Any:
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == code, (arguments, result.output, result.exception)
        return result

    return run


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct as `make test` fetched it."""
    if not REAL_MODEL.exists() or not REAL_TEXT.exists():
        pytest.skip("no SmolLM2 in .cache: run `python examples/assets.py .cache`, as `make test` does")
    return REAL_MODEL
