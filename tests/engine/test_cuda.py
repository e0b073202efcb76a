"""What a GPU computes, against what the CPU computes: skipped where there is none."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION, opened
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from surgery.engine.loss import next_token_loss
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.index.statistics import ChannelStatistics

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device here: this shows that a GPU computes what the CPU does",
)
FLOAT32 = ["--dtype", "float32"]
NOISE = {
    "halo_redundancy_published"
}  # its 1e-8 inside the root makes rounding all there is at these gradients


def both(surgeon: Callable[..., Any], *command: str) -> None:
    """Run a command whose destination ends in DEVICE on each device."""
    for device in ("cpu", "cuda"):
        surgeon(*(part.replace("DEVICE", device) for part in command), "--device", device, *FLOAT32)


def worst(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "deepseek_v3"])
def test_an_index_is_the_same(
    family: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny(family)
    both(surgeon, "index", str(source), "--out", "index-DEVICE", "--second-order", *CALIBRATION)
    found, expected = (load_file(source.parent / f"index-{d}" / "index.safetensors") for d in ("cuda", "cpu"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point() and name.rpartition(".")[2] not in NOISE:
            limit = 1e-2 if "obs" in name or "unexplained" in name else 1e-4
            assert worst(found[name], value) < limit, name


@pytest.mark.parametrize("repair", ["none", "bias", "lstsq", "lstsq-acc"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_a_cut_is_the_same(
    family: str, repair: str, save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny(family)
    surgeon("index", str(source), "--out", "index", "--device", "cpu", *FLOAT32, *CALIBRATION)
    how = ["--index", "index", "--sparsity", "0.5", "--multiple-of", "8", "--repair", repair]
    both(surgeon, "prune", str(source), *how, "--out", "cut-DEVICE")
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = {}
    for device in ("cpu", "cuda"):
        with torch.no_grad():
            logits[device] = AutoModelForCausalLM.from_pretrained(source.parent / f"cut-{device}")(ids).logits
    assert worst(logits["cuda"], logits["cpu"]) < (1e-6 if repair == "none" else 1e-2)


def test_every_measuring_command_runs(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    source = save_tiny("llama")
    surgeon("index", str(source), "--out", "index", "--device", "cpu", *FLOAT32, *CALIBRATION)
    text = ["--text", "text.txt", "--text-blocks", "2"]
    cuts = [
        "--cut",
        "scar-prot:lstsq-acc:global",
        "--cut",
        "flap:bias",
        "--sparsity",
        "0.5",
        "--multiple-of",
        "8",
    ]
    both(surgeon, "compare", str(source), "--index", "index", *text, *cuts, "--out", "compare-DEVICE")
    rows = [
        json.loads((source.parent / f"compare-{d}" / "compare.json").read_text())["rows"]
        for d in ("cpu", "cuda")
    ]
    for one, other in zip(*rows, strict=True):
        assert other["perplexity"] == pytest.approx(one["perplexity"], rel=1e-2)
    both(
        surgeon,
        "ablate",
        str(source),
        "--index",
        "index",
        "--conditions",
        "channels",
        *text,
        "--out",
        "ablate-DEVICE",
    )
    both(surgeon, "quantize", str(source), "--index", "index", "--group-size", "16", "--out", "q-DEVICE")


def lp(folder: Path, ids: torch.Tensor, step: int, **options: Any) -> list[torch.Tensor]:
    """Loss proxies from the engine on the GPU."""
    device = torch.device("cuda")
    model = StreamedModel(opened(folder, device=device))
    stream = TokenStream(model, ids, micro_batch=step, keep_inputs=True, **options)
    count = len(model.layers)
    for number, layer in model.stream_layers(range(count)):
        stream.forward(number, layer)
    next_token_loss(stream, with_gradient=True)
    found = []
    for number, layer in model.stream_layers(reversed(range(count))):
        sums = ChannelStatistics(layer.mlp.down_proj.in_features, *ids.shape, device)
        stream.backward(number, layer, lambda flow, sums=sums: sums.add(flow.first_block, flow.u, flow.s))
        found.append(sums.finish()["loss_proxy"])
    return found


def test_tiers_agree_to_the_bit(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_tiny("llama")
    ids = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(1))
    on_device = lp(folder, ids, 2)
    (tmp_path / "journal").mkdir()
    journalled = lp(folder, ids, 2, journal=tmp_path / "journal")
    pinned, spilled = (lp(folder, ids, 2, place=place) for place in ("memory", "disk"))
    for other in (journalled, pinned, spilled):
        assert all(torch.equal(a, b) for a, b in zip(on_device, other, strict=True))


@pytest.mark.parametrize("place", ["device", "memory"])
def test_nobody_waits_inside_the_loops(place: str, save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("llama")
    device = torch.device("cuda")
    waits = []
    for blocks in (4, 4, 16):  # the first time, libraries are still being started
        ids = torch.randint(0, 256, (blocks, 24), generator=torch.Generator().manual_seed(1))
        model = StreamedModel(opened(folder, device=device))
        stream = TokenStream(model, ids, micro_batch=2, keep_inputs=True, place=place)
        sums = ChannelStatistics(48, *ids.shape, device)
        seen: list[Any] = []
        for number, layer in model.stream_layers([0, 1]):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    stream.forward(number, layer)
                    if number == 1:
                        stream.backward(number, layer, lambda f: sums.add(f.first_block, f.u, f.s))  # noqa: B023
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                seen += [str(w.message) for w in caught if "synchroniz" in str(w.message)]
        waits.append(len(seen))
    assert waits[1] == waits[2] <= 2, waits  # once a layer, to see whether its output is finite
