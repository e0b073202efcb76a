"""What others make of a pruned checkpoint: llama.cpp's converter and lm-eval; and GGUF as a source."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from helpers.masking import IDS
from helpers.tiny_models import ROOT, byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM

from surgery.checkpoint.gguf import GgufCheckpoint

CONVERTER = ROOT / ".cache" / "llama.cpp" / "convert_hf_to_gguf.py"
CALIBRATION = ["--calibration", "text.txt", "--blocks", "2", "--block-size", "32"]


@pytest.fixture
def cut_with_known_tokenizer(tmp_path: Path, surgeon: Callable[..., Any]) -> Callable[..., Path]:
    """A tiny pruned model with a SentencePiece tokenizer beside its own: the converter takes that from
    anyone.
    """

    def make(family: str) -> Path:
        folder = tmp_path / "source"
        # GGUF does not hold Gemma's attention scale: who reads it assumes the published models' 256
        scale = {"query_pre_attn_scalar": 256} if "gemma" in family else {}
        tiny_model(family, bos_token_id=1, eos_token_id=2, pad_token_id=0, **scale).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        sentencepiece.SentencePieceTrainer.train(
            input=str(ROOT / "LICENSE"),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=258,
            model_type="bpe",
            minloglevel=2,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
        )
        (folder / "tokenizer.vocab").unlink()
        surgeon(
            "prune", str(folder), "--sparsity", "0.34", "--multiple-of", "32", "--out", "cut", *CALIBRATION
        )
        return tmp_path / "cut"

    return make


def to_gguf(folder: Path, target: Path) -> None:
    """llama.cpp's own converter, as its users run it."""
    if not CONVERTER.exists():
        pytest.skip("no llama.cpp converter in .cache: `make test` fetches it")
    environment = {**os.environ, "PYTHONPATH": str(CONVERTER.parent / "gguf-py")}
    command = [sys.executable, str(CONVERTER), str(folder), "--outfile", str(target), "--outtype", "f32"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_pruned_models_become_gguf_and_come_back(
    family: str, cut_with_known_tokenizer: Callable[[str], Path]
) -> None:
    cut = cut_with_known_tokenizer(family)
    gguf = cut.parent / "cut.gguf"
    to_gguf(cut, gguf)
    stored = AutoModelForCausalLM.from_pretrained(cut).eval()
    assert stored.config.intermediate_size == 32
    back = AutoModelForCausalLM.from_pretrained(cut.parent, gguf_file="cut.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (stored(IDS).logits - back(IDS).logits).abs().max() < 1e-4
    # the same file as a source of surgeon's own
    source = GgufCheckpoint(gguf, torch.float32)
    for name, parameter in stored.state_dict().items():
        if name in source.tensors:
            assert torch.allclose(source.read(name), parameter, atol=1e-6), name
    assert "F32" in (source.stored_form or "")


def test_prune_from_gguf_says_so(
    cut_with_known_tokenizer: Callable[[str], Path], surgeon: Callable[..., Any]
) -> None:
    cut = cut_with_known_tokenizer("llama")
    to_gguf(cut, cut.parent / "whole.gguf")
    options = ["--intermediate-size", "16", "--out", "from-gguf", "--dtype", "float32"]
    surgeon("prune", "whole.gguf", *options, *CALIBRATION)
    made = cut.parent / "from-gguf"
    model = AutoModelForCausalLM.from_pretrained(made)
    assert model.config.intermediate_size == 16 and model.dtype == torch.float32
    assert "GGUF (F32), dequantised to float32" in (made / "README.md").read_text()
    assert (made / "tokenizer.json").exists()
    (cut.parent / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    refused = surgeon("prune", "broken.gguf", "--out", "x", *CALIBRATION, code=1)
    assert "can't be read" in refused.stderr
    refused = surgeon("prune", "broken.gguf", "--revision", "main", "--out", "x", *CALIBRATION, code=2)
    assert "models on the Hub" in refused.stderr


def test_tasks_are_run_and_carried_into_manifest_and_card(
    cut_with_known_tokenizer: Callable[[str], Path],
    surgeon: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = cut_with_known_tokenizer("llama")
    tasks = cut.parent / "tasks"
    tasks.mkdir()
    rows = [
        {"question": "Two plus two is", "choices": ["four", "a horse"], "answer": i % 2} for i in range(4)
    ]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "tiny.yaml").write_text(
        f"""task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tasks / "rows.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
"""
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cut.parent / "cache"))
    options = ["--tasks", "tiny", "--include-path", str(tasks), "--dtype", "float32"]
    found = json.loads(surgeon("eval", str(cut), *options, "--json").stdout)["tasks"]
    # the same question four times, two answers called right
    assert found["results"]["tiny"]["acc"] == 0.5 and found["results"]["tiny"]["samples"] == 4
    manifest = json.loads((cut / "surgeon.json").read_text())
    assert (
        manifest["measurements"]["tasks"] == found
        and "| tiny | acc | 0.500" in (cut / "README.md").read_text()
    )
    shown = surgeon("eval", str(cut), *options, "--no-record", "--limit", "2").stdout
    assert "tiny" in shown and "(2 examples)" in shown
    assert json.loads((cut / "surgeon.json").read_text()) == manifest
    refused = surgeon("eval", str(cut), "--tasks", "no_such_task", code=2)
    assert "no_such_task" in refused.stderr
    told = json.loads(surgeon("eval", str(cut), *options, "--dry-run", "--json").stdout)
    assert told["tasks"] == ["tiny"] and told["costs"]["flops"] > 0
    generating = (tasks / "tiny.yaml").read_text().replace("task: tiny", "task: talk")
    (tasks / "talk.yaml").write_text(generating.replace("multiple_choice", "generate_until"))
    refused = surgeon("eval", str(cut), "--tasks", "talk", *options[2:], code=2)
    assert "talk" in refused.stderr and "generate" in refused.stderr
