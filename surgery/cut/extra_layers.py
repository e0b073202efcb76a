"""FFNs stored beside the model: multi-token-prediction layers, which transformers ignores and other runtimes
load.

They read the same config keys as the model's own layers, so they have to be cut to the same widths. No
calibration token runs through them; their channels are ranked by weight magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from surgery.errors import UnsupportedModelError
from surgery.model.ffn import Ffn
from surgery.model.meta_model import MetaModel, StoredParameter


@dataclass(frozen=True)
class ExtraLayer:
    """A layer beside the model, stored under `prefix` with the FFNs of the model's layer `like`.

    `stored` are the stored parameters of these FFNs, under their names in the extra layer and with the
    targets they have in layer `like`.
    """

    prefix: str
    like: int
    ffns: tuple[Ffn, ...]
    stored: tuple[StoredParameter, ...]

    def largest(self, meta_model: MetaModel, width: dict[str, int]) -> dict[str, torch.Tensor]:
        """FFN name -> sorted indices of the `width` channels with the largest weights.

        A channel counts as the sum of the L2 norms of its gate row, up row and down column. Reads the FFNs'
        weights, into the place of layer `like`.
        """
        for parameter in self.stored:
            tensors = [meta_model.checkpoint.read(name) for name in parameter.stored]
            meta_model.fill(meta_model.assemble(parameter, tensors))
        kept = {}
        for ffn in self.ffns:
            gate, up = ffn.in_weights()
            score = up.float().norm(dim=1) + ffn.down_weight().float().norm(dim=0)
            if gate is not None:
                score += gate.float().norm(dim=1)
            order = score.argsort(descending=True, stable=True)
            kept[ffn.name] = order[: width[ffn.name]].sort().values
        meta_model.drop(list(self.stored))
        return kept


def find_extra_layers(meta_model: MetaModel) -> list[ExtraLayer]:
    """The layers beside the model that have an FFN like one of its own layers.

    Raises UnsupportedModelError for one whose FFN has the model's names but other shapes: its width can't be
    told from the config.
    """
    carried = meta_model.beside
    if not carried:
        return []
    found: dict[str, ExtraLayer] = {}
    unlike: dict[str, str] = {}
    for number, ffns in enumerate(meta_model.ffns):
        parts = {ffn.name: _stored_parts(meta_model, number, ffn) for ffn in ffns}
        ends = {rest for own in parts.values() for parameter in own for _, rest in _names(parameter, number)}
        prefixes = {name[: -len(end)] for end in ends for name in carried if name.endswith("." + end)}
        for prefix in sorted(prefixes):
            matched = [ffn for ffn in ffns if _all_like(meta_model, parts[ffn.name], number, prefix, carried)]
            if len(matched) > len(found[prefix].ffns if prefix in found else ()):
                stored = {id(one): one for ffn in matched for one in parts[ffn.name]}
                moved = tuple(_moved(one, number, prefix) for one in stored.values())
                found[prefix] = ExtraLayer(prefix, number, tuple(matched), moved)
            elif not matched:
                unlike.setdefault(prefix, next(n for n in sorted(carried) if n.startswith(prefix)))
    for prefix, name in unlike.items():
        if prefix not in found:
            raise UnsupportedModelError(
                "a layer beside the model has an FFN unlike the model's, so its new width can't be told",
                where=name,
                next_step="remove these tensors from the checkpoint if nothing you use loads them",
            )
    return list(found.values())


def _stored_parts(meta_model: MetaModel, layer: int, ffn: Ffn) -> list[StoredParameter]:
    """The stored parameters that an FFN's channels run over."""
    paths = dict.fromkeys(part.parameter for part in (*ffn.in_slices(), ffn.down_slice()))
    found = [meta_model.stored_parameter(layer, path) for path in paths]
    return list({id(one): one for one in found}.values())


def _names(parameter: StoredParameter, layer: int) -> list[tuple[str, str]]:
    """(stored name, the part of it after the layer's number)."""
    return [(name, _rest(name, layer)) for name in parameter.stored]


def _rest(name: str, layer: int) -> str:
    return name.partition(f".{layer}.")[2]


def _all_like(
    meta_model: MetaModel, parts: list[StoredParameter], layer: int, prefix: str, carried: set[str]
) -> bool:
    tensors = meta_model.checkpoint.tensors
    return all(
        prefix + rest in carried and tensors[prefix + rest].shape == tensors[name].shape
        for parameter in parts
        for name, rest in _names(parameter, layer)
    )


def _moved(parameter: StoredParameter, layer: int, prefix: str) -> StoredParameter:
    """The same parameter as stored under `prefix`."""
    sources = [(prefix + _rest(name, layer), pattern) for name, pattern in parameter.sources]
    return replace(parameter, sources=sources)
