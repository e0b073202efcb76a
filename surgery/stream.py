"""The streamed engine: forward and backward through a causal LM with one decoder layer's weights resident.

The model's own code runs everything. Embeddings, masks, rotary tables and per-layer arguments come from one call of
the model's `forward` in which every decoder layer returns its input unchanged and notes what it was called with;
norm, output head, soft-capping and scaling come from a second such call in which the first layer returns the hidden
states at hand. Between the two, each layer is called for all blocks before the next one is loaded.

Shape letters: N blocks, T tokens of a block, D hidden_size, F intermediate_size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from surgery.checkpoint import Checkpoint
from surgery.devices import default_memory
from surgery.errors import CalibrationError, UnsupportedModelError
from surgery.faults import at_layer
from surgery.ffn import Ffn
from surgery.heap import Heap
from surgery.skeleton import Assembly, Skeleton

LayerEdit = Callable[[int, nn.Module], None]


@dataclass(frozen=True)
class LayerCall:
    """The arguments one decoder layer is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _FirstLayerDone(Exception):
    """Carries the first layer's output out of the model's forward."""

    def __init__(self, output: Any) -> None:
        self.output = output


class StreamedModel:
    """A causal LM of which only the embeddings, the head and one decoder layer are in memory.

    `device` and `dtype` are what it computes on and in; tensors are cast after they reach the device. `edit`, when
    given, is called with (layer index, layer) each time a layer's weights have been put in: the place to mask
    channels or to set single weights without touching the checkpoint. `on_read` gets (stored name, tensor as stored)
    from the reader thread, each time one is read: a way to copy a checkpoint in the pass that runs it. `memory` is the
    budget in bytes (half of the machine's where not given), for what the C library may keep between layers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        edit: LayerEdit | None = None,
        on_read: Callable[[str, torch.Tensor], None] | None = None,
        memory: int | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.read: Callable[[str], torch.Tensor] = checkpoint.read
        self.heap = Heap(default_memory() if memory is None else memory)
        self.device = device
        self.dtype = dtype
        self.edit = edit
        self.on_read = on_read
        self.skeleton = Skeleton(checkpoint, dtype)
        self.model = self.skeleton.model
        self.layers = self.skeleton.layers
        self._side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._outside_users = 0
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self._returns_tuple: bool | None = None

    # -- weights ------------------------------------------------------------------------------------------------

    def _fetch(self, assemblies: list[Assembly]) -> tuple[dict[str, torch.Tensor], Any]:
        """Read stored tensors and start them on their way to the device; runs in the reader thread."""
        host: dict[str, torch.Tensor] = {}
        for assembly in assemblies:
            tensors = []
            for stored in assembly.stored:
                tensors.append(self.read(stored))
                if self.on_read is not None:
                    self.on_read(stored, tensors[-1])
            host |= self.skeleton.assemble(assembly, tensors)
            if assembly.converter is not None:  # what it was made of may be as much again as a layer
                del tensors
                self.heap.settle()
        dtypes = {target: self.skeleton.compute_dtype(target) for target in host}
        if self._side_stream is None:
            return {name: t.to(self.device, dtypes[name]) for name, t in host.items()}, None
        with torch.cuda.stream(self._side_stream):
            moved = {name: t.pin_memory().to(self.device, non_blocking=True) for name, t in host.items()}
            ready = {name: t.to(dtypes[name]) for name, t in moved.items()}
            event = torch.cuda.Event()
            event.record(self._side_stream)
        return ready, (event, host)

    def _arrived(self, fetched: tuple[dict[str, torch.Tensor], Any]) -> dict[str, torch.Tensor]:
        """Make the compute stream wait for tensors that `_fetch` started."""
        tensors, pending = fetched
        if pending is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(pending[0])
            for tensor in tensors.values():
                tensor.record_stream(stream)
        return tensors

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Hold the weights outside the layers (embeddings, final norm, head), which only the ends of a walk need."""
        if self._outside_users == 0:
            self.skeleton.fill(self._arrived(self._fetch(self.skeleton.outside)))
            self.skeleton.tie()
        self._outside_users += 1
        try:
            yield
        finally:
            self._outside_users -= 1
            if self._outside_users == 0:
                self.skeleton.drop(self.skeleton.outside)

    def walk(self, order: Iterable[int], edited: bool = True) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index, layer) in `order`, each with its weights in memory, reading the next one meanwhile.

        Layers are as the checkpoint has them where `edited` is false.
        """
        queue = list(order)
        with ThreadPoolExecutor(1, thread_name_prefix="surgeon-reader") as pool:
            ahead: Future[Any] | None = (
                pool.submit(self._fetch, self.skeleton.inside[queue[0]]) if queue else None
            )
            for position, number in enumerate(queue):
                assert ahead is not None
                with at_layer(number):
                    tensors = self._arrived(ahead.result())
                following = queue[position + 1 : position + 2]
                ahead = pool.submit(self._fetch, self.skeleton.inside[following[0]]) if following else None
                self.skeleton.fill(tensors)
                del tensors
                layer = self.layers[number]
                try:
                    if self.edit is not None and edited:
                        self.edit(number, layer)
                    yield number, layer
                finally:
                    self.skeleton.drop(self.skeleton.inside[number])
                    self.heap.settle()

    # -- what the model does around its layers --------------------------------------------------------------------

    def capture(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[LayerCall]]:
        """Hidden states [n, T, D] that enter the first layer for token ids [n, T], and every layer's arguments."""
        entering: list[torch.Tensor] = []
        calls: list[LayerCall] = []

        def record(
            _: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> torch.Tensor:
            if not entering:
                entering.append(hidden)
            calls.append(LayerCall(args, kwargs))
            return hidden

        with torch.no_grad(), self.outside():
            self._bypass(ids, record, logits=False)
        if len(calls) != len(self.layers):
            raise UnsupportedModelError(
                "the model does not call each decoder layer once",
                where=self.checkpoint.name,
                expected=f"{len(self.layers)} calls",
                found=str(len(calls)),
            )
        return entering[0], calls

    def ffns(self, number: int) -> list[Ffn]:
        """The FFNs of decoder layer `number`."""
        return self.skeleton.ffns[number]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits [n, V] of hidden states [n, D] that left the last layer; call it inside `outside`."""
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=self.device)
        output = self._bypass(ids, lambda i, h, *_: hidden[None] if i == 0 else h, logits=True)
        logits: torch.Tensor = output.logits.squeeze(0)
        return logits

    def _bypass(self, ids: torch.Tensor, replace: Callable[..., torch.Tensor], logits: bool) -> Any:
        """Call the model with `replace(index, hidden, args, kwargs)` in the place of every decoder layer."""
        tuples = self._layers_return_tuples()

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                output = replace(index, hidden, args, kwargs)
                return (output,) if tuples else output

            return forward

        for index, layer in enumerate(self.layers):
            layer.forward = stand_in(index)
        try:
            module = self.model if logits else self.model.base_model
            return module(input_ids=ids.to(self.device), use_cache=False)
        except IndexError as error:
            raise CalibrationError(
                "a block is longer than the model has positions for, or holds ids outside its vocabulary",
                where=self.checkpoint.name,
                found=f"blocks of {ids.shape[1]} tokens",
                next_step="use a smaller --block-size, and the model's own tokenizer",
            ) from error
        finally:
            for layer in self.layers:
                del layer.forward

    def _layers_return_tuples(self) -> bool:
        """Whether a decoder layer returns a tuple; seen once, by running the first layer on two tokens.

        On the meta device, where no weight is needed; a layer that can't run there has its weights read.
        """
        if self._returns_tuple is None:
            try:
                self._returns_tuple = self._first_layer_returns_tuple(self.layers[0], meta=True)
            except (RuntimeError, NotImplementedError, ValueError):
                for _, layer in self.walk([0], edited=False):
                    self._returns_tuple = self._first_layer_returns_tuple(layer, meta=False)
        assert self._returns_tuple is not None
        return self._returns_tuple

    def _first_layer_returns_tuple(self, layer: nn.Module, meta: bool) -> bool:
        real = layer.forward

        def stop(*args: Any, **kwargs: Any) -> Any:
            if meta:
                args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
            raise _FirstLayerDone(real(*args, **kwargs))

        layer.forward = stop
        buffers = {name: buffer for name, buffer in layer.named_buffers() if meta}
        for name, buffer in buffers.items():
            _set_buffer(layer, name, buffer.to("meta"))
        try:
            ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
            with torch.no_grad(), self.outside():
                self.model.base_model(input_ids=ids, use_cache=False)
        except _FirstLayerDone as done:
            return isinstance(done.output, tuple)
        finally:
            del layer.forward
            for name, buffer in buffers.items():
                _set_buffer(layer, name, buffer)
        raise AssertionError("the model never called its first layer")

    def run_layer(self, layer: nn.Module, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Output hidden states of a resident layer."""
        output = layer(hidden, *call.args, **call.kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result


def _set_buffer(module: nn.Module, name: str, buffer: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._buffers[leaf] = buffer
