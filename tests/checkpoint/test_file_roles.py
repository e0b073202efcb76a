"""Which files of a folder count as its weights, which are carried, and which stay behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers.tiny_models import CALIBRATION, tiny_model
from safetensors.torch import load_file, save_file

from surgery.checkpoint.file_roles import left_behind
from surgery.checkpoint.push import pushed_files
from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.weight_map import write_weight_map
from surgery.cli.main import main
from surgery.engine.open_model import open_checkpoint
from surgery.errors import CheckpointError

MIB = 1 << 20


def test_a_single_file_counts_before_a_stale_index(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("llama", shard="60KB")
    assert len(Checkpoint.open(folder).weight_files) > 1
    tiny_model("llama", seed=2).save_pretrained(folder.parent / "new")
    shutil.copy(folder.parent / "new" / "model.safetensors", folder)
    checkpoint = Checkpoint.open(folder)
    new = load_file(folder.parent / "new" / "model.safetensors")
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in new.items())
    assert "model.safetensors.index.json" in checkpoint.left_behind
    for shard in folder.glob("model-0*.safetensors"):
        shard.unlink()
    assert Checkpoint.open(folder).weight_files == ["model.safetensors"]


def test_what_looks_like_weights_stays_behind_with_its_configs() -> None:
    kept = [
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "tokenizer.model.v3"),
        *("merges.txt", "LICENSE", "chat_template.jinja", "additional_chat_templates/rag.jinja"),
        *("modeling_own.py", "1_Pooling/config.json", "figures/loss.png", "lp_concentration.png"),
    ]
    behind = [
        *("rust_model.ot", "64.tflite", "onnx/model.onnx_data", "onnx/config.json", "tf_model.h5"),
        *("original/params.json", "original/tokenizer.model", "original/consolidated.00.pth"),
        *("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "trainer_state.json"),
        *("checkpoint-500/model.safetensors", "checkpoint-500/config.json", "model.fp16.safetensors"),
        *("openvino_model.bin", "openvino_model.xml", "openvino_config.json", "NOBODY_KNOWS"),
        *("model.safetensors.index.json", "pytorch_model.bin.index.json", "weights.unheard_of"),
    ]
    sizes = dict.fromkeys([*kept, *behind], 100) | {"NOBODY_KNOWS": 2 * MIB, "tokenizer.json": 30 * MIB}
    assert left_behind(sizes, ["model.safetensors"]) == sorted(behind)


def test_a_cut_carries_and_publishes_no_other_weights(
    save_tiny: Callable[..., Path], tmp_path: Path, license_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama")
    for name in ("rust_model.ot", "original/params.json", "original/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * 1000)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(license_text)
    command = ["prune", "tiny", "--multiple-of", "8", "--repair", "none", *CALIBRATION]
    plan = CliRunner().invoke(main, [*command, "--dry-run"])
    assert "Left behind" in plan.output and "rust_model.ot" in plan.output
    assert CliRunner().invoke(main, [*command, "--out", "cut"]).exit_code == 0
    assert not any((tmp_path / "cut" / name).exists() for name in ("rust_model.ot", "original"))
    manifest = json.loads(Path("cut/surgeon.json").read_text())
    assert manifest["left_behind"] == ["original/model.safetensors", "original/params.json", "rust_model.ot"]
    assert "rust_model.ot" in Path("cut/README.md").read_text()
    Path("cut/exported.gguf").write_bytes(b"x")
    pushed = pushed_files(Path("cut"))
    assert "exported.gguf" not in pushed and {"model.safetensors", "surgeon.json", "cut.png"} <= set(pushed)


def test_weights_named_in_the_config_are_written_under_the_usual_name(
    save_tiny: Callable[..., Path], tmp_path: Path, license_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama")
    (folder / "model.safetensors").rename(folder / "model-text.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "transformers_weights": "model-text.safetensors"})
    )
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(license_text)
    command = ["prune", "tiny", "--multiple-of", "8", "--repair", "none", "--out", "cut", *CALIBRATION]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "transformers_weights" not in json.loads(Path("cut/config.json").read_text())


def test_shards_without_an_index_are_named_and_mended(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("llama", shard="60KB")
    expected = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="shards have no index") as refused:
        Checkpoint.open(folder)
    assert "shard-index" in refused.value.next_step
    write_weight_map(folder)
    assert json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"] == expected
    assert Checkpoint.open(folder).tensors
    with pytest.raises(CheckpointError, match="need no index"):
        write_weight_map(folder)


def test_a_tensor_in_two_shards_is_refused(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("llama", shard="60KB")
    first, second = sorted(folder.glob("model-0*.safetensors"))[:2]
    twice = next(iter(load_file(first).items()))
    save_file(load_file(second) | dict([twice]), second, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="two shards"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("files", "what", "step"),
    [
        ({"adapter_config.json": '{"base_model_name_or_path": "org/base"}'}, "adapter", "org/base"),
        ({"config.json": '{"quantization": {"group_size": 64, "bits": 4}}'}, "quantised", "unquantised"),
        ({"config.json": "{}", "model.fp16.safetensors": ""}, "variant", 'variant="fp16"'),
        ({"config.json": "version https://git-lfs.github.com/spec/v1\n"}, "Git LFS pointer", "git lfs pull"),
        (
            {"config.json": "{}", "model.safetensors": "version https://git-lfs.github.com/spec/v1\noid x\n"},
            "Git LFS pointer",
            "git lfs pull",
        ),
        ({"sub/config.json": "{}"}, "config.json is missing", "save_pretrained"),
    ],
)
def test_folders_that_are_something_else_are_named(
    tmp_path: Path, files: dict[str, str], what: str, step: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=what) as refused:
        Checkpoint.open(tmp_path)
    assert step in refused.value.next_step


def test_a_weight_file_is_not_its_folder(save_tiny: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="a model is a folder") as refused:
        open_checkpoint(save_tiny("llama") / "model.safetensors")
    assert "tiny" in refused.value.next_step


def test_a_snapshot_of_the_cache_has_its_name_and_revision(save_tiny: Callable[..., Path]) -> None:
    snapshot = save_tiny("llama").parent / "hub" / "models--org--tiny" / "snapshots" / ("0123456789" * 4)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(save_tiny("llama"), snapshot)
    checkpoint = Checkpoint.open(snapshot)
    assert (checkpoint.name, checkpoint.revision) == ("org/tiny", "0123456789" * 4)


@pytest.mark.parametrize(
    ("address", "name", "revision"),
    [
        ("https://huggingface.co/org/name", "org/name", None),
        ("https://huggingface.co/org/name/tree/v1.0", "org/name", "v1.0"),
        ("hf://org/name@main", "org/name", "main"),
        ("org/name", "org/name", None),
    ],
)
def test_addresses_of_hub_models_are_understood(
    monkeypatch: pytest.MonkeyPatch, address: str, name: str, revision: str | None
) -> None:
    asked: list[tuple[str, str | None]] = []

    def open_hub(repo: str, commit: str | None, **_: Any) -> None:
        asked.append((repo, commit))

    monkeypatch.setattr("surgery.engine.open_model.open_hub", open_hub)
    open_checkpoint(address)
    assert asked == [(name, revision)]


def test_a_path_may_begin_with_a_tilde(
    save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_checkpoint("~/tiny").name == "tiny"
