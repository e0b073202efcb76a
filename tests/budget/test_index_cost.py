"""What an index is said to take, against what it takes; and budgets that are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION, opened
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import AutoModelForCausalLM

from surgery.budget import budget
from surgery.budget.index_cost import index_cost
from surgery.budget.model_size import ModelSize
from surgery.checkpoint.reader import Checkpoint
from surgery.engine.loss import next_token_loss
from surgery.engine.malloc import SHARE
from surgery.engine.run_options import RunOptions
from surgery.engine.selective_recompute import EXPENSIVE_COLUMNS
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.errors import MemoryBudgetError
from surgery.model.meta_model import MetaModel

CPU = torch.device("cpu")
WIDE = {"hidden_size": 64, "intermediate_size": 256}
PLENTY = 1 << 40


def options(memory: int, dtype: torch.dtype = torch.float32) -> RunOptions:
    return RunOptions(CPU, dtype, memory)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi3", "mixtral", "gpt2", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expensive", [0, 40, 100, 1024])
def test_what_is_saved_and_kept_is_estimated(
    expensive: int,
    dtype: torch.dtype,
    family: str,
    save_tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(EXPENSIVE_COLUMNS, "cpu", expensive)
    folder = save_tiny(family, **({} if family in ("gpt2", "deepseek_v3") else WIDE))
    model = StreamedModel(opened(folder, dtype))
    ids = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(1))
    stream = TokenStream(model, ids, micro_batch=2, keep_inputs=True)
    saved = kept = 0
    for number, layer in model.stream_layers(range(len(model.layers))):
        parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        storages: dict[int, int] = {}

        def note(tensor: torch.Tensor, into: dict[int, int] = storages) -> torch.Tensor:
            into[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            held = stream._forward_with_graph(number, layer, 0)
        saved = max(saved, sum(n for place, n in storages.items() if place not in parameters))
        _, results = stream._forward_saving(number, layer, 0)
        kept = max(kept, results.nbytes)
        del held
        stream.forward(number, layer)
    sizes = ModelSize.of(model.meta_model, dtype, 64)
    assert saved <= sizes.saved_token * ids.numel() <= 4 * saved
    assert kept <= sizes.kept_token * ids.numel() <= 2 * kept


def test_experts_stored_one_by_one_are_counted_while_they_are_merged(save_tiny: Callable[..., Path]) -> None:
    gates = {  # bytes that are stacked, gates and ups apart, before both are joined
        "mixtral": 2 * 4 * (2 * 48 * 32) * 4,
        "llama": 0,
        "gpt_oss": 0,  # stored as it is held
    }
    for family, nbytes in gates.items():
        checkpoint = Checkpoint.open(save_tiny(family))
        sizes = ModelSize.of(MetaModel(checkpoint, torch.float32), torch.float32, 64)
        assert sizes.merging == nbytes, family
        apart = any("experts.0." in name for name in checkpoint.tensors)
        assert apart == (nbytes > 0)


def test_nothing_is_cached_where_nothing_is_expensive(save_tiny: Callable[..., Path]) -> None:
    costs = index_cost(MetaModel(Checkpoint.open(save_tiny("gemma2")), torch.float32), 2, 64, options(PLENTY))
    assert costs.cached_layers == 0


def test_operations_are_those_of_autograd(
    save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPENSIVE_COLUMNS, "cpu", 0)  # all is kept
    folder = save_tiny("llama", **WIDE)
    costs = index_cost(MetaModel(Checkpoint.open(folder), torch.float32), 2, 64, options(PLENTY))
    assert costs.cached_layers == 6
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    model.model.embed_tokens.register_forward_hook(lambda _, __, out: out.requires_grad_(True))
    ids = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.sum().backward()
    assert costs.flops == pytest.approx(counter.get_total_flops(), rel=0.1)


ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)


class Operations(TorchDispatchMode):
    """Counts multiplications and additions, by PyTorch's own formulas; its counter can't watch
    `autograd.grad`.
    """

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        self.count += formula(*args, **(kwargs or {}), out_val=result) if formula else 0
        for share, operation in enumerate(ATTENTION, start=1):
            if func is operation:  # none is registered; half of either product is masked
                queries = args[share - 1]
                self.count += share * 2 * queries.numel() * queries.shape[-2]
        return result


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("expensive", [0, 40, 100, 1024])
def test_operations_are_those_of_the_engine(
    expensive: int, family: str, save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPENSIVE_COLUMNS, "cpu", expensive)
    folder = save_tiny(family, **({} if family == "gpt2" else WIDE))
    model = StreamedModel(opened(folder))
    ids = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(1))
    spent = {}
    for cached in (0, PLENTY):
        stream = TokenStream(model, ids, micro_batch=2, keep_inputs=True, cache_bytes=cached)
        if cached:
            stream.cache.plan(1)  # which would be seen by trying one
        count = len(model.layers)
        with Operations() as counter:
            for number, layer in model.stream_layers(range(count)):
                stream.forward(number, layer)
            next_token_loss(stream, with_gradient=True)
            for number, layer in model.stream_layers(reversed(range(count))):
                stream.backward(number, layer, lambda _: None)
        spent[cached] = counter.count
    costs = index_cost(model.meta_model, 2, 64, options(PLENTY))
    assert costs.cached_layers == 6
    assert costs.flops == pytest.approx(spent[PLENTY], rel=0.1)
    assert spent[PLENTY] < spent[0]  # attention, if nothing else


def test_less_memory_keeps_less_and_the_least_is_named(save_tiny: Callable[..., Path]) -> None:
    meta_model = MetaModel(Checkpoint.open(save_tiny("llama", **WIDE)), torch.float32)
    plenty = index_cost(meta_model, 64, 64, options(PLENTY))
    smallest = plenty.smallest_bytes
    most = plenty.host_bytes * SHARE // (SHARE - 1) + 1
    scale = [smallest + step * (most - smallest) // 8 for step in range(9)]
    found = [index_cost(meta_model, 64, 64, options(memory)) for memory in scale]
    for memory, costs in zip(scale, found, strict=True):
        assert costs.host_bytes <= memory
    assert [c.hidden_on for c in (found[0], found[-1])] == ["disk", "memory"]
    assert found[0].micro_batch < found[-1].micro_batch == plenty.micro_batch
    assert found[0].cached_layers < found[-1].cached_layers == 6
    assert found[0].flops > found[-1].flops and found[0].write_bytes == found[0].hidden_bytes
    with pytest.raises(MemoryBudgetError) as refused:
        index_cost(meta_model, 64, 64, options(smallest - 1))
    assert f"{-(-smallest // 2**20)}MiB" in refused.value.next_step


def test_a_budget_changes_nothing_but_where_things_are(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_tiny("llama")
    told = json.loads(surgeon("index", str(source), *CALIBRATION, "--dry-run", "--json").stdout)
    assert told["costs"]["cached_layers"] == 6 and told["costs"]["hidden_on"] == "memory"
    assert told["seconds"]["compute"] > 0 and told["machine"]["read_bytes_per_second"] > 0
    least = str(told["costs"]["smallest_bytes"])
    assert not (source.parent / "tiny-index").exists()
    for name, memory in (("plenty", []), ("little", ["--memory", least])):
        shown = surgeon("index", str(source), "--out", name, *CALIBRATION, *memory).stderr
        assert ("kept in memory" if name == "plenty" else "in a file on disk") in shown
    plenty, little = (load_file(source.parent / n / "index.safetensors") for n in ("plenty", "little"))
    assert all(torch.equal(plenty[name], little[name]) for name in plenty)
    refused = surgeon("index", str(source), "--out", "none", *CALIBRATION, "--memory", "1MiB", code=1)
    assert "--memory" in refused.stderr and "at least" in refused.stderr


def test_a_gpu_holds_what_fits_there_and_the_host_the_rest(
    save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    meta_model = MetaModel(Checkpoint.open(save_tiny("llama", **WIDE)), torch.float32)
    gpu = RunOptions(torch.device("cuda"), torch.float32, PLENTY)
    free = 0
    monkeypatch.setattr(budget, "free_device_bytes", lambda _: free)
    free = PLENTY
    roomy = index_cost(meta_model, 64, 64, gpu)
    assert roomy.hidden_on == "device" and roomy.cached_layers == 6
    assert roomy.device_bytes > roomy.hidden_bytes > roomy.host_bytes
    free = roomy.device_bytes - roomy.hidden_bytes - 6 * roomy.hidden_bytes // 7
    tight = index_cost(meta_model, 64, 64, gpu)
    assert tight.device_bytes <= free and tight.flops >= roomy.flops
    free = index_cost(meta_model, 64, 64, options(PLENTY)).smallest_bytes
    least = index_cost(meta_model, 64, 64, gpu)
    assert least.hidden_on == "memory" and least.host_bytes > least.hidden_bytes and least.cached_layers == 0
    little = RunOptions(torch.device("cuda"), torch.float32, least.hidden_bytes - 1)
    assert index_cost(meta_model, 64, 64, little).hidden_on == "disk"
    free -= 1
    with pytest.raises(MemoryBudgetError, match="cuda memory"):
        index_cost(meta_model, 64, 64, gpu)
