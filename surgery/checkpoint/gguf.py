"""GgufCheckpoint: a GGUF file as a checkpoint, whose tensors are dequantised one at a time on request.

transformers knows the names, layouts and quantisation of GGUF weights by family, but it loads the whole file.
This module applies its name map and its per-tensor processors to one tensor at a time.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.safetensors_header import TensorEntry
from surgery.checkpoint.source import LocalFolder
from surgery.errors import CheckpointError

# Processors that make one parameter from one stored tensor. Those for mixtures of experts make several.
ONE_TO_ONE = {
    "TensorProcessor",
    "LlamaTensorProcessor",
    "Gemma2TensorProcessor",
    "NemotronTensorProcessor",
    "GPT2TensorProcessor",
}


class GgufCheckpoint(Checkpoint):
    """A GGUF file as a checkpoint: tensors have transformers' names and shapes, dequantised to `dtype`.

    config.json and the tokenizer are made from the file's metadata, in a temporary folder. Raises
    CheckpointError for a file that is not GGUF, an architecture that transformers can't read, or a mixture of
    experts.
    """

    def __init__(self, file: Path, dtype: torch.dtype) -> None:
        self.gguf_file = file
        self.dtype = dtype
        folder = Path(tempfile.mkdtemp(prefix="surgeon-gguf-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._reader, parameters = _read_metadata(file)
        architecture = str(self._reader.fields["general.architecture"].contents())
        model, processor = _meta_model(file, architecture, parameters["config"], dtype)
        self._config_fields, self._processor = parameters["config"], processor
        fields = model.config.to_dict() | {"architectures": [type(model).__name__]}
        fields["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        _save_tokenizer(file, folder)
        self.source = LocalFolder(folder)
        self.name, self.revision = file.stem, None
        self.file_names = self.source.files()
        self.config = self._read_config()
        self.weight_files, self.weight_map = [file.name], None
        self._stored = self._name_tensors(model)
        shapes = model.state_dict()
        self.tensors = {
            name: TensorEntry(
                name, file.name, dtype, tuple(shapes[name].shape), 0, shapes[name].numel() * dtype.itemsize
            )
            for name in self._stored
        }

    def file_fingerprints(self) -> dict[str, list[int]]:
        """File name -> [size in bytes, modification time in ns]."""
        status = self.gguf_file.stat()
        return {self.gguf_file.name: [status.st_size, status.st_mtime_ns]}

    @property
    def stored_form(self) -> str:
        """The file's quantisation types and the dtype they are dequantised to, for the model card."""
        kinds = sorted({tensor.tensor_type.name for tensor in self._stored.values()})
        return f"GGUF ({', '.join(kinds)}), dequantised to {str(self.dtype).removeprefix('torch.')}"

    def read(self, name: str) -> torch.Tensor:
        """Parameter `name` in `dtype`, dequantised, in transformers' layout."""
        from gguf import dequantize

        stored = self._stored[name]
        result = self._processor.process(
            weights=dequantize(stored.data, stored.tensor_type),
            name=stored.name,
            tensor_key_mapping={stored.name: name},
            parsed_parameters={"config": self._config_fields, "tensors": {}},
        )
        return torch.from_numpy(result.weights.copy()).to(self.dtype)

    def pieces(self, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of a tensor as `read` returns it."""
        yield self.read(name).view(-1).view(torch.uint8).numpy().data

    def _name_tensors(self, model: Any) -> dict[str, Any]:
        """Parameter name -> the GGUF tensor that stores it."""
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        names = get_gguf_hf_weights_map(model, self._processor)
        parameters = model.state_dict()
        return {
            names[tensor.name]: tensor
            for tensor in self._reader.tensors
            if tensor.name in names and names[tensor.name] in parameters
        }


def _read_metadata(file: Path) -> tuple[Any, dict[str, Any]]:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(
            "reading GGUF needs the gguf package",
            where=file.name,
            next_step="pip install 'ffn-surgeon[gguf]'",
        ) from error
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from surgery.checkpoint.transformers_model import quiet_transformers

    try:
        with quiet_transformers():
            return GGUFReader(file), load_gguf_checkpoint(str(file), return_tensors=False)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            "this GGUF file can't be read",
            where=file.name,
            found=" ".join(str(error).split())[:200] or type(error).__name__,
            next_step="use the safetensors checkpoint it was converted from",
        ) from error


def _meta_model(file: Path, architecture: str, config: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    """(Model on the meta device, transformers' tensor processor of its family). Raises CheckpointError."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    from surgery.checkpoint.transformers_model import build_config, build_model

    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    if type(processor).__name__ not in ONE_TO_ONE:
        raise CheckpointError(
            "GGUF files of this family store several weights in one tensor, which surgeon can't split",
            where=file.name,
            found=architecture,
            next_step="use the safetensors checkpoint it was converted from",
        )
    return build_model(build_config(config, file.name), dtype, file.name), processor


def _save_tokenizer(file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    from surgery.checkpoint.transformers_model import quiet_transformers

    try:
        with quiet_transformers():
            AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise CheckpointError(
            "the tokenizer in this GGUF file can't be read",
            where=file.name,
            found=" ".join(str(error).split())[:200],
        ) from error
