"""Stored tensors outside the model transformers builds: cut with it, carried, or dropped; never wrong in
silence.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers.masking import IDS
from helpers.tiny_models import CALIBRATION
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModelForCausalLM

from surgery.checkpoint.transformers_model import check_loads
from surgery.cli.main import main
from surgery.engine.open_model import open_model

CUT = ["--multiple-of", "8", "--repair", "none", *CALIBRATION]


@pytest.fixture
def folder_of(
    save_tiny: Callable[..., Path], tmp_path: Path, license_text: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Save a tiny model with more tensors; the current folder then holds it and text.txt."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(license_text)

    def make(family: str, more: dict[str, torch.Tensor], **changes: Any) -> Path:
        folder = save_tiny(family, **changes)
        file = folder / "model.safetensors"
        save_file(load_file(file) | more, file, metadata={"format": "pt"})
        return folder

    return make


def surgeon(*command: str, fails: bool = False) -> str:
    result = CliRunner().invoke(main, list(command))
    assert (result.exit_code != 0) == fails, result.output
    return result.output


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def ffn(prefix: str, width: int, hidden: int) -> dict[str, torch.Tensor]:
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    return {f"{prefix}.{name}.weight": torch.randn(*shape) for name, shape in shapes.items()}


def widths(folder: Path) -> tuple[int, int]:
    config = json.loads((folder / "config.json").read_text())
    return int(config["intermediate_size"]), int(config["hidden_size"])


def test_mtp_layers_are_cut_to_the_width_of_the_config(
    folder_of: Callable[..., Path], save_tiny: Callable[..., Path]
) -> None:
    width, hidden = widths(save_tiny("qwen3"))
    more = ffn("mtp.layers.0.mlp", width, hidden) | {"mtp.fc.weight": torch.randn(hidden, 2 * hidden)}
    folder_of("qwen3", more)
    assert "Cut with the model" in surgeon("prune", "tiny", "--dry-run", *CUT)
    surgeon("prune", "tiny", "--out", "cut", *CUT)
    after, _ = widths(Path("cut"))
    written = load_file("cut/model.safetensors")
    # Second route: the largest sums of norms, by torch on whole matrices.
    score = more["mtp.layers.0.mlp.gate_proj.weight"].norm(dim=1)
    score = score + more["mtp.layers.0.mlp.up_proj.weight"].norm(dim=1)
    score = score + more["mtp.layers.0.mlp.down_proj.weight"].norm(dim=0)
    kept = score.topk(after).indices.sort().values
    for name in ("gate_proj", "up_proj"):
        stored = f"mtp.layers.0.mlp.{name}.weight"
        assert torch.equal(written[stored], more[stored][kept])
    down = "mtp.layers.0.mlp.down_proj.weight"
    assert torch.equal(written[down], more[down][:, kept])
    assert torch.equal(written["mtp.fc.weight"], more["mtp.fc.weight"])
    fates = {entry["fate"] for entry in json.loads(Path("cut/surgeon.json").read_text())["outside_model"]}
    assert fates == {"cut", "carry"} and "mtp" in Path("cut/README.md").read_text()


def test_experts_of_mtp_layers_are_cut_one_by_one(folder_of: Callable[..., Path]) -> None:
    config_of = folder_of("deepseek_v3", {})
    config = json.loads((config_of / "config.json").read_text())
    width, hidden = config["moe_intermediate_size"], config["hidden_size"]
    layer = f"model.layers.{config['num_hidden_layers']}"
    more: dict[str, torch.Tensor] = {}
    for expert in range(config["n_routed_experts"]):
        more |= ffn(f"{layer}.mlp.experts.{expert}", width, hidden)
    more |= ffn(f"{layer}.mlp.shared_experts", width * config["n_shared_experts"], hidden)
    folder = folder_of("deepseek_v3", more)
    edit_config(folder, num_nextn_predict_layers=1)
    surgeon("prune", "tiny", "--out", "cut", *CUT)
    after = json.loads(Path("cut/config.json").read_text())["moe_intermediate_size"]
    written = load_file("cut/model.safetensors")
    assert after < width
    for expert in range(config["n_routed_experts"]):
        assert written[f"{layer}.mlp.experts.{expert}.down_proj.weight"].shape == (hidden, after)
    shared = after * config["n_shared_experts"]
    assert written[f"{layer}.mlp.shared_experts.up_proj.weight"].shape == (shared, hidden)


def test_an_extra_layer_of_another_width_is_refused_before_the_index(
    folder_of: Callable[..., Path], save_tiny: Callable[..., Path]
) -> None:
    _, hidden = widths(save_tiny("qwen3"))
    folder_of("qwen3", ffn("mtp.layers.0.mlp", 24, hidden))
    for command in (["--dry-run"], ["--out", "cut"]):
        assert "unlike the model's" in surgeon("prune", "tiny", *CUT, *command, fails=True)
    assert not Path("cut").exists()


@pytest.mark.parametrize(
    ("family", "name", "tensor"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", torch.rand(8)),
        ("gpt2", "transformer.h.0.attn.masked_bias", torch.tensor(-1e4)),
        ("gpt2", "transformer.h.0.attn.bias", torch.ones(1, 1, 8, 8)),
        ("llama", "model.layers.0.self_attn.causal_mask", torch.ones(8, 8, dtype=torch.bool)),
        ("llama", "model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(1, 1)),
        ("llama", "model.layers.99.mlp.up_proj.weight", torch.rand(4, 4)),
    ],
)
def test_junk_is_dropped_and_said(
    folder_of: Callable[..., Path], family: str, name: str, tensor: torch.Tensor
) -> None:
    folder_of(family, {name: tensor})
    for command in (
        ["index", "tiny", "--dry-run", *CALIBRATION],
        ["prune", "tiny", "--dry-run", *CUT],
        ["prune", "tiny", "--out", "cut", *CUT],
    ):
        assert f"Dropped: 1 tensors such as {name}" in surgeon(*command)
    assert name not in load_file("cut/model.safetensors")
    check_loads(Path("cut"))


def test_a_head_of_another_task_is_carried(folder_of: Callable[..., Path]) -> None:
    score = torch.rand(1, 64)
    folder_of("qwen2", {"score.weight": score})
    surgeon("prune", "tiny", "--out", "cut", *CUT)
    assert torch.equal(load_file("cut/model.safetensors")["score.weight"], score)
    assert "Carried unchanged" in surgeon("prune", "cut", "--dry-run", *CUT)
    pytest.importorskip("compressed_tensors")
    options = ["--group-size", "16", "--super-weights", "none"]
    surgeon("quantize", "tiny", "--out", "packed", *options, *CALIBRATION)
    ignored = json.loads(Path("packed/config.json").read_text())["quantization_config"]["ignore"]
    assert "score" in ignored and "score.weight" in load_file("packed/model.safetensors")


def test_tied_weights_may_be_stored_under_the_name_of_the_head(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("llama-tied-bias", {})
    model = AutoModelForCausalLM.from_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    stored = set(load_file(folder / "model.safetensors"))
    assert "lm_head.weight" in stored and "model.embed_tokens.weight" not in stored
    surgeon("prune", "tiny", "--sparsity", "0", "--out", "same", *CUT)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained("same")(IDS).logits, expected)


def test_a_checkpoint_without_a_head_is_named(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("llama", {})
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "no output head" in surgeon("index", "tiny", "--out", "index", *CALIBRATION, fails=True)


@pytest.mark.parametrize("both", [True, False])
def test_a_width_under_an_older_key_is_written_back_under_it(
    folder_of: Callable[..., Path], both: bool
) -> None:
    layers = ["conv", "conv", "full_attention", "conv"]
    changes = {"layer_types": layers, "block_auto_adjust_ff_dim": False, "num_hidden_layers": 4}
    folder = folder_of("lfm2", {}, **changes)
    width, _ = widths(folder)
    edit_config(folder, block_ff_dim=width, intermediate_size=width if both else None)
    surgeon("prune", "tiny", "--out", "cut", *CUT)
    config = json.loads(Path("cut/config.json").read_text())
    assert config["block_ff_dim"] < width and ("intermediate_size" in config) == both
    assert open_model("cut").meta_model.ffns[0][0].width == config["block_ff_dim"]
    assert not AutoModelForCausalLM.from_pretrained("cut", output_loading_info=True)[1]["mismatched_keys"]
