"""Judge the result of a cut before any work: would transformers load it?"""

from __future__ import annotations

from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.safetensors_header import TensorEntry
from surgery.cut.groups import Cut
from surgery.cut.tensors import edited_specs
from surgery.errors import CheckpointError, UnsupportedModelError
from surgery.model.meta_model import MetaModel


class PlannedCheckpoint(Checkpoint):
    """A checkpoint that is not written yet: its config, and its tensors' names, dtypes and shapes."""

    def __init__(self, source: Checkpoint, cut: Cut) -> None:
        self.source = source.source
        self.name = source.name
        self.revision = source.revision
        self.config = cut.config
        self.tensors = {
            name: TensorEntry(name, "planned", spec.dtype, spec.shape, 0, spec.nbytes)
            for name, spec in edited_specs(source, cut.edits).items()
        }


def check_planned(meta_model: MetaModel, cut: Cut) -> None:
    """Raise UnsupportedModelError unless the config that a cut writes asks for the shapes that it writes."""
    try:
        MetaModel(PlannedCheckpoint(meta_model.checkpoint, cut), meta_model.dtype)
    except CheckpointError as error:
        raise UnsupportedModelError(
            "the pruned checkpoint would not load: its config and its tensors would not agree",
            where=error.where,
            expected=error.expected,
            found=error.found,
            next_step="report this model: surgeon does not know how its config says the FFN width",
        ) from error
