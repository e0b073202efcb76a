"""The streamed engine: forward and backward through a causal LM with one decoder layer's weights resident.

All computation is done by the model's own code, in three phases:

1. One call of the model's `forward`, in which every decoder layer returns its input unchanged and records its
   arguments. It computes embeddings, masks, rotary tables and per-layer arguments.
2. Each decoder layer is called for all blocks before the next layer is loaded.
3. A second call of `forward`, in which the first layer returns the final hidden states. It computes norm,
   output head, soft-capping and scaling.

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

from surgery.engine.causal_attention import fast_attention
from surgery.engine.disk_errors import in_layer
from surgery.engine.malloc import Malloc
from surgery.engine.open_model import Model
from surgery.errors import CalibrationError, UnsupportedModelError, one_line
from surgery.model.ffn import Ffn
from surgery.model.meta_model import LayerEdit, StoredParameter


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one decoder layer's call, other than the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _FirstLayerDone(Exception):
    """Carries the first layer's output out of the model's forward."""

    def __init__(self, output: Any) -> None:
        self.output = output


class StreamedModel:
    """A causal LM of which only the embeddings, the head and one decoder layer are in memory.

    `opened` is the model to run. Tensors are cast to the compute dtype on the device.

    - `edit(layer index, layer)`, when given, is called each time a layer's weights have been loaded. Use it
      to mask channels or to set single weights without changing the checkpoint.
    - `on_read(stored name, tensor as stored)`, when given, is called in the reader thread for every tensor
      read. Use it to copy a checkpoint in the same pass that runs it.
    - `keep_bytes`: layers stay in memory once they were read, as many as fit in so many bytes in the compute
      dtype; later passes do not read them again. Not for use with an `edit` that changes weights in place.
    """

    def __init__(
        self,
        opened: Model,
        edit: LayerEdit | None = None,
        on_read: Callable[[str, torch.Tensor], None] | None = None,
        keep_bytes: int = 0,
    ) -> None:
        self.checkpoint = opened.checkpoint
        self.read: Callable[[str], torch.Tensor] = self.checkpoint.read
        self.malloc = Malloc(opened.run.memory)
        self.device = device = opened.run.device
        self.dtype = opened.run.dtype
        self.edit = edit
        self.on_read = on_read
        self.keep_bytes = keep_bytes
        self.kept: dict[int, dict[str, torch.Tensor]] = {}  # layer number -> its tensors on the device
        self.meta_model = opened.meta_model
        self.model = self.meta_model.model
        self.layers = self.meta_model.layers
        self._side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._other_weights_users = 0
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self._returns_tuple: bool | None = None

    # -- weights ------------------------------------------------------------------------------------------

    def _fetch(self, stored_parameters: list[StoredParameter]) -> tuple[dict[str, torch.Tensor], Any]:
        """Read stored tensors and start their copy to the device; runs in the reader thread.

        Returns (parameter name -> tensor, None or what `_wait_for` needs to wait for a CUDA copy).
        """
        host: dict[str, torch.Tensor] = {}
        for stored_parameter in stored_parameters:
            tensors = []
            for stored in stored_parameter.stored:
                tensors.append(self.read(stored))
                if self.on_read is not None:
                    self.on_read(stored, tensors[-1])
            host |= self.meta_model.assemble(stored_parameter, tensors)
            if stored_parameter.converter is not None:  # the source tensors can be as large as the layer
                del tensors
                self.malloc.trim()
        dtypes = {target: self.meta_model.compute_dtype(target) for target in host}
        if self._side_stream is None:
            return {name: t.to(self.device, dtypes[name]) for name, t in host.items()}, None
        with torch.cuda.stream(self._side_stream):
            moved = {name: t.pin_memory().to(self.device, non_blocking=True) for name, t in host.items()}
            ready = {name: t.to(dtypes[name]) for name, t in moved.items()}
            event = torch.cuda.Event()
            event.record(self._side_stream)
        return ready, (event, host)

    def _wait_for(self, fetched: tuple[dict[str, torch.Tensor], Any]) -> dict[str, torch.Tensor]:
        """The tensors of `_fetch`, after making the compute stream wait for their copy."""
        tensors, pending = fetched
        if pending is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(pending[0])
            for tensor in tensors.values():
                tensor.record_stream(stream)
        return tensors

    def _layer(self, number: int) -> tuple[dict[str, torch.Tensor], Any]:
        """The tensors of a layer: those kept in memory, else `_fetch`; runs in the reader thread."""
        if number in self.kept:
            return self.kept[number], None
        return self._fetch(self.meta_model.layer_parameters[number])

    def _keep(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        """Keep a layer's tensors for later passes, where `keep_bytes` has room for them."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if number not in self.kept and size <= self.keep_bytes:
            self.kept[number] = tensors
            self.keep_bytes -= size

    @contextlib.contextmanager
    def other_weights(self) -> Iterator[None]:
        """Within the block, weights outside the decoder layers (embeddings, final norm, head) are in memory.

        Only the first and last phase of a pass need them. Nested use loads them once.
        """
        if self._other_weights_users == 0:
            self.meta_model.fill(self._wait_for(self._fetch(self.meta_model.other_parameters)))
            self.meta_model.tie()
        self._other_weights_users += 1
        try:
            yield
        finally:
            self._other_weights_users -= 1
            if self._other_weights_users == 0:
                self.meta_model.drop(self.meta_model.other_parameters)

    def stream_layers(self, order: Iterable[int], edited: bool = True) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index, layer) in `order`, each with its weights in memory, while the next layer is read.

        With `edited` false, `edit` is not applied. Raises StorageError or CheckpointError, naming the layer,
        when reading fails.
        """
        queue = list(order)
        with ThreadPoolExecutor(1, thread_name_prefix="surgeon-reader") as pool:
            prefetched: Future[Any] | None = pool.submit(self._layer, queue[0]) if queue else None
            for position, number in enumerate(queue):
                assert prefetched is not None
                with in_layer(number):
                    tensors = self._wait_for(prefetched.result())
                following = queue[position + 1 : position + 2]
                prefetched = pool.submit(self._layer, following[0]) if following else None
                self._keep(number, tensors)
                self.meta_model.fill(tensors)
                del tensors
                layer = self.layers[number]
                try:
                    if self.edit is not None and edited:
                        self.edit(number, layer)
                    yield number, layer
                finally:
                    self.meta_model.drop(self.meta_model.layer_parameters[number])
                    self.malloc.trim()

    # -- the model's computation outside its layers -------------------------------------------------------

    def capture(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[LayerCall]]:
        """Input hidden states [n, T, D] of the first layer for token ids [n, T], and every layer's arguments.

        Raises UnsupportedModelError for a model that does not call each decoder layer once, CalibrationError
        for blocks longer than its positions or ids outside its vocabulary.
        """
        first_input: list[torch.Tensor] = []
        calls: list[LayerCall] = []

        def record(
            _: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> torch.Tensor:
            if not first_input:
                first_input.append(hidden)
            calls.append(LayerCall(args, kwargs))
            return hidden

        with torch.no_grad(), self.other_weights():
            self._bypass(ids, record, logits=False)
        if len(calls) != len(self.layers):
            raise UnsupportedModelError(
                "the model does not call each decoder layer once",
                where=self.checkpoint.name,
                expected=f"{len(self.layers)} calls",
                found=str(len(calls)),
            )
        return first_input[0], calls

    def ffns(self, number: int) -> list[Ffn]:
        """The FFNs of decoder layer `number`."""
        return self.meta_model.ffns[number]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits [n, V] for last-layer outputs [n, D]. Call it within `other_weights`."""
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=self.device)
        output = self._bypass(ids, lambda i, h, *_: hidden[None] if i == 0 else h, logits=True)
        logits: torch.Tensor = output.logits.squeeze(0)
        return logits

    def _bypass(self, ids: torch.Tensor, replace: Callable[..., torch.Tensor], logits: bool) -> Any:
        """Call the model with `replace(index, hidden, args, kwargs)` instead of every decoder layer.

        Calls the causal LM with `logits`, its base model without. Raises CalibrationError for blocks or ids
        out of range.
        """
        tuples = self._layers_return_tuples()

        def replacement(index: int) -> Callable[..., Any]:
            def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                output = replace(index, hidden, args, kwargs)
                return (output,) if tuples else output

            return forward

        for index, layer in enumerate(self.layers):
            layer.forward = replacement(index)
        try:
            module = self.model if logits else self.model.base_model
            with model_code(self.checkpoint.name):
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
        """Whether a decoder layer returns a tuple; found once, by running the first layer on two tokens.

        It runs on the meta device, which needs no weights. If it can't run there, its weights are read.
        """
        if self._returns_tuple is None:
            try:
                self._returns_tuple = self._first_layer_returns_tuple(self.layers[0], meta=True)
            except (RuntimeError, NotImplementedError, ValueError):
                for _, layer in self.stream_layers([0], edited=False):
                    self._returns_tuple = self._first_layer_returns_tuple(layer, meta=False)
        assert self._returns_tuple is not None
        return self._returns_tuple

    def _first_layer_returns_tuple(self, layer: nn.Module, meta: bool) -> bool:
        forward = layer.forward

        def stop(*args: Any, **kwargs: Any) -> Any:
            if meta:
                args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
            raise _FirstLayerDone(forward(*args, **kwargs))

        layer.forward = stop
        buffers = {name: buffer for name, buffer in layer.named_buffers() if meta}
        for name, buffer in buffers.items():
            _set_buffer(layer, name, buffer.to("meta"))
        try:
            ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
            with torch.no_grad(), self.other_weights():
                self.model.base_model(input_ids=ids, use_cache=False)
        except _FirstLayerDone as done:
            return isinstance(done.output, tuple)
        finally:
            del layer.forward
            for name, buffer in buffers.items():
                _set_buffer(layer, name, buffer)
        raise AssertionError("the model never called its first layer")

    def run_layer(self, layer: nn.Module, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Output hidden states [n, T, D] of a resident layer for inputs `hidden` [n, T, D].

        Raises UnsupportedModelError when the layer's own code fails, as it does on a config that does not
        fit.
        """
        with model_code(self.checkpoint.name), fast_attention(hidden.device, hidden.dtype):
            output = layer(hidden, *call.args, **call.kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result


@contextlib.contextmanager
def model_code(where: str) -> Iterator[None]:
    """Translate what the model's own code raises into UnsupportedModelError, except for short memory."""
    try:
        yield
    except (torch.OutOfMemoryError, IndexError):
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise UnsupportedModelError(
            "the model's own code fails on this checkpoint",
            where=where,
            found=one_line(error),
            next_step="compare config.json with the one its publisher has",
        ) from error


def _set_buffer(module: nn.Module, name: str, buffer: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._buffers[leaf] = buffer
