"""DequantisedCheckpoint: what every quantised form that surgeon reads has in common.

A tensor is dequantised when it is read, one at a time, in float32 with one cast.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from surgery.checkpoint.quantised_forms import without_quantisation
from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.safetensors_header import TensorEntry
from surgery.checkpoint.transformers_model import text_config
from surgery.errors import CheckpointError

# Files that describe the quantisation, which would make others read a result as quantised.
DESCRIPTIONS = ("hf_quant_config.json", "recipe.yaml")
PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DequantisedCheckpoint(Checkpoint):
    """A quantised checkpoint as a plain one: quantised tensors are presented in `dtype`, and no scales.

    `stored` was opened with `quantised`. `presented` holds, by name, each tensor that is dequantised: the
    stored tensor with its codes, and its shape. `hidden` stored tensors are not presented. `dtype` None
    stands for the dtype that the config states, or bfloat16. Other tensors (norms, embeddings) keep their
    stored dtype. `config` states `dtype` and no quantisation. `parameters` and `nbytes` count what is
    presented, as results are written; digests are those of the stored form, so that an index serves every
    `dtype`.
    """

    def __init__(
        self,
        stored: Checkpoint,
        dtype: torch.dtype | None,
        presented: Mapping[str, tuple[str, tuple[int, ...]]],
        hidden: Collection[str],
    ) -> None:
        self.stored = stored
        self.source, self.name, self.revision = stored.source, stored.name, stored.revision
        self.file_names = stored.file_names
        self.weight_files, self.weight_map = stored.weight_files, stored.weight_map
        self.dtype = dtype or _stated_dtype(stored.config)
        self.config = _plain_config(stored.config, self.dtype)
        self.presented = presented
        names = {codes: name for name, (codes, _) in presented.items()}
        self.tensors = {
            names.get(entry.name, entry.name): self._entry(names.get(entry.name), entry)
            for entry in stored.tensors.values()
            if entry.name not in hidden
        }

    def _entry(self, name: str | None, stored: TensorEntry) -> TensorEntry:
        """The entry of a tensor that is dequantised to `name`, or of one that stays as stored."""
        if name is None:
            return stored
        shape = self.presented[name][1]
        return TensorEntry(name, stored.file, self.dtype, shape, 0, math.prod(shape) * self.dtype.itemsize)

    @property
    @abstractmethod
    def form(self) -> str:
        """The stored form, without the dtype of the result."""

    @abstractmethod
    def _dequantised(self, name: str) -> torch.Tensor | None:
        """The presented tensor `name`; None where a value is not finite. Raises CheckpointError."""

    @property
    def stored_form(self) -> str:
        """The stored form, and the dtype of the result, for the model card."""
        return f"{self.form}, dequantised to {str(self.dtype).removeprefix('torch.')}"

    @property
    def left_behind(self) -> list[str]:
        """As of any checkpoint, and the files that describe the quantisation."""
        present = [file for file in DESCRIPTIONS if file in self.file_names]
        return sorted({*self.stored.left_behind, *present})

    @property
    def config_digest(self) -> str:
        """That of the stored config."""
        return self.stored.config_digest

    @property
    def shape_digest(self) -> str:
        """That of the stored tensors."""
        return self.stored.shape_digest

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name`, dequantised, in memory that the caller owns. Raises CheckpointError."""
        if name not in self.presented:
            return self.stored.read(name)
        result = self._dequantised(name)
        if result is None:
            raise CheckpointError(
                f"a dequantised weight is not finite in {str(self.dtype).removeprefix('torch.')}",
                where=f"{self.tensors[name].file}, {name}",
                next_step="use --dtype bfloat16" if self.dtype == torch.float16 else "fetch the file again",
            )
        return result

    def pieces(self, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of a tensor as `read` returns it."""
        if name not in self.presented:
            yield from self.stored.pieces(name)
        else:
            yield self.read(name).view(-1).view(torch.uint8).numpy().data


def _stated_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype a config states for its weights; bfloat16 where it states none that a result could have."""
    for part in (text_config(config), config):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) in PLAIN:
                return PLAIN[part[key]]
    return torch.bfloat16


def _plain_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config.json without quantisation that states `dtype`, for the model and its language model."""
    plain = without_quantisation(config)
    text = text_config(plain)
    for part in (plain, text):
        keys = [key for key in ("dtype", "torch_dtype") if key in part]
        for key in keys or (["dtype"] if part is plain else []):
            part[key] = str(dtype).removeprefix("torch.")
    return plain
