"""What is written: safetensors bytes, the index schema, the wheel, and the command line's manners."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from helpers.tiny_models import CALIBRATION, FAMILIES, ROOT, byte_tokenizer, opened, token_blocks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.shard_writer import ShardWriter, TensorSpec
from surgery.evaluate.perplexity import perplexity
from surgery.index.channel_index import STATISTICS


def test_shards_are_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(7).to(torch.bfloat16),
        "ü": torch.arange(4, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.0),
        "flag": torch.tensor([True]),
    }
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with ShardWriter(tmp_path, specs) as writer:
        for name in sorted(tensors):
            writer.write(name, tensors[name])
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_many_shards_have_a_weight_map(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with ShardWriter(tmp_path, specs, max_bytes=900) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.weight_files) == 3
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_index_files_keep_the_contract(
    family: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny(family)
    printed = json.loads(surgeon("index", str(source), "--out", "index", "--json", *CALIBRATION).stdout)
    folder = source.parent / "index"
    schema = json.loads(resources.files("surgery").joinpath("data/index.schema.json").read_text())
    fields = json.loads((folder / "index.json").read_text())
    jsonschema.validate(fields, schema)
    assert fields == printed == json.loads(surgeon("show", "index", "--json").stdout)
    tensors = load_file(folder / "index.safetensors")
    assert tensors["calibration.input_ids"].shape == (4, 32)
    assert tensors["calibration.input_ids"].dtype == torch.int32
    for layer in range(6):
        for name in STATISTICS:
            assert tensors[f"layers.{layer}.{name}"].shape == (48,)
            assert tensors[f"layers.{layer}.{name}"].dtype == torch.float32
    shown = surgeon("show", "index").stdout
    assert "Super weights: none found" in shown and str(source.parent) not in json.dumps(fields)


def test_wheel_alone_runs_help_and_renders_a_card(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("ffn_surgeon-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "surgery/card/templates/model_card.md",
        "surgery/data/index.schema.json",
        "surgery/py.typed",
    } <= set(names)
    kept = {f"surgery/data/report/{path.name}" for path in (ROOT / "surgery" / "data" / "report").iterdir()}
    assert kept | {"surgery/report/page.py"} <= set(names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    manifest = {
        "source": {"name": "me/model", "revision": None, "parameters": 10, "bytes": 20},
        "result": {"parameters": 8, "bytes": 16},
        "plan": {
            "method": "scar-prot",
            "sparsity": 0.5,
            "width_before": 4,
            "width_after": 2,
            "layers": [],
            "divides": {},
        },
        "super_weights": [],
        "measurements": {},
        "calibration": {"blocks": 1, "block_size": 2, "name": "t", "sha256": "0" * 64, "seed": 1},
        "versions": {"surgeon": "0", "transformers": "0", "torch": "0"},
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "surgeon.json").write_text(json.dumps(manifest))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": True}
    where = subprocess.run([sys.executable, "-c", "import surgery; print(surgery.__file__)"], **run).stdout
    assert str(tmp_path) in where
    assert "index" in subprocess.run([sys.executable, "-m", "surgery", "--help"], **run).stdout
    card = subprocess.run([sys.executable, "-m", "surgery", "card", "model", "--stdout"], **run).stdout
    assert "base_model: me/model" in card and "FFNs pruned by 50%" in card


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from surgery.cli.main import main\n"
        "main(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_equals_the_whole_model(
    family: str, save_tiny: Callable[..., Path], license_text: str
) -> None:
    folder = save_tiny(family)
    blocks = token_blocks(byte_tokenizer(), license_text[:1000], "t", block_size=64)
    found = perplexity(opened(folder), blocks)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        losses = [float(model(row[None].long(), labels=row[None].long()).loss) for row in blocks.ids]
    mean = sum(losses) / len(losses)  # as GPTQ: the mean of the blocks' means
    assert found.perplexity == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-5)
    assert found.tokens == 15 * 63 and found.utf8_bytes == 15 * 63  # a byte a token
    assert found.bits_per_byte == pytest.approx(mean / 0.6931471805599453, rel=1e-5)
