"""Rounding: against the formulas, compressed-tensors' own unpacking, and AutoModelForCausalLM reading what
was written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_gguf import surgeon_model, write_gguf
from helpers.tiny_models import CALIBRATION
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.card.publish import name_repo, record_tasks
from surgery.engine.open_model import open_model
from surgery.errors import UsageError
from surgery.index.super_weights import SuperWeight
from surgery.quantize.rounding import CLIPS, Scheme, choose_clip, round_excluding, round_to_nearest
from surgery.quantize.w8a8 import round_tokens

GENERATOR = torch.Generator().manual_seed(0)
PLACE = (1, 17, 11)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("cut", [("group", 16), ("channel", 0), ("tensor", 0), ("block", 50)])
def test_values_are_within_half_a_step_and_zero_stays_zero(
    bits: int, symmetric: bool, cut: tuple[str, int]
) -> None:
    weight = normal(24, 64)
    weight[3, 5] = 0
    scheme = Scheme(bits, symmetric, *cut)
    rounded = round_to_nearest(weight, scheme)
    back = rounded.dequantised()
    steps = rounded.scale.expand_as(rounded.codes).flatten()[: weight.numel()].view(weight.shape)
    assert back.shape == weight.shape and back[3, 5] == 0
    # the largest positive of a symmetric block has no code of its own: it loses up to half a step more
    slack = 1.01 if symmetric else 0.51 + 0.5
    assert torch.all((back - weight).abs() <= slack * steps)
    codes = rounded.codes.int()
    assert codes.amin() >= -(2 ** (bits - 1)) and codes.amax() < 2 ** (bits - 1)
    count = {"group": 24 * 4, "channel": 24, "tensor": 1, "block": -(-24 * 64 // 50)}[cut[0]]
    assert len(rounded.scale) == count


def test_eight_bits_of_few_levels_are_exact() -> None:
    weight = torch.randint(-100, 100, (8, 32), generator=GENERATOR).float() * 0.5
    weight[:, 0], weight[:, 1] = -63.75, 63.75
    assert torch.equal(
        round_to_nearest(weight, Scheme(8, False, "channel")).dequantised().round(), weight.round()
    )


def test_an_outlier_ruins_its_block_unless_it_is_held_out() -> None:
    weight = normal(16, 64)
    weight[3, 7] = 400.0
    scheme = Scheme(4, False, "tensor")
    others = torch.ones_like(weight, dtype=torch.bool)
    others[3, 7] = False
    _, plain = round_excluding(weight, scheme, [])
    _, kept = round_excluding(weight, scheme, [(3, 7)])
    assert kept[3, 7] == 400.0
    assert (kept - weight)[others].abs().mean() < 0.2 * (plain - weight)[others].abs().mean()


def test_clipping_is_chosen_by_error_weighted_with_inputs() -> None:
    weight = normal(8, 256)
    weight[0, 9] = 60.0
    scheme = Scheme(4, False, "tensor")
    ignored = torch.ones(256)
    ignored[9] = 0.0  # nothing ever enters there: the outlier is worth clipping
    chosen = choose_clip(weight, scheme, [], ignored)
    assert chosen.clip in CLIPS
    vital = torch.full((256,), 1e-4)
    vital[9] = 1.0
    assert choose_clip(weight, scheme, [], vital).clip is None
    error = {
        clip: float(
            (
                (round_excluding(weight, Scheme(4, False, "tensor", 128, clip), [])[1] - weight).square()
                @ ignored
            ).sum()
        )
        for clip in (None, *CLIPS)
    }
    assert min(error, key=lambda clip: error[clip]) == chosen.clip


def test_groups_must_divide_rows() -> None:
    with pytest.raises(UsageError, match="divide"):
        round_to_nearest(normal(4, 48), Scheme(4, False, "group", 32))
    with pytest.raises(UsageError, match="bits"):
        Scheme(9)


def planted(folder: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder)
    mlp = model.model.layers[PLACE[0]].mlp
    mlp.down_proj.weight.data[PLACE[1:]] = 4000.0
    mlp.up_proj.weight.data[PLACE[2]] *= 4
    # The spike makes predictions uniform, and wrong ones come without it, so that it costs on any text.
    model.get_output_embeddings().weight.data *= 2
    model.get_output_embeddings().weight.data[:, PLACE[1]] = 0
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


NAME = "model.layers.1.mlp.down_proj.weight"


def test_simulated_checkpoint_has_every_matrix_rounded_and_the_super_weight_kept(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = planted(save_tiny("llama"))
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n")
    surgeon("quantize", str(source), "--simulate", "--group-size", "16", "--no-clip", "--out", "cut")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, Path("cut")))
    scheme = Scheme(4, False, "group", 16)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        places = [PLACE[1:]] if name == NAME else []
        linear = ".layers." in name and tensor.dim() == 2
        expected = round_excluding(tensor, scheme, places)[1] if linear else tensor
        assert torch.equal(after[name], expected), name
    manifest = json.loads(Path("cut/surgeon.json").read_text())
    assert (
        manifest["quantization"]["matrices"] == 6 * 7 and manifest["super_weights"][0]["column"] == PLACE[2]
    )
    card = Path("cut/README.md").read_text()
    assert "held out of the rounding" in card and "license: mit" in card


@pytest.mark.parametrize(
    "how",
    [
        ("--bits", "4"),
        ("--bits", "8", "--symmetric"),
        ("--bits", "3", "--clip", *CALIBRATION),
        ("--bits", "4", "--per-channel"),
    ],
)
def test_packed_checkpoint_loads_and_equals_the_simulated_one(
    how: tuple[str, ...], save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = planted(save_tiny("llama"))
    cut = [*how, *(() if "--per-channel" in how else ("--group-size", "16"))]
    assert not surgeon("quantize", str(source), *cut, "--out", "packed", "--quiet").stderr
    common = ["--symmetric", *(() if "--clip" in how else ("--no-clip",)), "--super-weights", "module"]
    surgeon("quantize", str(source), *cut, *common, "--simulate", "--out", "simulated")
    ids = torch.randint(0, 256, (2, 24), generator=GENERATOR)
    with torch.no_grad():
        packed, simulated = (
            AutoModelForCausalLM.from_pretrained(folder)(ids, use_cache=False).logits.float()
            for folder in ("packed", "simulated")
        )
    assert float((packed - simulated).norm() / simulated.norm()) < 0.02
    stored = load_file("packed/model.safetensors")
    source_tensors = load_file(source / "model.safetensors")
    assert torch.equal(stored[NAME], source_tensors[NAME])  # the super weight's module is whole
    codes = stored["model.layers.0.mlp.up_proj.weight_packed"]
    weight = source_tensors["model.layers.0.mlp.up_proj.weight"]
    assert codes.numel() * 32 == weight.numel() * int(how[1])


def test_what_can_not_be_packed_is_said(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    source = planted(save_tiny("llama"))
    refused = surgeon("quantize", str(source), "--flat-block", "64", "--out", "cut", code=2)
    assert "--simulate" in refused.stderr and not Path("cut").exists()
    refused = surgeon(
        "quantize", str(source), "--group-size", "16", "--super-weights", "restore", "--out", "cut", code=2
    )
    assert "single scalars" in refused.stderr
    refused = surgeon("quantize", str(source), "--group-size", "16", "--asymmetric", "--out", "cut", code=2)
    assert "zero points" in refused.stderr
    refused = surgeon("quantize", str(source), "--group-size", "8", "--per-channel", "--out", "cut", code=2)
    assert "--compare" in refused.stderr
    refused = surgeon("quantize", str(save_tiny("gpt2", name="gpt2")), "--out", "cut", code=1)
    assert "Conv1D" in refused.stderr


def test_a_pruned_checkpoint_is_quantised_with_its_coordinates(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = planted(save_tiny("llama"))
    surgeon("prune", str(source), "--multiple-of", "8", "--out", "pruned", "--repair", "none", *CALIBRATION)
    (weight,) = json.loads(Path("pruned/surgeon.json").read_text())["super_weights"]
    assert weight["column"] != weight["column_before"] == PLACE[2]
    surgeon("quantize", "pruned", "--simulate", "--group-size", "8", "--no-clip", "--out", "cut")
    before, after = (load_file(f"{folder}/model.safetensors")[NAME] for folder in ("pruned", "cut"))
    assert after[PLACE[1], weight["column"]] == before[PLACE[1], weight["column"]] == 4000.0
    assert not torch.equal(before, after)


def test_comparison_equals_written_checkpoints(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = planted(save_tiny("llama"))
    text = ["--text", "text.txt", "--text-blocks", "2"]
    calibration = [*CALIBRATION, "--group-size", "16", "--per-tensor"]
    shown = surgeon("quantize", str(source), "--compare", *calibration, *text, "--out", "table").stdout
    rows = {
        row["condition"]: row for row in json.loads(Path("table/quantization.json").read_text())["conditions"]
    }
    assert len(rows) == 11 and "module left whole" in shown
    name = "INT4 asym tensor"
    assert rows[f"{name}: RTN, super weights put back"]["kl"] < rows[f"{name}: RTN"]["kl"]
    for way, how in (
        ("RTN", ["--no-clip", "--super-weights", "none"]),
        ("RTN, clipped, super weights put back", ["--clip", "--super-weights", "restore"]),
    ):
        folder = f"cut-{len(how[0])}"
        surgeon("quantize", str(source), "--simulate", "--per-tensor", *how, *CALIBRATION, "--out", folder)
        written = json.loads(surgeon("eval", folder, "--text", "text.txt", "--blocks", "2", "--json").stdout)
        assert rows[f"{name}: {way}"]["perplexity"] == pytest.approx(written["perplexity"], rel=2e-3)


def test_rounded_activations_equal_the_formula_in_the_whole_model(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = planted(save_tiny("llama"))
    text = ["--text", "text.txt", "--blocks", "2", "--block-size", "64", "--dtype", "float32", "--json"]
    found = {
        mode: json.loads(surgeon("eval", str(source), *text, *how).stdout)["perplexity"]
        for mode, how in {
            "plain": [],
            "w8a8": ["--activations", "w8a8"],
            "w8a8-sa": ["--activations", "w8a8-sa"],
            "smoothquant": ["--activations", "smoothquant", "--calibration", "text.txt"],
        }.items()
    }
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        for linear in [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]:
            linear.weight.copy_(round_to_nearest(linear.weight, Scheme(8, False, "tensor")).dequantised())
            linear.register_forward_pre_hook(lambda _, inputs: (by_token(inputs[0]),))
        ids = AutoTokenizer.from_pretrained(source)(Path("text.txt").read_text())["input_ids"][:128]
        blocks = torch.tensor(ids).view(2, 64)
        logits = model(blocks, use_cache=False).logits[:, :-1]
    nats = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), blocks[:, 1:].reshape(-1))
    assert found["w8a8"] == pytest.approx(float(nats.exp()), rel=1e-3)
    assert len({round(value, 4) for value in found.values()}) == 4


def by_token(x: torch.Tensor) -> torch.Tensor:
    """256 levels from the least to the largest entry of each token."""
    rows = []
    for row in x.flatten(0, -2):
        step = (row.max() - row.min()) / 255
        rows.append(((row - row.min()) / step).round() * step + row.min())
    return torch.stack(rows).view_as(x)


def test_a_held_out_spike_leaves_the_rest_of_its_token_exact() -> None:
    x = normal(3, 64)
    x[1, 5] = -900.0
    plain, held = round_tokens(x), round_tokens(x, hold_spikes=True)
    assert held[1, 5] == -900.0 and torch.equal(plain[[0, 2]], held[[0, 2]])
    others = torch.arange(64) != 5
    assert (held - x)[1, others].abs().max() < 0.02 < (plain - x)[1, others].abs().max()


@pytest.mark.parametrize("variant", ["mixtral", "qwen2_moe", "gemma3_text"])
def test_packed_leaves_whole_what_is_not_rounded(
    variant: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny(variant)
    surgeon("quantize", str(source), "--group-size", "8", "--super-weights", "none", "--out", "packed")
    stored = load_file("packed/model.safetensors")
    before = load_file(source / "model.safetensors")
    whole = [name for name in stored if name in before and stored[name].dim() == 2]
    assert all(torch.equal(stored[name], before[name]) for name in whole)
    routers = [name for name in before if name.endswith((".gate.weight", "shared_expert_gate.weight"))]
    assert set(routers) <= set(whole) and bool(routers) == (variant != "gemma3_text")
    ids = torch.randint(0, 256, (1, 8), generator=GENERATOR)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained("packed")(ids, use_cache=False).logits
    assert logits.isfinite().all()


def test_a_super_weight_of_an_expert_is_refused_before_packing(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    """transformers can't load a parameter of which one expert is packed and another is not."""
    source = save_tiny("mixtral")
    weight = SuperWeight(
        0, 3, 5, value=1.0, input=1.0, output=1.0, explained=1.0, ratio=1.0, rank=1, token=0, ffn="expert.2"
    )
    manifest = {"schema_version": 1, "super_weights": [weight.as_json()]}
    (source / "surgeon.json").write_text(json.dumps(manifest))
    rounding = ("quantize", str(source), "--group-size", "8", "--out", "packed")
    refused = surgeon(*rounding, code=2).stderr
    assert "all packed or all whole" in refused and "experts.2.w2.weight" in refused
    assert "all packed or all whole" in surgeon(*rounding, "--dry-run", code=2).stderr
    surgeon(*rounding, "--simulate", "--no-clip")


