"""Every family: gradients against full-model autograd, cuts against masking, the table against the model's
own shapes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.masking import IDS, kept_channels, mask
from helpers.model_families import CONFIGS, INDEX_ONLY, readme_table
from helpers.tiny_models import CALIBRATION, ROOT, byte_tokenizer, opened, tiny_model
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.transformers_model import build_model
from surgery.engine.loss import next_token_loss
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import FfnActivations, TokenStream
from surgery.index.channel_index import ChannelIndex
from surgery.model.families import FAMILIES, FfnSite
from surgery.model.ffn import find_ffns
from surgery.model.infer_family import infer_family
from surgery.model.meta_model import MetaModel

CPU = torch.device("cpu")
SEEN: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}


def reference_experts(
    self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Routed experts as transformers' modelling files write them; activations and gradients are kept."""
    output = torch.zeros_like(hidden)
    mask = functional.one_hot(index, num_classes=self.num_experts).permute(2, 1, 0)
    for expert in mask.sum((-1, -2)).nonzero().flatten().tolist():
        place, token = torch.where(mask[expert])
        x = hidden[token]
        if self.is_transposed:
            projected = x @ self.gate_up_proj[expert] + (
                self.gate_up_proj_bias[expert] if self.has_bias else 0
            )
        else:
            projected = functional.linear(x, self.gate_up_proj[expert])
        u = self._apply_gate(projected)
        u.retain_grad()
        SEEN.setdefault((id(self), expert), []).append((token, u))
        if self.is_transposed:
            y = u @ self.down_proj[expert] + (self.down_proj_bias[expert] if self.has_bias else 0)
        else:
            y = functional.linear(u, self.down_proj[expert])
        output.index_add_(0, token, (y * weights[token, place, None]).to(output.dtype))
    return output


Activations = dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]


Contributions = dict[tuple[int, str], torch.Tensor]
Reference = tuple[float, list[Any], Activations, Contributions]


