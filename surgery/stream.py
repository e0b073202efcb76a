"""The streamed engine: forward and backward through a causal LM with one decoder layer's weights resident.

The model's own code runs everything. Embeddings, masks, rotary tables and per-layer arguments come from one call of
the model's `forward` in which every decoder layer returns its input unchanged and notes what it was called with;
norm, output head, soft-capping and scaling come from a second such call in which the first layer returns the hidden
states at hand. Between the two, each layer is called for all blocks before the next one is loaded.

Shape letters: N blocks, T tokens of a block, D hidden_size, F intermediate_size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from surgery.checkpoint import Checkpoint
from surgery.errors import NumericsError
from surgery.hidden import HiddenStore
from surgery.skeleton import Skeleton

LayerEdit = Callable[[int, nn.Module], None]
Observer = Callable[[int, torch.Tensor, torch.Tensor], None]
HEAD_ELEMENTS = 1 << 23  # logits alive at once in the loss: tokens x vocabulary


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
    from the reader thread, each time one is read: a way to copy a checkpoint in the pass that runs it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        edit: LayerEdit | None = None,
        on_read: Callable[[str, torch.Tensor], None] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.edit = edit
        self.on_read = on_read
        self.skeleton = Skeleton(checkpoint, dtype)
        self.model = self.skeleton.model
        self.layers = self.skeleton.layers
        self.layout = self.skeleton.layout
        self._side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._outside_users = 0
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self._returns_tuple: bool | None = None

    # -- weights ------------------------------------------------------------------------------------------------

    def _fetch(self, names: list[tuple[str, str]]) -> tuple[dict[str, torch.Tensor], Any]:
        """Read stored tensors and start them on their way to the device; runs in the reader thread."""
        host = {}
        for stored, target in names:
            host[target] = self.checkpoint.read(stored)
            if self.on_read is not None:
                self.on_read(stored, host[target])
        dtypes = {target: self.skeleton.parameters[target].dtype for target in host}
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

    def walk(self, order: Iterable[int]) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index, layer) in `order`, each with its weights in memory, reading the next one meanwhile."""
        queue = list(order)
        with ThreadPoolExecutor(1, thread_name_prefix="surgeon-reader") as pool:
            ahead: Future[Any] | None = (
                pool.submit(self._fetch, self.skeleton.inside[queue[0]]) if queue else None
            )
            for position, number in enumerate(queue):
                assert ahead is not None
                tensors = self._arrived(ahead.result())
                following = queue[position + 1 : position + 2]
                ahead = pool.submit(self._fetch, self.skeleton.inside[following[0]]) if following else None
                self.skeleton.fill(tensors)
                del tensors
                layer = self.layers[number]
                try:
                    if self.edit is not None:
                        self.edit(number, layer)
                    yield number, layer
                finally:
                    self.skeleton.drop(self.skeleton.inside[number])
                    _trim_heap()

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
        return entering[0], calls

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits [n, V] of hidden states [n, D] that left the last layer; call it inside `outside`."""
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=self.device)
        output = self._bypass(ids, lambda i, h, *_: hidden[None] if i == 0 else h, logits=True)
        logits: torch.Tensor = output.logits[0]
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
                for _, layer in self.walk([0]):
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


def _trim_heap() -> None:
    """Give freed pages back to the system, where the C library can (glibc).

    Its heap otherwise keeps what activations of one layer left between allocations of the next; once a layer costs
    little, while asking for fresh pages at every allocation (a low mmap threshold) made the whole run a fifth slower.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _set_buffer(module: nn.Module, name: str, buffer: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._buffers[leaf] = buffer


class TokenStream:
    """Blocks of tokens on their way through the layers, micro-batch by micro-batch.

    `ids` [N, T]. With `keep_inputs` every layer's input is kept (slot i holds what enters layer i), which the
    backward pass needs; without it, one slot is overwritten from layer to layer.
    """

    def __init__(
        self,
        model: StreamedModel,
        ids: torch.Tensor,
        *,
        micro_batch: int,
        keep_inputs: bool = False,
        host_bytes: int | None = None,
    ) -> None:
        self.model = model
        self.ids = ids
        self.keep_inputs = keep_inputs
        self.slices = [slice(i, min(i + micro_batch, len(ids))) for i in range(0, len(ids), micro_batch)]
        self.calls: list[list[LayerCall]] = []
        shared = _SharedArguments()
        slots = len(model.layers) + 1 if keep_inputs else 1
        self.hidden: HiddenStore | None = None
        with model.outside():
            for part in self.slices:
                entering, calls = model.capture(ids[part])
                self.calls.append([shared.intern(call) for call in calls])
                if self.hidden is None:
                    shape = (slots, *ids.shape, entering.shape[-1])
                    self.hidden = HiddenStore(shape, entering.dtype, host_bytes)
                self.hidden.put(0, part, entering)

    @property
    def store(self) -> HiddenStore:
        """The hidden states."""
        assert self.hidden is not None
        return self.hidden

    def _slot(self, layer: int) -> int:
        return layer if self.keep_inputs else 0

    def fork(self, number: int, layer: int) -> TokenStream:
        """A copy of the first micro-batches, up to `number` blocks, as they stand before `layer`."""
        twin = object.__new__(TokenStream)
        twin.model, twin.keep_inputs = self.model, False
        twin.slices = [part for part in self.slices if part.start < number]
        twin.ids = self.ids[: twin.slices[-1].stop]
        twin.calls = self.calls[: len(twin.slices)]
        shape = (1, *twin.ids.shape, self.store.shape[-1])
        twin.hidden = HiddenStore(shape, self.store.dtype, None)
        for part in twin.slices:
            twin.hidden.put(0, part, self.store.get(self._slot(layer), part, self.model.device))
        return twin

    @torch.no_grad()
    def forward(self, number: int, layer: nn.Module) -> None:
        """Move every block through the resident layer `number`. Raises NumericsError on NaN or infinity."""
        finite = torch.ones((), dtype=torch.bool, device=self.model.device)
        for part, calls in zip(self.slices, self.calls, strict=True):
            hidden = self.store.get(self._slot(number), part, self.model.device)
            output = self.model.run_layer(layer, hidden, calls[number])
            finite &= output.isfinite().all()
            self.store.put(self._slot(number + 1), part, output)
        if not finite:
            raise NumericsError(
                "NaN or infinity in the hidden states",
                where=f"the output of layer {number}",
                next_step="check the checkpoint's weights, or use --dtype float32",
            )

    def backward(self, number: int, layer: nn.Module, observe: Observer) -> None:
        """Pull dL/d(output) of layer `number` back to its input, in place of the stored output.

        `observe(first block, u, s)` gets the input u [n, T, F] of the layer's down projection and s = dL/du.
        """
        down = layer.get_submodule(self.model.layout.down)
        seen: list[torch.Tensor] = []
        handle = down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            for part, calls in zip(self.slices, self.calls, strict=True):
                hidden = self.store.get(number, part, self.model.device).requires_grad_(True)
                gradient = self.store.get(number + 1, part, self.model.device)
                with torch.enable_grad():
                    output = self.model.run_layer(layer, hidden, calls[number])
                u = seen.pop()
                to_input, s = torch.autograd.grad(output, (hidden, u), gradient)
                self.store.put(number, part, to_input)
                observe(part.start, u.detach(), s)
        finally:
            handle.remove()

    def loss(self, with_gradient: bool = False) -> torch.Tensor:
        """Summed next-token cross-entropy in nats of each block, [N] float64, from the last layer's output.

        The last token of a block predicts nothing. With `with_gradient`, dL/d(last hidden state) takes the place of
        the stored output; L is the sum over all blocks.
        """
        nats = torch.zeros(len(self.ids), dtype=torch.float64)
        with self.model.outside():
            for block in range(len(self.ids)):
                nats[block] = self._block_loss(block, with_gradient)
        return nats

    def _block_loss(self, block: int, with_gradient: bool) -> torch.Tensor:
        """Summed loss of one block, through the head a slice of tokens at a time."""
        device = self.model.device
        slot, part = self._slot(len(self.model.layers)), slice(block, block + 1)
        tokens = max(1, HEAD_ELEMENTS // self.model.model.config.get_text_config().vocab_size)
        hidden = self.store.get(slot, part, device)[0]
        gradient = torch.zeros_like(hidden)
        targets = self.ids[block, 1:].to(device)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for start in range(0, len(targets), tokens):
            rows = slice(start, min(start + tokens, len(targets)))
            states = hidden[rows].detach().requires_grad_(with_gradient)
            with torch.set_grad_enabled(with_gradient):
                logits = self.model.logits(states).float()
                piece = functional.cross_entropy(logits, targets[rows], reduction="sum")
            if with_gradient:
                (gradient[rows],) = torch.autograd.grad(piece, states)
            total += piece.detach().double()
        if with_gradient:
            self.store.put(slot, part, gradient[None])
        return total


class _SharedArguments:
    """Keeps one copy of arguments that are equal for every micro-batch, as masks and rotary tables are."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    def intern(self, call: LayerCall) -> LayerCall:
        return LayerCall(self._same(call.args), self._same(call.kwargs))

    def _same(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            for known in self.tensors:
                if known is value or (
                    known.shape == value.shape and known.dtype == value.dtype and torch.equal(known, value)
                ):
                    return known
            self.tensors.append(value)
            return value
        if isinstance(value, tuple) and type(value) is tuple:
            return tuple(self._same(item) for item in value)
        if type(value) is dict:
            return {key: self._same(item) for key, item in value.items()}
        return value
