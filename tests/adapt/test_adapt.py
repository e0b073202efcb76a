"""`surgeon adapt`: an adapter does on the cut model what it does on the dense one with channels masked."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.masking import IDS, kept_channels
from helpers.tiny_models import CALIBRATION, byte_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import surgery.loading  # noqa: F401
from surgery.engine.open_model import open_model
from surgery.heal.adapter import CONFIG, TENSORS
from surgery.index.calibration import draw_calibration

peft = pytest.importorskip("peft", reason="peft is not installed")
# peft asks transformers by an old name; its warnings of keys that are missing or not used stay errors
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

CUT = ("--sparsity", "0.5", "--multiple-of", "4", "--out", "cut", *CALIBRATION)
PATHS = {
    "llama": ("model.layers", ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "mlp.down_proj"),
    "gpt2": ("transformer.h", ["c_attn", "c_fc", "c_proj"], "mlp.c_proj"),
    "phi3": ("model.layers", ["qkv_proj", "gate_up_proj", "down_proj"], "mlp.down_proj"),
}


def save_lora(folder: Path, modules: list[str], name: str = "lora", **options: Any) -> Path:
    """A random adapter of the model in `folder`, beside it."""
    torch.manual_seed(5)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=modules, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    for key, parameter in model.named_parameters():
        if "lora_B" in key or "lora_embedding_A" in key:
            torch.nn.init.normal_(parameter, 0, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says when it saves embeddings too
        model.save_pretrained(folder.parent / name)
    return folder.parent / name


@torch.no_grad()
def logits(folder: Path, adapter: Path | None = None, watch: Callable[[Any], None] | None = None) -> Any:
    """Logits of a folder with an adapter, through peft; `watch` gets the model before it runs."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    if watch is not None:
        watch(model)
    return model.eval()(IDS, use_cache=False).logits