def test_routers_stay_and_experts_in_one_tensor_are_refused(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    for variant in ("gpt_oss", "granitemoe"):
        refused = surgeon("quantize", str(save_tiny(variant, name=variant)), "--out", "cut", code=1)
        assert "experts stored as one tensor" in refused.stderr
    refused = surgeon("eval", "gpt_oss", "--text", "text.txt", "--activations", "w8a8", code=1)
    assert "experts in one tensor" in refused.stderr
    refused = surgeon(
        "eval", str(save_tiny("gpt2", name="g")), "--text", "text.txt", "--activations", "w8a8", code=1
    )
    assert "Conv1D" in refused.stderr
    refused = surgeon("eval", "g", "--tasks", "x", "--activations", "w8a8", code=2)
    assert "perplexity" in refused.stderr


def test_quantised_folders_keep_their_card(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = planted(save_tiny("llama"))
    quantised = [
        "quantize",
        str(source),
        "--simulate",
        "--group-size",
        "16",
        "--seed",
        "9",
        *CALIBRATION,
        "--out",
        "cut",
    ]
    shown = surgeon(*quantised, "--json")
    manifest = json.loads(shown.stdout)
    assert "--seed 9" in manifest["command"] and "--clip" in manifest["command"]
    assert manifest["quantization"]["clip_chosen"]
    surgeon("card", "cut")
    record_tasks(
        Path("cut"), {"harness": "h", "settings": {"t": {}}, "results": {"t": {"acc": 0.5, "samples": 4}}}
    )
    card = Path("cut/README.md").read_text()
    assert "| t | acc | 0.500 | 4 |" in card and "INT4 asym group 16" in card
    name_repo(Path("cut"), "me/it")
    assert 'from_pretrained("me/it")' in Path("cut/README.md").read_text()
    assert "to me/it" in surgeon("push", "cut", "me/it", "--dry-run").stdout


def test_small_weights_keep_their_scale_in_float16() -> None:
    weight = (1e-3 * normal(8, 128)).half()
    back = round_to_nearest(weight, Scheme(8, True, "group", 128)).dequantised()
    assert float((back - weight).float().norm() / weight.float().norm()) < 0.01


@pytest.mark.parametrize("how", [("--simulate",), ()])
def test_a_gguf_file_is_rounded_as_the_folder_of_its_values(
    how: tuple[str, ...], tmp_path: Path, surgeon: Callable[..., Any]
) -> None:
    write_gguf(tmp_path / "whole.gguf", "qwen2", quantise=lambda _: "Q8_0")
    options = ["--bits", "8", "--group-size", "32", "--symmetric", "--no-clip", *how]
    said = surgeon("quantize", "whole.gguf", *options, "--out", "rounded")
    assert "Rounded a second time: the source is GGUF (" in said.stdout
    opened = open_model(tmp_path / "whole.gguf")
    values = {name: opened.checkpoint.read(name) for name in opened.checkpoint.tensors}
    scheme, stored = Scheme(8, True, "group", 32), load_file("rounded/model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    expected = round_to_nearest(values[f"{name}.weight"], scheme)
    assert torch.equal(stored["model.norm.weight"], values["model.norm.weight"])
    if how:
        assert torch.equal(stored[f"{name}.weight"].float(), expected.dequantised().float())
    else:
        assert torch.equal(
            stored[f"{name}.weight_scale"], expected.scale.view(values[f"{name}.weight"].shape[0], -1)
        )
    ids = torch.randint(0, 256, (2, 24), generator=GENERATOR)
    with torch.no_grad():
        whole = surgeon_model(tmp_path / "whole.gguf").model(ids).logits
        cut = AutoModelForCausalLM.from_pretrained("rounded")(ids, use_cache=False).logits.float()
    assert float((whole - cut).norm() / whole.norm()) < 0.1
    assert AutoTokenizer.from_pretrained("rounded")("ab")["input_ids"]
