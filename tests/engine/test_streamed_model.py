"""The streamed engine against plain full-model autograd, written separately."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import REAL_TEXT, opened
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.engine.loss import next_token_loss
from surgery.engine.selective_recompute import EXPENSIVE_COLUMNS
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.errors import NumericsError
from surgery.index.statistics import ChannelStatistics

CPU = torch.device("cpu")


def autograd_reference(folder: Path, ids: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Loss, FFN activations and their gradients, and layer-input gradients, from the whole model at once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    inner = model.model
    activations, inputs = [], []

    def keep(into: list[torch.Tensor]) -> Callable[..., None]:
        def hook(_: Any, args: tuple[torch.Tensor, ...], __: Any = None) -> None:
            args[0].retain_grad()
            into.append(args[0])

        return hook

    inner.embed_tokens.register_forward_hook(lambda _, __, out: out.requires_grad_(True))
    for layer in inner.layers:
        layer.register_forward_pre_hook(keep(inputs))
        layer.mlp.down_proj.register_forward_pre_hook(keep(activations))
    logits = model(ids, use_cache=False).logits
    loss = functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1), reduction="sum"
    )
    loss.backward()
    statistics = []
    for u in activations:
        q = u.detach().double() * u.grad.double()
        flat = (0, 1)
        statistics.append(
            {
                "loss_proxy": q.square().mean(flat) / 2,
                "curvature": u.grad.double().square().mean(flat),
                "activation_power": u.detach().double().square().mean(flat),
                "taylor": q.abs().mean(flat),
                "mean": u.detach().double().mean(flat),
                "max_abs": u.detach().double().abs().amax(flat),
            }
        )
    return {"loss": loss.item(), "statistics": statistics, "inputs": [h.grad for h in inputs]}


def streamed(folder: Path, ids: torch.Tensor, dtype: torch.dtype, **stream_options: Any) -> dict[str, Any]:
    """The same from the engine."""
    model = StreamedModel(opened(folder, dtype))
    stream = TokenStream(model, ids, **{"micro_batch": 2, "keep_inputs": True, **stream_options})
    count = len(model.layers)
    for number, layer in model.stream_layers(range(count)):
        stream.forward(number, layer)
    loss = next_token_loss(stream, with_gradient=True).sum().item()
    statistics: list[dict[str, torch.Tensor]] = [{}] * count
    inputs: list[torch.Tensor] = [torch.empty(0)] * count
    for number, layer in model.stream_layers(reversed(range(count))):
        sums = ChannelStatistics(layer.mlp.down_proj.in_features, *ids.shape, CPU)
        stream.backward(number, layer, lambda flow, sums=sums: sums.add(flow.first_block, flow.u, flow.s))
        statistics[number] = sums.finish()
        inputs[number] = stream.store.get(number, slice(0, len(ids)), CPU)
    assert all(parameter.is_meta for parameter in model.layers.parameters()), "a layer stayed in memory"
    return {"loss": loss, "statistics": statistics, "inputs": inputs}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_statistics_equal_full_autograd(family: str, save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny(family, shard="20KB")
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(1))
    expected, found = autograd_reference(folder, ids, torch.float32), streamed(folder, ids, torch.float32)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for layer, (ours, theirs) in enumerate(zip(found["statistics"], expected["statistics"], strict=True)):
        for name, value in theirs.items():
            assert relative_error(ours[name], value) < 1e-5, (layer, name)
    for layer, (ours, theirs) in enumerate(zip(found["inputs"], expected["inputs"], strict=True)):
        assert relative_error(ours, theirs) < 1e-5, layer


def test_spilled_hidden_states_change_nothing(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("qwen2")
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(1))
    kept, spilled = (streamed(folder, ids, torch.float32, place=place) for place in ("memory", "disk"))
    for ours, theirs in zip(spilled["statistics"], kept["statistics"], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def layer_bytes(folder: Path, ids: torch.Tensor) -> int:
    """What keeping one layer of a tiny model takes, as the engine counts it."""
    model = StreamedModel(opened(folder))
    stream = TokenStream(model, ids, micro_batch=2, keep_inputs=True, cache_bytes=1)
    for number, layer in model.stream_layers([0]):
        stream.forward(number, layer)
    return stream.cache.largest


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("layers", [1, 3, 100])
@pytest.mark.parametrize("expensive", [0, 40, 1024])
def test_kept_activations_change_nothing(
    expensive: int, layers: int, family: str, save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPENSIVE_COLUMNS, "cpu", expensive)
    folder = save_tiny(family)
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(1))
    kept = kept_layers(folder, ids, int((layers + 0.5) * layer_bytes(folder, ids)))
    assert kept == list(range(6))[-min(layers, 6) :]


def test_what_a_layer_overwrites_is_computed_again(
    save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPENSIVE_COLUMNS, "cpu", 0)
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(1))
    taken = []
    for changes in ({"clip_qkv": 0.02}, {}):
        folder = save_tiny("olmo", **changes)
        assert kept_layers(folder, ids, 1 << 30) == list(range(6))
        taken.append(layer_bytes(folder, ids))
    # queries, keys and values in float32; the second micro-batch is counted like the first, of two blocks
    assert taken[1] - taken[0] == 2 * 48 * (32 + 16 + 16) * 4


def test_a_layer_larger_than_the_first_stays_within_the_budget(
    save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPENSIVE_COLUMNS, "cpu", 0)
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(1))
    folder = save_tiny("deepseek_v3")  # dense first, then experts
    for layers in (1, 2, 5):
        held = kept_layers(folder, ids, layers * layer_bytes(folder, ids))  # sees that no more is taken
        assert 1 <= len(held) <= layers


def kept_layers(folder: Path, ids: torch.Tensor, budget: int) -> list[int]:
    """Layers of which a budget caches something; gradients are checked to be those without a cache."""
    model = StreamedModel(opened(folder))
    streams = [
        TokenStream(model, ids, micro_batch=2, keep_inputs=True, cache_bytes=spent) for spent in (0, budget)
    ]
    count = len(model.layers)
    for number, layer in model.stream_layers(range(count)):
        for stream in streams:
            stream.forward(number, layer)
    kept = streams[1].cache
    held = sorted(kept.results)
    assert kept.left >= 0
    assert torch.equal(*(next_token_loss(stream, with_gradient=True) for stream in streams))
    for number, layer in model.stream_layers(reversed(range(count))):
        seen: list[list[Any]] = [[], []]
        for stream, into in zip(streams, seen, strict=True):
            stream.backward(number, layer, into.append)
        for one, other in zip(*seen, strict=True):
            assert one.ffn == other.ffn and torch.equal(one.u, other.u) and torch.equal(one.s, other.s)
    assert not kept.results
    assert torch.equal(*(stream.store.get(0, slice(0, 3), CPU) for stream in streams))
    return held


def test_nan_is_named_with_its_layer(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(NumericsError, match="layer 2"):
        streamed(folder, torch.zeros(1, 8, dtype=torch.long), torch.float32)


@pytest.mark.real
def test_statistics_equal_full_autograd_on_smollm2(real_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    ids = torch.tensor(tokenizer(REAL_TEXT.read_text()[:4000])["input_ids"][: 2 * 128]).view(2, 128)
    expected, found = (
        autograd_reference(real_model, ids, torch.float32),
        streamed(real_model, ids, torch.float32),
    )
    for layer, (ours, theirs) in enumerate(zip(found["statistics"], expected["statistics"], strict=True)):
        for name in ("loss_proxy", "curvature", "taylor", "mean"):
            assert relative_error(ours[name], theirs[name]) < 1e-4, (layer, name)


def test_layers_that_stay_in_memory_are_read_once(save_tiny: Callable[..., Path]) -> None:
    model = opened(save_tiny("llama"))
    layer = sum(
        model.checkpoint.tensors[n].nbytes for p in model.meta_model.layer_parameters[0] for n in p.stored
    )
    streamed = StreamedModel(model, keep_bytes=2 * layer)
    count, reads = len(streamed.layers), []
    streamed.read = lambda name: reads.append(name) or model.checkpoint.read(name)  # type: ignore[func-returns-value]
    values = []
    for _ in range(2):
        values.append([])
        for _, resident in streamed.stream_layers(range(count)):
            values[-1].append([parameter.clone() for parameter in resident.parameters()])
    assert sorted(streamed.kept) == [0, 1]
    per_layer = len(model.meta_model.layer_parameters[0])
    assert len(reads) == per_layer * (count + count - 2)
    for first, second in zip(*values, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