@torch.no_grad()
def nats(folder: Path, ids: torch.Tensor, adapter: Path | None) -> float:
    """Mean cross-entropy of a token, with an adapter through peft."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model = model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)
    return float(model.eval()(ids, labels=ids, use_cache=False).loss)


def masking(cut: Path, family: str) -> Callable[[Any], None]:
    """Zeroes the removed channels where the down projection reads them."""
    kept = kept_channels(json.loads((cut / "surgeon.json").read_text()))
    layers, _, down = PATHS[family]

    def watch(model: Any) -> None:
        for layer, channels in zip(model.get_base_model().get_submodule(layers), kept, strict=True):

            def hook(_: Any, inputs: tuple[torch.Tensor], here: torch.Tensor = channels["dense"]) -> Any:
                kept_only = torch.zeros_like(inputs[0])
                kept_only[..., here] = inputs[0][..., here]
                return (kept_only,)

            layer.get_submodule(down).register_forward_pre_hook(hook)

    return watch


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", ()),
        ("gpt2", ()),
        ("phi3", ()),
        ("llama", ("--allocation", "score")),
        ("llama", ("--allocation", "score", "--pad")),
    ],
)
def test_the_adapter_does_on_the_cut_what_it_does_on_the_masked_dense_model(
    family: str, more: tuple[str, ...], save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    dense = save_tiny(family, name="dense")
    cut = dense.parent / "cut"
    surgeon("prune", "dense", *CUT, "--repair", "none", *more)
    lora = save_lora(dense, PATHS[family][1], fan_in_fan_out=family == "gpt2")
    surgeon("adapt", "lora", "--onto", "cut", "--out", "carried")
    expected = logits(dense, lora, masking(cut, family))
    found = logits(cut, dense.parent / "carried")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected - logits(cut)).abs().max() > 0.1  # the adapter does something
    config = json.loads((dense.parent / "carried" / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("cut", 3, 6)


def test_without_adapt_peft_fails_on_the_shapes(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    dense = save_tiny("llama", name="dense")
    surgeon("prune", "dense", *CUT)
    lora = save_lora(dense, PATHS["llama"][1])
    with pytest.raises(RuntimeError, match="size mismatch"):
        logits(dense.parent / "cut", lora)


def test_only_what_the_cut_concerns_is_changed(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    dense = save_tiny("llama", name="dense")
    surgeon("prune", "dense", *CUT)
    save_lora(dense, ["q_proj", "up_proj"])
    said = json.loads(surgeon("adapt", "lora", "--onto", "cut", "--out", "carried", "--json").stdout)
    layers = range(len(said["cut"]))
    assert said["cut"] == [f"model.layers.{i}.mlp.up_proj" for i in layers]
    assert said["copied"] == [f"model.layers.{i}.self_attn.q_proj" for i in layers]
    assert said["refitted"] == [] and said["refit"] is None  # no adapter of down_proj: nothing to refit
    before, after = (load_file(dense.parent / name / TENSORS) for name in ("lora", "carried"))
    same = {key for key in before if before[key].shape == after[key].shape}
    assert same == {key for key in before if "up_proj.lora_B" not in key}
    assert all(torch.equal(before[key], after[key]) for key in same)


def down_inputs(folder: Path, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs of every down projection [tokens, F] and outputs of every layer [tokens, D], by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, x: inputs.append(x[0].flatten(0, 1)))
        layer.register_forward_hook(lambda _, __, out: outputs.append(out.flatten(0, 1)))
    with torch.no_grad():
        model(ids, use_cache=False)
    return inputs, outputs


def test_a_refit_reads_from_the_kept_channels_what_the_adapter_read_from_all(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    dense = save_tiny("llama", name="dense")
    folder, options = dense.parent, ("--calibration", "text.txt", "--blocks", "16", "--block-size", "32")
    surgeon("prune", "dense", *CUT)
    save_lora(dense, ["down_proj"])
    said = json.loads(
        surgeon("adapt", "lora", "--onto", "cut", "--out", "carried", "--json", *options).stdout
    )
    refit = said["refit"]["modules"]
    assert all(one["held_out_after"] < one["held_out_before"] for one in refit.values())
    ids = draw_calibration(open_model(dense), "text.txt", blocks=16, block_size=32, seed=42).ids.long()
    wide, streams = down_inputs(dense, ids)
    narrow, _ = down_inputs(folder / "cut", ids)
    kept = kept_channels(json.loads((folder / "cut" / "surgeon.json").read_text()))
    before, after = (load_file(folder / name / TENSORS) for name in ("lora", "carried"))
    for number, (u, v, stream) in enumerate(zip(wide, narrow, streams, strict=True)):
        module = f"model.layers.{number}.mlp.down_proj"
        a, found = (t[f"base_model.model.{module}.lora_A.weight"].double() for t in (before, after))
        start = a[:, kept[number]["dense"]]
        root = stream.double().square().sum(-1).rsqrt()[:, None]
        u, v = u.double() * root, v.double() * root
        penalty = (refit[module]["ridge"] * v.square().sum(0)).sqrt().diag()
        rows = torch.cat([v, penalty]), torch.cat([u @ a.T - v @ start.T, torch.zeros(len(penalty), len(a))])
        change = torch.linalg.lstsq(*rows).solution.T
        assert change.norm() > 0.05 * start.norm()
        torch.testing.assert_close(found, start + change, atol=1e-3, rtol=1e-3)
    surgeon("adapt", "lora", "--onto", "cut", "--out", "plain", "--no-refit")
    plain = load_file(folder / "plain" / TENSORS)
    assert torch.equal(plain[f"base_model.model.{module}.lora_A.weight"].double(), start)


def test_most_of_a_trained_gain_survives_a_cut_of_a_quarter(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], license_text: str
) -> None:
    dense = save_tiny("llama", name="dense", intermediate_size=128)
    folder, options = dense.parent, ("--calibration", "text.txt", "--blocks", "64", "--block-size", "64")
    ids = torch.tensor(byte_tokenizer()(license_text).input_ids)
    ids = ids[: len(ids) // 64 * 64].view(-1, 64)
    text, held_out = ids[:-16], ids[-16:]
    modules = [*PATHS["llama"][1], "v_proj"]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(dense), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        batch = text[torch.randint(len(text), (8,), generator=generator)]
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "lora")
    surgeon("prune", "dense", "--sparsity", "0.25", "--multiple-of", "8", "--out", "cut", *options)
    surgeon("adapt", "lora", "--onto", "cut", "--out", "carried", *options)

    def gain(base: str, adapter: str) -> float:
        before, after = (nats(folder / base, held_out, path) for path in (None, folder / adapter))
        return before - after

    assert gain("dense", "lora") > 1
    assert gain("cut", "carried") > 0.95 * gain("dense", "lora")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias lora_only"),
        ({"modules_to_save": ["down_proj"], "target_modules": ["q_proj"]}, "modules_to_save"),
        ({"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]}, "target_parameters"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_name(
    options: dict[str, Any], message: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    dense = save_tiny("llama", name="dense")
    surgeon("prune", "dense", *CUT, "--repair", "none")
    modules = options.pop("target_modules", ["down_proj"])
    save_lora(dense, modules, **options)
    assert message in surgeon("adapt", "lora", "--onto", "cut", code=1).stderr
    assert not (dense.parent / "lora-cut").exists()


def test_bad_inputs_are_refused_before_anything_is_written(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    dense = save_tiny("llama", name="dense")
    folder = dense.parent
    surgeon("prune", "dense", *CUT)
    save_lora(dense, ["down_proj"])
    save_lora(save_tiny("llama", name="wider", intermediate_size=64), ["down_proj"], name="lora-wider")
    save_lora(save_tiny("gpt2", name="other"), ["c_fc"], name="lora-other", fan_in_fan_out=True)
    for name, kind in (("pickled", None), ("prefix", "PREFIX_TUNING"), ("pissa", "LORA"), ("broken", "LORA")):
        shutil.copytree(folder / "lora", folder / name)
        config = json.loads((folder / "lora" / CONFIG).read_text())
        config |= {"init_lora_weights": "pissa"} if name == "pissa" else {"peft_type": kind or "LORA"}
        (folder / name / CONFIG).write_text(json.dumps(config))
    (folder / "pickled" / TENSORS).rename(folder / "pickled" / "adapter_model.bin")
    (folder / "broken" / TENSORS).write_bytes((folder / "lora" / TENSORS).read_bytes()[:200])
    surgeon("quantize", "dense", "--simulate", "--group-size", "16", "--no-clip", "--out", "rounded")
    cut = ("--sparsity", "0.5", "--multiple-of", "8", "--repair", "none", *CALIBRATION)
    surgeon("prune", "dense", "--drop-layers", "1", *cut, "--out", "shallow", "--quiet")
    before = sorted(folder.iterdir())
    cases = [
        ("lora-wider", "cut", 1, "does not fit the model that this folder was cut from"),
        ("lora-other", "cut", 1, "adapts a module that this one lacks"),
        ("cut", "cut", 1, "no adapter of peft"),
        ("nowhere", "cut", 1, "no adapter of peft"),
        ("pickled", "cut", 1, "safetensors only"),
        ("prefix", "cut", 1, "PREFIX_TUNING"),
        ("pissa", "cut", 1, "path_initial_model_for_weight_conversion"),
        ("broken", "cut", 1, "damaged"),
        ("lora", "dense", 2, "did not cut this folder"),
        ("lora", "rounded", 2, "did not cut this folder"),
        ("lora", "shallow", 2, "only FFN channels may be cut, for an adapter to be carried"),
    ]
    for adapter, onto, code, message in cases:
        found = surgeon("adapt", adapter, "--onto", onto, "--out", "carried", "--no-refit", code=code)
        assert message in found.stderr, (adapter, found.stderr)
    other = surgeon("adapt", "lora", "--onto", "cut", "--dense", "wider", "--out", "carried", code=2)
    assert "not the model that the folder was cut from" in other.stderr
    assert sorted(folder.iterdir()) == before


def test_beside_experts_adapters_are_carried_and_of_experts_refused(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    dense = save_tiny("deepseek_v3", name="dense")
    surgeon("prune", "dense", *CUT, "--repair", "none")
    lora = save_lora(dense, ["o_proj"])
    surgeon("adapt", "lora", "--onto", "cut", "--out", "carried")
    cut, names = dense.parent / "cut", load_file(lora / TENSORS)
    assert (logits(cut, dense.parent / "carried") - logits(cut)).abs().max() > 0.01
    key = "base_model.model.model.layers.1.mlp.experts.0.up_proj.lora_A.weight"
    save_file({**names, key: torch.zeros(3, 32)}, lora / TENSORS)
    assert "routed experts" in surgeon("adapt", "lora", "--onto", "cut", "--out", "again", code=1).stderr


def test_saved_modules_and_embeddings_come_along(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    dense = save_tiny("llama", name="dense")
    surgeon("prune", "dense", *CUT, "--repair", "none")
    modules = ["embed_tokens", "down_proj"]
    lora = save_lora(dense, modules, modules_to_save=["model.norm", "lm_head"], use_rslora=True)
    said = json.loads(surgeon("adapt", "lora", "--onto", "cut", "--out", "carried", "--json").stdout)
    assert said["saved"] == ["lm_head", "model.embed_tokens", "model.norm"]
    assert "model.embed_tokens" in said["copied"]
    cut = dense.parent / "cut"
    torch.testing.assert_close(
        logits(cut, dense.parent / "carried"),
        logits(dense, lora, masking(cut, "llama")),
        atol=1e-4,
        rtol=1e-4,
    )
