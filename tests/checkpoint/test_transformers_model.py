"""What transformers and tokenizers make of a checkpoint's other files: one line, or a default; never its
code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from click.testing import CliRunner, Result
from helpers.model_families import CONFIGS, config_fields
from helpers.tiny_models import CALIBRATION
from transformers import AutoConfig, AutoModelForCausalLM

from surgery.checkpoint.transformers_model import build_model
from surgery.cli.main import main

CUT = ["--multiple-of", "8", "--repair", "none", "--out", "cut", *CALIBRATION]
CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path("code-ran").write_text("yes")

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder(
    save_tiny: Callable[..., Path], tmp_path: Path, license_text: str, monkeypatch: pytest.MonkeyPatch
) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    Path("text.txt").write_text(license_text)
    return save_tiny("llama")


def surgeon(*command: str) -> Result:
    return CliRunner().invoke(main, list(command))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_code_of_a_tokenizer_runs_only_when_asked_for(folder: Path) -> None:
    (folder / "own_tokenizer.py").write_text(CODE)
    own = {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}
    edit(folder / "tokenizer_config.json", auto_map=own, tokenizer_class="OwnTokenizer")
    command = [sys.executable, "-m", "surgery", "prune", "tiny", *CUT]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120, input="", check=False)
    assert not Path("code-ran").exists()
    if refused.returncode:  # transformers may fall back to tokenizer.json
        assert refused.stderr.count("Error:") == 1 and "--trust-remote-code" in refused.stderr
    assert "[y/N]" not in refused.stdout + refused.stderr
    done = surgeon("prune", "tiny", *CUT, "--overwrite", "--trust-remote-code")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("content", ["[]", '"text"', "{", ""])
def test_a_generation_config_nobody_can_read_is_left_behind(folder: Path, content: str) -> None:
    (folder / "generation_config.json").write_text(content)
    result = surgeon("prune", "tiny", *CUT)
    assert result.exit_code == 0, result.output
    assert "generation_config.json" in result.output
    assert not Path("cut/generation_config.json").exists()
    AutoModelForCausalLM.from_pretrained("cut")


def test_a_kernel_that_is_not_installed_does_not_matter(folder: Path) -> None:
    edit(
        folder / "config.json", _attn_implementation="flash_attention_3", attn_implementation="kernels-org/x"
    )
    result = surgeon("prune", "tiny", *CUT)
    assert result.exit_code == 0, result.output
    assert json.loads(Path("cut/config.json").read_text())["_attn_implementation"] == "flash_attention_3"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", '{"model": {"type": "Nothing"}}', "tokenizer can't be loaded"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1", "tokenizer can't be loaded"),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}', "can't build"),
        ("config.json", '{"model_type": "llama", "num_hidden_layers": 1000000000}', "more layers than"),
        ("config.json", '{"model_type": ["llama"]}', "does not know this model type"),
        ("config.json", '{"model_type": "llama", "quantization_config": [1]}', "not an object"),
        ("config.json", '{"model_type": "llama", "dtype": 1}', "dtype that a model can't have"),
        ("config.json", "[" * 100_000, "not valid JSON"),
    ],
)
def test_files_that_do_not_load_are_one_line(folder: Path, file: str, content: str, says: str) -> None:
    (folder / file).write_text(content)
    for command in (["prune", "tiny", *CUT], ["index", "tiny", "--dry-run", *CALIBRATION]):
        result = surgeon(*command)
        assert isinstance(result.exception, SystemExit) and result.exit_code == 1
        assert result.stderr.startswith("Error:") and says in result.stderr
    assert not Path("cut").exists()


def test_a_sentencepiece_model_alone_is_a_tokenizer(folder: Path, save_tiny: Callable[..., Path]) -> None:
    import sentencepiece

    save_tiny("llama", vocab_size=400)

    sentencepiece.SentencePieceTrainer.train(
        input="text.txt", model_prefix="trained", model_type="bpe", vocab_size=400, minloglevel=2
    )
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / file).unlink(missing_ok=True)
    Path("trained.model").rename(folder / "tokenizer.model")
    kind = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    assert surgeon("index", "tiny", "--dry-run", *CALIBRATION).exit_code == 0


@pytest.mark.usefixtures("folder")
def test_a_terminal_that_prints_no_arrow() -> None:
    command = [sys.executable, "-m", "surgery", "prune", "tiny", *CUT]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, timeout=120, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert b"width 48 ? " in done.stdout


@pytest.mark.parametrize("variant", CONFIGS)
def test_buffers_are_those_of_an_initialised_model(variant: str) -> None:
    """Weights on the meta device are not drawn; what else initialising sets is there."""
    fields = config_fields(variant)
    built = build_model(AutoConfig.for_model(**fields), torch.float32, "here")
    with init_empty_weights(include_buffers=False):
        expected = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    assert all(parameter.is_meta for parameter in built.parameters())
    buffers = dict(built.named_buffers())
    assert buffers.keys() == dict(expected.named_buffers()).keys()
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer), name
