"""Tiny random models of every family, a byte tokenizer, and a guard that keeps tests off the network."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
from click.testing import CliRunner
from model_families import config_fields
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.monkey_patching import clear_patch_mapping

ROOT = Path(__file__).parent.parent
REAL_MODEL = ROOT / ".cache" / "SmolLM2-135M-Instruct"
CALIBRATION = ["--calibration", "text.txt", "--blocks", "4", "--block-size", "32"]
REAL_TEXT = ROOT / ".cache" / "wikipedia.txt"

FAMILIES = [
    "llama",
    "llama-tied-bias",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "mixtral",
    "deepseek_v3",
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection that leaves this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_INET and address[0] != "127.0.0.1":
            raise OSError(f"tests must not use the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def forget_patches() -> Iterator[None]:
    """Leave no class patch behind: looking for classes to patch slows every later load in the process."""
    yield
    clear_patch_mapping()


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
    """A tiny random model of a variant of `model_families`, weights large enough that its layers matter."""
    config = AutoConfig.for_model(**{**config_fields(family), **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0  # as some families set it on loading
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
