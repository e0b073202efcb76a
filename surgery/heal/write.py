"""Writes the healed checkpoint: every stored tensor of the student, with new values where it was trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from surgery.checkpoint.shard_writer import ShardWriter, TensorSpec
from surgery.engine.open_model import Model
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.heal.train_stream import all_layers
from surgery.heal.trainable import Trainables
from surgery.model.meta_model import MetaModel, StoredParameter
from surgery.pruning.verify import last_logits


def write_trained(student: Model, trainables: Trainables, folder: Path) -> None:
    """Write all shards of the healed checkpoint into `folder`, one parameter in memory at a time.

    New values are computed in float32 and rounded once to the dtype they are stored in.
    """
    checkpoint = student.checkpoint
    specs = {entry.name: TensorSpec(entry.dtype, entry.shape) for entry in checkpoint.tensors.values()}
    with ShardWriter(folder, specs) as writer:
        written = set()
        for number in range(len(student.meta_model.layers)):
            for name, tensor in trained_tensors(student.meta_model, trainables, number):
                writer.write(name, tensor)
                written.add(name)
        for entry in checkpoint.tensors.values():
            if entry.name not in written:
                writer.copy(entry.name, checkpoint, entry)


def trained_tensors(
    meta_model: MetaModel, trainables: Trainables, number: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """(Stored name, new value in the stored dtype) of every tensor of a layer that was trained."""
    prefix = f"{meta_model.layers_path}.{number}."
    for parameter in meta_model.layer_parameters[number]:
        if not any(trainables.has(number, target.removeprefix(prefix)) for target in parameter.targets):
            continue
        tensors = [meta_model.checkpoint.read(name) for name in parameter.stored]
        values = meta_model.assemble(parameter, tensors)
        trained = {
            target: value
            for target in parameter.targets
            if (value := trainables.trained(number, target.removeprefix(prefix), values[target])) is not None
        }
        del values
        yield from zip(parameter.stored, _taken_apart(meta_model, parameter, tensors, trained), strict=True)


def _taken_apart(
    meta_model: MetaModel,
    parameter: StoredParameter,
    tensors: list[torch.Tensor],
    trained: dict[str, torch.Tensor],
) -> list[torch.Tensor]:
    """The stored `tensors` with the values of trained parameters that are made from them.

    Where a parameter is put together from several, its conversion is done on the positions of their elements,
    which says where every element of the parameter comes from.
    """
    if parameter.converter is None:
        return [trained[parameter.targets[0]].to(tensors[0].dtype).contiguous()]
    positions, start = [], 0
    for tensor in tensors:
        positions.append(torch.arange(start, start + tensor.numel()).view(tensor.shape))
        start += tensor.numel()
    flat = torch.cat([tensor.float().flatten() for tensor in tensors])
    for target, places in meta_model.assemble(parameter, positions).items():
        if target in trained:
            flat[places.flatten()] = trained[target].flatten()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(old.shape).to(old.dtype) for part, old in zip(parts, tensors, strict=True)]


@torch.no_grad()
def trained_logits(model: StreamedModel, trainables: Trainables, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] float32, on the CPU, of the trained model in memory for one block of ids [1, T]."""
    stream = TokenStream(model, ids, micro_batch=1)
    for number, layer in all_layers(model):
        with trainables.installed(number, layer):
            stream.forward(number, layer)
    with model.other_weights():
        return last_logits(model, stream)
