"""Where tensors are, proved without an accelerator: the meta device stands in for one.

An operation that mixes it with the host raises, and so does anything that needs a value from it, as
`float(x)`, `if x` or `x.cpu()` do, for which a host would have to wait. Streams and events are replaced by
ones that write down what is asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import opened
from transformers import masking_utils

from surgery.engine import token_stream as tokens
from surgery.engine.loss import _block_loss
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import FfnActivations, TokenStream
from surgery.index.second_order import SecondOrder
from surgery.index.statistics import ChannelStatistics
from surgery.model.ffn import Ffn
from surgery.repair.least_squares import SplitMoments, inverse_power

DEVICE = torch.device("meta")


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The one wait a layer is allowed is counted."""
    waits: list[int] = []
    # before the layers run, arguments are compared to keep equal ones once,
    monkeypatch.setattr(tokens._SharedArguments, "intern", lambda _, call: call)
    # and transformers looks at position ids for packed sequences, which there are none of
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
    monkeypatch.setattr(tokens, "check_finite", lambda _, number: waits.append(number))
    return waits


def run(folder: Path, observe: Callable[[FfnActivations], None], **options: Any) -> TokenStream:
    """Forward, head and backward with every tensor on the stand-in."""
    model = StreamedModel(opened(folder, device=DEVICE))
    ids = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(1))
    stream = TokenStream(model, ids, micro_batch=2, keep_inputs=True, **options)
    count = len(model.layers)
    for number, layer in model.stream_layers(range(count)):
        stream.forward(number, layer)
    with model.other_weights():
        assert all(_block_loss(stream, block, with_gradient=True).device == DEVICE for block in range(4))
    for number, layer in model.stream_layers(reversed(range(count))):
        assert all(p.device == DEVICE for p in layer.parameters())
        stream.backward(number, layer, observe)
    return stream


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi3"])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 40])
def test_the_loops_stay_on_the_device(
    cache_bytes: int, family: str, save_tiny: Callable[..., Path], on_device: list[int]
) -> None:
    sums: list[ChannelStatistics] = []

    def observe(flow: FfnActivations) -> None:
        if flow.first_block == 0:
            sums.append(ChannelStatistics(flow.u.shape[-1], 4, 24, DEVICE))
        sums[-1].add(flow.first_block, flow.u, flow.s)

    stream = run(save_tiny(family), observe, cache_bytes=cache_bytes)
    assert on_device == list(range(6)), "one wait in a layer's forward pass, none in its backward pass"
    assert stream.store._data.device == DEVICE and len(sums) == 6
    assert all(total.device == DEVICE for one in sums for total in (one.sums, one.largest, one.sampled_q))


@pytest.mark.parametrize("mistake", ["asks for a value", "brings a host tensor"])
def test_a_mistake_in_the_loops_is_seen(
    mistake: str, save_tiny: Callable[..., Path], on_device: list[int]
) -> None:
    host = torch.ones(48)

    def observe(flow: FfnActivations) -> None:
        if mistake == "asks for a value":
            float(flow.u.sum())
        else:
            flow.u.add(host)

    with pytest.raises((RuntimeError, NotImplementedError)):
        run(save_tiny("llama"), observe)
    assert len(on_device) == 6, "the forward pass is not what fails"


def test_sums_of_a_repair_stay_on_the_device(save_tiny: Callable[..., Path]) -> None:
    model = StreamedModel(opened(save_tiny("llama"), device=DEVICE))
    moments = SplitMoments.zeros(32, 20, DEVICE, 3)
    for number, layer in model.stream_layers([0]):
        (ffn,) = model.ffns(number)
        u, y = torch.randn(2, 24, 48, device=DEVICE), torch.randn(2, 24, 32, device=DEVICE)
        kept = torch.arange(20, device=DEVICE)
        for start in (0, 4):  # all for training, all held out
            part = slice(start, start + 2)
            moments.add(part, u[..., kept], y, ffn.down_weight()[:, kept], inverse_power(y))
        more = SecondOrder([ffn], layer, DEVICE)
        more.add(FfnActivations("dense", 0, None, u, u, y))
        assert more.moments["dense"].plain.device == DEVICE
    assert all(
        total.device == DEVICE
        for one in (moments.train, moments.held_out)
        for total in (one.gram, one.cross, one.left)
    )


class Recorder:
    """Stands in for torch.cuda's streams and events, and writes down the order of what is asked of them."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.events = 0

    def stream(self) -> Any:
        recorder = self

        class Stream:
            def wait_event(self, event: Any) -> None:
                recorder.log.append(("wait", event.number))

        return Stream()

    def event(self) -> Any:
        recorder = self

        class Event:
            def __init__(self) -> None:
                recorder.events += 1
                self.number = recorder.events

            def record(self, _: Any) -> None:
                recorder.log.append(("copied", self.number))

        return Event()


def test_layers_wait_for_their_own_copy(
    save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, held, inside = Recorder(), set[int](), list[bool]()

    @contextlib.contextmanager
    def side(_: Any) -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "stream", side)
    monkeypatch.setattr(torch.cuda, "Event", recorder.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: recorder.stream())
    pinned: list[bool] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: (pinned.append(bool(inside)), self)[1])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, _: held.add(self.data_ptr()))
    model = StreamedModel(opened(save_tiny("llama")))
    model._side_stream = recorder.stream()
    for number, layer in model.stream_layers(range(6)):
        assert ("wait", number + 1) in recorder.log, "the layer is computed before its weights have come"
        assert recorder.log.index(("copied", number + 1)) < recorder.log.index(("wait", number + 1))
        assert {p.data_ptr() for p in layer.parameters()} <= held, "its memory may be given away while in use"
    assert pinned and all(pinned), "copies are from pinned memory, on the side stream"
    assert [number for kind, number in recorder.log if kind == "wait"] == [1, 2, 3, 4, 5, 6]


def test_ffns_know_their_channels_on_the_device(save_tiny: Callable[..., Path]) -> None:
    model = StreamedModel(opened(save_tiny("phi3"), device=DEVICE))
    for number, _ in model.stream_layers([0]):
        ffn: Ffn = model.ffns(number)[0]
        assert ffn.down_weight().device == DEVICE
        assert all(row is None or row.device == DEVICE for row in ffn.in_weights())