def full_autograd(folder: Path, sites: tuple[FfnSite, ...], layers_path: str) -> Reference:
    """Loss, gradient of every layer's input, (u, dL/du) of every FFN, and sum_t u dL/du of each of its
    channels.

    The last comes from the weights' gradients alone, as <W[:, c], dL/dW[:, c]>, so it needs no hook at all.
    """
    ALL_EXPERTS_FUNCTIONS.register("reference", reference_experts)
    SEEN.clear()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(True)
    inputs: list[torch.Tensor] = []
    dense: dict[tuple[int, str], torch.Tensor] = {}

    def keep_input(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        arguments[0].retain_grad()
        inputs.append(arguments[0])

    bound = [find_ffns(sites, layer) for layer in model.get_submodule(layers_path)]
    for number, layer in enumerate(model.get_submodule(layers_path)):
        layer.register_forward_pre_hook(keep_input)
        for ffn in bound[number]:
            if ffn.stacked:
                if hasattr(ffn.module, "config"):
                    ffn.module.config._experts_implementation = "reference"
                continue

            def keep(_: Any, arguments: tuple[torch.Tensor, ...], key: Any = (number, ffn.name)) -> None:
                arguments[0].retain_grad()
                dense[key] = arguments[0]

            ffn.module.register_forward_pre_hook(keep)
    logits = model(IDS, use_cache=False).logits
    targets = IDS[:, 1:].reshape(-1)
    loss = functional.cross_entropy(
        logits[:, :-1].reshape(len(targets), -1).float(), targets, reduction="sum"
    )
    loss.backward()
    found: Activations = {}
    for key, u in dense.items():
        found[key] = (u.detach().reshape(-1, u.shape[-1]), u.grad.reshape(-1, u.shape[-1]))  # type: ignore[union-attr]
    for number, ffns in enumerate(bound):
        for ffn in ffns:
            for _, u in SEEN.get((id(ffn.module), ffn.expert), []):
                assert u.grad is not None
                found[number, ffn.name] = (u.detach(), u.grad)
    contributions = {}
    for number, ffns in enumerate(bound):
        before = {ffn.name: ffn.down_weight().clone() for ffn in ffns}
        for path in {ffn.down_name for ffn in ffns}:
            parameter = ffns[0].layer.get_parameter(path)
            assert parameter.grad is not None
            parameter.data.copy_(parameter.grad)
        for ffn in ffns:
            product = before[ffn.name].double() * ffn.down_weight().double()
            contributions[number, ffn.name] = product.sum(0)
    return loss.item(), [h.grad for h in inputs], found, contributions


def streamed(model: StreamedModel) -> tuple[float, list[torch.Tensor], Activations]:
    """The same from the engine."""
    stream = TokenStream(model, IDS, micro_batch=len(IDS), keep_inputs=True)
    count = len(model.layers)
    for number, layer in model.stream_layers(range(count)):
        stream.forward(number, layer)
    loss = next_token_loss(stream, with_gradient=True).sum().item()
    inputs: list[torch.Tensor] = [torch.empty(0)] * count
    found: Activations = {}
    for number, layer in model.stream_layers(reversed(range(count))):

        def keep(flow: FfnActivations, number: int = number) -> None:
            width = flow.u.shape[-1]
            found[number, flow.ffn] = (flow.u.reshape(-1, width), flow.s.reshape(-1, width))

        stream.backward(number, layer, keep)
        inputs[number] = stream.store.get(number, slice(0, len(IDS)), CPU)
    assert all(parameter.is_meta for parameter in model.layers.parameters()), "a layer stayed in memory"
    return loss, inputs, found


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")  # tokens were routed elsewhere
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def worst_error(folder: Path, other: Path | None = None) -> float:
    """Largest relative error of loss, layer inputs' gradients, FFN activations and their gradients."""
    model = StreamedModel(opened(other or folder))
    meta_model = model.meta_model
    loss, inputs, expected, contributions = full_autograd(
        folder, meta_model.family.sites, meta_model.layers_path
    )
    our_loss, our_inputs, found = streamed(model)
    for key, (u, s) in found.items():
        largest = (u.double() * s.double()).abs().sum(0).max()
        if other is None:
            assert ((u.double() * s.double()).sum(0) - contributions[key]).abs().max() < 1e-5 * largest, key
    # Llama 4's experts can't be watched in the plain model: the contributions have to do for them.
    found = {key: value for key, value in found.items() if key in expected or "llama4" not in folder.name}
    assert found.keys() == expected.keys()
    errors = [abs(our_loss - loss) / loss]
    errors += [relative_error(a, b) for a, b in zip(our_inputs, inputs, strict=True)]
    errors += [relative_error(found[key][part], expected[key][part]) for key in found for part in (0, 1)]
    return max(errors)


@pytest.mark.parametrize("variant", [*CONFIGS, *INDEX_ONLY])
def test_gradients_equal_full_autograd(variant: str, save_tiny: Callable[..., Path]) -> None:
    assert worst_error(save_tiny(variant, shard="20KB", name=variant)) < 1e-6


@pytest.mark.parametrize("variant", ["llama", "gpt2", "deepseek_v3"])
def test_comparison_would_notice_one_layer_off_by_a_percent(
    variant: str, save_tiny: Callable[..., Path]
) -> None:
    folder = save_tiny(variant)
    model = AutoModelForCausalLM.from_pretrained(folder)
    layers = model.get_submodule(MetaModel(Checkpoint.open(folder), torch.float32).layers_path)
    for parameter in layers[3].parameters():
        parameter.data *= 1.01
    shutil.copytree(folder, folder.parent / "off")
    model.save_pretrained(folder.parent / "off")
    assert worst_error(folder, folder.parent / "off") > 1e-3


@pytest.mark.parametrize("variant", CONFIGS)
def test_cut_loads_cleanly_and_equals_masking(
    variant: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny(variant, shard="20KB")
    surgeon("index", str(source), "--out", "index", *CALIBRATION)
    options = [
        "--sparsity",
        "0.5",
        "--multiple-of",
        "8",
        "--out",
        "cut",
        "--index",
        "index",
        "--repair",
        "none",
    ]
    surgeon("prune", str(source), *options)
    cut = source.parent / "cut"
    model, info = AutoModelForCausalLM.from_pretrained(cut, output_loading_info=True)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    manifest = json.loads((cut / "surgeon.json").read_text())
    for key, change in manifest["plan"]["widths"].items():
        assert getattr(model.config.get_text_config(), key) == change["after"] < change["before"]
    meta_model = MetaModel(Checkpoint.open(source), torch.float32)
    masked = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    mask(masked, meta_model.family.sites, meta_model.layers_path, kept_channels(manifest))
    with torch.no_grad():
        difference = model.eval()(IDS, use_cache=False).logits - masked(IDS, use_cache=False).logits
    assert difference.abs().max() < 1e-4
    assert model.generate(IDS[:1], max_new_tokens=4, do_sample=False).shape[1] > IDS.shape[1]


# Their configs round the width, so that a step of eight may change nothing.
ROUNDED = {"lfm2"}


@pytest.mark.parametrize("variant", [name for name in CONFIGS if name not in ROUNDED])
def test_the_table_says_what_the_models_shapes_say(variant: str, save_tiny: Callable[..., Path]) -> None:
    meta_model = MetaModel(Checkpoint.open(save_tiny(variant)), torch.float32)
    assert not meta_model.inferred

    def build(config: Any) -> Any:
        return build_model(config, torch.float32, variant)

    inferred = infer_family(meta_model.config, meta_model.model, meta_model.layers_path, build, variant)

    def facts(sites: Any) -> set[Any]:
        return {
            (frozenset(s.in_projections), s.down, s.width_key, s.kind == "experts", s.fused) for s in sites
        }

    assert facts(inferred.sites) == facts(ffn.site for ffns in meta_model.ffns for ffn in ffns)


class UnseenConfig(LlamaConfig):
    model_type = "unseen_llama"


class UnseenForCausalLM(LlamaForCausalLM):
    config_class = UnseenConfig


class UnseenFusedConfig(Phi3Config):
    model_type = "unseen_phi"


class UnseenFusedForCausalLM(Phi3ForCausalLM):
    config_class = UnseenFusedConfig


@pytest.mark.parametrize(
    ("config_class", "model_class", "like"),
    [(UnseenConfig, UnseenForCausalLM, "llama"), (UnseenFusedConfig, UnseenFusedForCausalLM, "phi3")],
)
def test_a_family_nobody_wrote_an_entry_for(
    config_class: Any, model_class: Any, like: str, tmp_path: Path, surgeon: Callable[..., Any]
) -> None:
    name = config_class.model_type
    AutoConfig.register(name, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    assert name not in FAMILIES
    known = tiny_model(like)
    config = config_class(**{k: v for k, v in known.config.to_dict().items() if k != "model_type"})
    model = model_class(config).eval()
    model.load_state_dict(known.state_dict())
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    shown = surgeon("index", str(folder), "--dry-run", *CALIBRATION).output
    assert "inferred from the model's shapes" in shown and "intermediate_size" in shown
    surgeon("prune", str(folder), "--sparsity", "0.5", "--multiple-of", "8", "--out", "cut", *CALIBRATION)
    cut, info = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert type(cut) is model_class and cut.config.intermediate_size == 24
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert worst_error(folder) < 1e-6


def test_statistics_of_experts_are_over_all_tokens(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("mixtral")
    surgeon("index", str(source), "--out", "index", *CALIBRATION)
    index = ChannelIndex.load(source.parent / "index")
    meta_model = MetaModel(Checkpoint.open(source), torch.float32)
    global IDS
    kept, IDS = IDS, index.input_ids.long()
    try:
        _, _, expected, _ = full_autograd(source, meta_model.family.sites, meta_model.layers_path)
    finally:
        IDS = kept
    for (layer, unit), (u, s) in expected.items():
        q = u.double() * s.double()
        ffn = index.layers[layer].ffns[unit]
        assert ffn.tokens == len(u)
        assert (
            relative_error(ffn.statistics["loss_proxy"], q.square().sum(0) / 2 / index.input_ids.numel())
            < 1e-5
        )
        assert relative_error(ffn.statistics["taylor"], q.abs().sum(0) / index.input_ids.numel()) < 1e-5
    routed = sum(expert.tokens for expert in index.layers[0].experts)
    assert routed == 2 * index.input_ids.numel()


def test_an_expert_no_token_reaches_is_reported_and_not_ranked_by_nothing(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("mixtral", num_experts_per_tok=1)
    model = AutoModelForCausalLM.from_pretrained(source)
    router = model.model.layers[2].mlp.gate.weight.data
    router[2:] = 0
    router[0] = -router[1]  # one of the two is positive, so the others never win
    model.save_pretrained(source)
    shown = surgeon("index", str(source), "--out", "index", *CALIBRATION).output
    fields = json.loads((source.parent / "index" / "index.json").read_text())
    tokens = fields["layers"][2]["expert_tokens"]
    assert tokens[2:] == [0, 0] and min(tokens[:2]) > 0
    silent = 2
    assert "experts saw no calibration token" in shown
    flat = fields["layers"][2]["supernodes"]
    assert not any(place // fields["layers"][2]["width"] == silent for place in flat)
    options = ["--sparsity", "0.5", "--multiple-of", "8", "--out", "cut"]
    printed = surgeon("prune", str(source), "--index", "index", *options).output
    assert "ranked by weight magnitude" in printed
    plan = json.loads((source.parent / "cut" / "surgeon.json").read_text())["plan"]
    assert plan["layers"][2]["ffns"][f"expert.{silent}"]["ranked_by"] == "magnitude"
    assert plan["layers"][0]["ffns"]["expert.0"]["ranked_by"] == "lp-hybrid"


def test_removing_an_experts_silent_channels_changes_nothing(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("qwen2_moe")
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    meta_model = MetaModel(Checkpoint.open(source), torch.float32)
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        for ffn in find_ffns(meta_model.family.sites, layer):
            silent = torch.randperm(ffn.width, generator=generator)[: ffn.width // 2]
            ffn.down_weight()[:, silent] = 0
    model.save_pretrained(source)
    surgeon("prune", str(source), "--sparsity", "0.5", "--multiple-of", "4", "--out", "cut", *CALIBRATION)
    cut = AutoModelForCausalLM.from_pretrained(source.parent / "cut").eval()
    with torch.no_grad():
        assert (cut(IDS).logits - model(IDS).logits).abs().max() < 1e-5
    for before, after in zip(model.model.layers[1:], cut.model.layers[1:], strict=True):
        assert torch.equal(before.mlp.gate.weight, after.mlp.gate.weight)
        assert torch.equal(before.mlp.shared_expert_gate.weight, after.mlp.shared_expert_gate.weight)
    assert cut.config.num_experts == 4 and cut.config.num_experts_per_tok == 2


def test_the_readme_lists_the_families_that_are_tested() -> None:
    assert len({CONFIGS[name].get("model_type", name) for name in CONFIGS}) >= 40
    assert readme_table() in (ROOT / "docs/models.md").read_text()
