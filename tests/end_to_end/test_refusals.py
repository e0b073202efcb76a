"""Bad input: one clear line, the right exit code, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION
from safetensors.torch import load_file, save_file

from surgery.checkpoint.file_roles import INDEX_FILE
from surgery.checkpoint.reader import Checkpoint
from surgery.errors import CheckpointError

Damage = Callable[[Path], None]


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def truncate(folder: Path) -> None:
    file = shards(folder)[1]
    file.write_bytes(file.read_bytes()[:-10])


def point_outside(folder: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        fields["weight_map"][next(iter(fields["weight_map"]))] = "../elsewhere.safetensors"

    edit_json(folder / INDEX_FILE, change)


def pickle_only(folder: Path) -> None:
    for file in [*shards(folder), folder / INDEX_FILE]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def set_config(**values: Any) -> Damage:
    return lambda folder: edit_json(folder / "config.json", lambda fields: fields.update(values))


def swap_entry(folder: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        names = sorted(fields["weight_map"])
        fields["weight_map"][names[0]] = fields["weight_map"][names[-1]]

    edit_json(folder / INDEX_FILE, change)


def garbage_header(folder: Path) -> None:
    data = bytearray(shards(folder)[0].read_bytes())
    data[8:40] = b"\xff" * 32
    shards(folder)[0].write_bytes(data)


def store_fp8(folder: Path) -> None:
    tensors = load_file(shards(folder)[0])
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}, shards(folder)[0])


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing shard": (lambda folder: shards(folder)[0].unlink(), "missing"),
    "truncated shard": (truncate, "wrong length"),
    "empty shard": (lambda folder: shards(folder)[0].write_bytes(b""), "not a safetensors file"),
    "garbage header": (garbage_header, "damaged"),
    "path outside": (point_outside, "outside"),
    "wrong file in weight_map": (swap_entry, "weight map"),
    "pickle only": (pickle_only, "pickled"),
    "encoder-decoder": (set_config(is_encoder_decoder=True, model_type="t5"), "encoder-decoder"),
    "unknown family": (set_config(model_type="mamba"), "mamba"),
    "no width": (set_config(intermediate_size=None), "intermediate_size"),
    "GPTQ": (set_config(quantization_config={"quant_method": "gptq"}), "GPTQ"),
    "AWQ": (set_config(quantization_config={"quant_method": "awq"}), "AWQ"),
    "bitsandbytes": (set_config(quantization_config={"quant_method": "bitsandbytes"}), "bitsandbytes"),
    "FP8 in name only": (set_config(quantization_config={"quant_method": "fp8"}), "no stored tensor is"),
    "FP8 without scales": (store_fp8, "stored without its scales"),
    "shared keys and values": (set_config(model_type="gemma3n_text", num_kv_shared_layers=2), "shares keys"),
    "shared keys and values, nested": (
        set_config(model_type="gemma4", text_config={"num_kv_shared_layers": 2}),
        "shares keys",
    ),
    "recurrent": (set_config(model_type="rwkv"), "without an FFN"),
    "shared blocks": (set_config(model_type="zamba2"), "share"),
    "encoder": (set_config(model_type="bert"), "encoder"),
    "norm over channels": (set_config(model_type="bitnet"), "norm over its FFN channels"),
    "made up": (set_config(model_type="no_such_model"), "does not know this model type"),
    "shape mismatch": (set_config(intermediate_size=64), "shape"),
    "config is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused(
    damage: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama", shard="20KB")
    change, message = DAMAGES[damage]
    change(source)
    for command in ("index", "prune"):
        more = ["--multiple-of", "8"] if command == "prune" else []
        result = surgeon(command, str(source), "--out", "out", *more, *CALIBRATION, code=1)
        first = result.stderr.strip().splitlines()[-2:]
        assert any(line.startswith("Error: ") and message in line for line in first), result.stderr
        assert result.stdout == ""
    assert sorted(p.name for p in source.parent.iterdir()) == ["text.txt", "tiny"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--sparsity", "1.0"], 1, "0 <= sparsity < 1"),
        (["--sparsity", "-0.5"], 1, "0 <= sparsity < 1"),
        (["--sparsity", "0.99", "--multiple-of", "48"], 1, "zero"),
        (["--intermediate-size", "0"], 1, "out of range"),
        (["--intermediate-size", "500"], 1, "out of range"),
        (["--intermediate-size", "8", "--sparsity", "0.5"], 2, "not both"),
        (["--blocks", "100000"], 1, "too short"),
        (["--blocks", "0"], 1, "at least one block"),
        (["--block-size", "1"], 1, "two tokens"),
        (["--calibration", "nowhere.jsonl"], 1, "no such text"),
        (["--device", "cuda:99"], 2, "not on this machine"),
        (["--memory", "lots"], 2, "amount of memory"),
        (["--dtype", "int4"], 2, "unknown dtype"),
        (["--method", "magic"], 2, "magic"),
        (["--out", "tiny"], 1, "is the source"),
        (["--out", "tiny/inside"], 1, "inside the source"),
        (["--out", "taken"], 1, "exists"),
    ],
)
def test_bad_options(
    arguments: list[str], code: int, message: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama")
    (source.parent / "taken").mkdir()
    before = {p: p.stat().st_mtime_ns for p in source.parent.rglob("*")}
    defaults = ["--out", "out", "--multiple-of", "8", *CALIBRATION]
    result = surgeon("prune", str(source), *defaults, *arguments, code=code)
    assert message in result.stderr
    assert {p: p.stat().st_mtime_ns for p in source.parent.rglob("*")} == before


def test_disk_too_small(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny("llama")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1000))
    result = surgeon("prune", str(source), "--multiple-of", "8", "--out", "out", *CALIBRATION, code=1)
    assert "disk is too small" in result.stderr and not (source.parent / "out").exists()
    quantize = ["quantize", str(source), "--bits", "4", "--group-size", "16", "--out", "out"]
    surgeon(*quantize, "--super-weights", "none", "--dry-run")
    result = surgeon(*quantize, code=1)
    assert "disk is too small" in result.stderr and "super weights" not in result.stderr


def test_index_of_another_model_is_refused(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    first, second = save_tiny("llama"), save_tiny("llama", name="wider", intermediate_size=56)
    surgeon("index", str(first), "--out", "index", *CALIBRATION)
    result = surgeon("prune", str(second), "--index", "index", "--multiple-of", "8", "--out", "out", code=1)
    assert "another checkpoint" in result.stderr
    (first.parent / "index" / "index.safetensors").write_bytes(b"junk")
    assert "not a readable index" in surgeon("show", "index", code=1).stderr


def test_hostile_headers_do_not_allocate(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("variant", ["bloom", "mpt"])
def test_a_family_without_a_width_is_indexed_but_not_pruned(
    variant: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny(variant)
    surgeon("index", str(source), "--out", "index", *CALIBRATION)
    result = surgeon("prune", str(source), "--index", "index", "--out", "cut", code=1)
    assert "can be indexed but not pruned" in result.stderr and "4 x hidden_size" in result.stderr
    assert not (source.parent / "cut").exists()


def test_a_quantised_checkpoint_names_what_it_was_made_from(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama")
    set_config(quantization_config={"quant_method": "awq"})(source)
    (source / "README.md").write_text("---\nbase_model: org/original\n---\n")
    result = surgeon("index", str(source), "--out", "index", *CALIBRATION, code=1)
    assert "org/original" in result.stderr


def test_mixed_dtypes_stay_as_they_were_stored(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama", dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    kinds = {"norm": torch.float32, "up_proj": torch.float16}
    for name in tensors:
        for word, dtype in kinds.items():
            if word in name:
                tensors[name] = tensors[name].to(dtype)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    surgeon("prune", str(source), "--multiple-of", "8", "--out", "cut", *CALIBRATION)
    cut = load_file(source.parent / "cut" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in cut.items()} == {n: t.dtype for n, t in tensors.items()}
    assert len({tensor.dtype for tensor in cut.values()}) == 3
