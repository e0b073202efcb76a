"""Fewer experts against the whole mixture with the others' router logits at minus infinity."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.cuts import write
from helpers.tiny_models import CALIBRATION, byte_tokenizer, opened, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import surgery
from surgery.cut import layers
from surgery.cut.experts import check_count, check_experts, expert_counts, group_count, onto
from surgery.cut.groups import Cut
from surgery.cut.planned_model import check_planned
from surgery.errors import PlanError, UnsupportedModelError
from surgery.index.super_weights import SuperWeight
from surgery.model.routers import router_tensors
from surgery.plan.kind_plan import EXPERTS, KindPlan, layers_plan
from surgery.pruning.experts import expert_outputs_norms, plan_experts

E, KEEP = 6, 4
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(5))
ALL = {"num_experts": E, "num_local_experts": E}
CHANGES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": E},
    "qwen2_moe": {"num_experts": E},
    "qwen3_moe": {"num_experts": E, "norm_topk_prob": True},
    "deepseek_v3": {"n_routed_experts": E},
    "deepseek_v3-groups": {"n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    "gpt_oss": {"num_local_experts": E},
    "granitemoe": {"num_local_experts": E},
    "llama4_text": {"num_local_experts": E},
    "lfm2_moe": {"num_experts": E},
}


def saved(folder: Path, variant: str) -> Path:
    """A tiny mixture with its tokenizer, and biases of its routers that matter."""
    model = tiny_model(variant.partition("-")[0], num_hidden_layers=4, **_fitting(variant))
    for name, buffer in (*model.named_buffers(), *model.named_parameters()):
        if "correction_bias" in name or "expert_bias" in name:
            buffer.data.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(4))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _fitting(variant: str) -> dict[str, Any]:
    more = {"layer_types": ["conv", "full_attention"] * 2} if variant == "lfm2_moe" else {}
    return {**CHANGES[variant], **more}


def chosen(meta_model: Any) -> dict[tuple[int, str], torch.Tensor]:
    """Other experts in each layer, as many of each group."""
    kept, groups = {}, group_count(meta_model)
    for number, count in expert_counts(meta_model).items():
        generator = torch.Generator().manual_seed(number)
        size = count // groups
        parts = [
            torch.randperm(size, generator=generator)[: KEEP // groups] + g * size for g in range(groups)
        ]
        kept[number, EXPERTS] = torch.cat(parts).sort().values
    return kept


@contextmanager
def masked(
    model: Any, meta_model: Any, kept: dict[tuple[int, str], torch.Tensor], calls_at_least: int | None = None
) -> Iterator[None]:
    """Router logits of removed experts are minus infinity, scores that choose among them as low as can be."""
    removed: dict[int, torch.Tensor] = {}
    for (number, _), members in kept.items():
        layer = model.get_submodule(meta_model.layers_path)[number]
        for one in router_tensors(meta_model.layers[number], meta_model.ffns[number]):
            tensor = (
                layer.get_parameter(one.path)
                if one.logits
                else dict([*layer.named_buffers(), *layer.named_parameters()])[one.path]
            )
            gone = torch.ones(tensor.shape[one.axis], dtype=torch.bool)
            gone[members] = False
            if tensor.dim() == 2 and one.logits:
                removed[tensor.data_ptr()] = gone
            elif not one.logits:
                tensor.data[..., gone] = -1e9
    real, calls = nn.functional.linear, []

    def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        result = real(inputs, weight, bias)
        gone = removed.get(weight.data_ptr())
        calls.append(gone is not None)
        return result if gone is None else result.masked_fill(gone, float("-inf"))

    with mock.patch.object(nn.functional, "linear", linear):
        yield
    assert sum(calls) >= (len(kept) if calls_at_least is None else calls_at_least)


@pytest.mark.parametrize("variant", CHANGES)
def test_logits_are_those_of_the_masked_router(variant: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", variant)
    meta_model = opened(source).meta_model
    check_experts(meta_model)
    part = KindPlan("experts", chosen(meta_model))
    cut = onto(meta_model, Cut((), {}, {}, meta_model.checkpoint.config), part)
    check_planned(meta_model, cut)
    folder = tmp_path / "cut"
    write(source, cut, folder)
    whole = AutoModelForCausalLM.from_pretrained(source).eval()
    found, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        dense = whole(IDS).logits
        with masked(whole, meta_model, part.kept):
            expected = whole(IDS).logits
        logits = found.eval()(IDS).logits
    assert torch.allclose(logits, expected, atol=1e-4)
    assert not torch.allclose(logits, dense, atol=1e-2)
    assert found.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape[1] == IDS.shape[1] + 3


def test_experts_and_layers_go_together(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "mixtral")
    meta_model = opened(source).meta_model
    part = KindPlan("experts", chosen(meta_model))
    base = Cut((), {}, {}, meta_model.checkpoint.config)
    cut = onto(meta_model, layers.onto(meta_model, base, layers_plan(4, [1])), part)
    check_planned(meta_model, cut)
    write(source, cut, tmp_path / "cut")
    whole = AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad(), masked(whole, meta_model, part.kept, calls_at_least=3):
        del whole.model.layers[1]
        expected = whole(IDS, use_cache=False).logits
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()(IDS).logits
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_command_keeps_what_the_router_weighs_most(tmp_path: Path, surgeon: Callable[..., Any]) -> None:
    source = saved(tmp_path / "tiny", "mixtral")
    options = ["--sparsity", "0.5", "--multiple-of", "8", "--keep-experts", "4", "--out", "cut"]
    shown = surgeon("prune", str(source), *options, *CALIBRATION).stdout
    assert "Routed experts 6 → 4" in shown
    manifest = json.loads((tmp_path / "cut" / "surgeon.json").read_text())
    facts = manifest["plan"]["cuts"]["experts"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert model.config.num_local_experts == 4 and model.config.intermediate_size == 24
    assert manifest["measurements"]["verification"]["relative_difference"] < 1e-4
    for layer in facts["layers"].values():
        free = [expert for expert in range(E) if expert not in layer["protected"]]
        ranked = sorted(free, key=lambda expert: -layer["reap"][expert])
        assert sorted([*layer["protected"], *ranked[: 4 - len(layer["protected"])]]) == layer["kept"]
    # again by what the manifest says: the same command makes the same weights
    assert "--keep-experts 4" in manifest["command"]
    assert "Routed experts 6 → 4" in (tmp_path / "cut" / "README.md").read_text()


def test_reap_is_the_mean_weighted_norm_of_an_expert(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "mixtral")
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    found, tokens = expert_outputs_norms(surgery.open_model(source, dtype="float32"), IDS)
    with torch.no_grad():
        layer, entering = model.model.layers[1], []
        layer.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
        model(IDS)
        (hidden,) = entering
        position = model.model.rotary_emb(hidden, torch.arange(24)[None])
        causal = torch.full((24, 24), float("-inf")).triu(1)[None, None]
        after = (
            hidden
            + layer.self_attn(
                layer.input_layernorm(hidden), position_embeddings=position, attention_mask=causal
            )[0]
        )
        x = layer.post_attention_layernorm(after).view(-1, 32)
        weights = (x @ layer.mlp.gate.weight.T).softmax(-1)
        best, experts = weights.topk(2, -1)
        best /= best.sum(-1, keepdim=True)
        for expert in range(E):
            gate, up = (x @ layer.mlp.experts.gate_up_proj[expert].T).chunk(2, -1)
            y = (nn.functional.silu(gate) * up) @ layer.mlp.experts.down_proj[expert].T
            to_it = experts == expert
            norms = y.norm(dim=-1)[to_it.any(-1)] * (best * to_it).sum(-1)[to_it.any(-1)]
            assert int(tokens[1][expert]) == len(norms)
            assert float(found[1][expert]) == pytest.approx(
                float(norms.mean()) if len(norms) else 0, rel=1e-4
            )


def test_numbers_that_the_router_cannot_choose_from_are_refused(tmp_path: Path) -> None:
    groups = opened(saved(tmp_path / "groups", "deepseek_v3-groups")).meta_model
    for count in (2, 3, 5, 9):
        with pytest.raises(PlanError, match="multiples of the router's 2 groups"):
            check_count(groups, {count})
    check_count(groups, {4})
    mixtral = opened(saved(tmp_path / "mixtral", "mixtral"))
    with pytest.raises(PlanError, match="2 to 6"):
        check_count(mixtral.meta_model, {1})
    dense = tmp_path / "dense"
    tiny_model("llama").save_pretrained(dense)
    with pytest.raises(UnsupportedModelError, match="no routed experts"):
        check_experts(opened(dense).meta_model)


def test_experts_with_super_weights_stay_and_get_their_new_number(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "mixtral")
    (tmp_path / "text.txt").write_text("Some words that are calibrated on. " * 40)
    model = surgery.open_model(source, dtype="float32")
    index = surgery.build_index(model, text=str(tmp_path / "text.txt"), blocks=2, block_size=24)
    least = plan_experts(model, index, 4, protect=False).facts["layers"]["2"]["kept"]
    gone = next(expert for expert in range(E) if expert not in least)
    weight = model.meta_model.ffns[2][gone]
    down = AutoModelForCausalLM.from_pretrained(source).model.layers[2].mlp.experts.down_proj
    value = down[gone, 1, 3].item()
    index.super_weights[:] = [SuperWeight(2, 1, 3, value, 1.0, value, 1.0, 9.0, 1, 0, ffn=weight.name)]
    part = plan_experts(model, index, 4)
    kept = part.facts["layers"]["2"]["kept"]
    assert gone in kept and part.facts["layers"]["2"]["protected"] == [gone]
    plan = surgery.plan_pruning(model, index, sparsity=0.0, cuts=(part,))
    (moved,) = plan.super_weights
    assert moved["ffn"] == f"expert.{kept.index(gone)}" and moved["ffn_before"] == weight.name
    surgery.prune(model, index, replace(plan, repair="none"), tmp_path / "cut")  # finds it at its new place
    (found,) = json.loads((tmp_path / "cut" / "surgeon.json").read_text())["super_weights"]
    assert found["value_after"] == value
