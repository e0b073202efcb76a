"""The size of a result after `surgeon quantize`, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surgery.checkpoint.shard_writer import TensorSpec
from surgery.cut.groups import Cut
from surgery.cut.planned_model import PlannedCheckpoint
from surgery.model.meta_model import MetaModel
from surgery.quantize.plan import plan_quantization
from surgery.quantize.rounding import Scheme
from surgery.quantize.write import kept_tensors, quantized_specs

GROUP = 128
SCHEME = Scheme(bits=4, symmetric=True, granularity="group", size=GROUP)  # the default of the command


def packed_specs(
    meta_model: MetaModel, cut: Cut, scheme: Scheme = SCHEME, weights: Sequence[dict[str, Any]] = ()
) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor of the packed result of a cut.

    The matrices of the super weights `weights`, whose layers are numbered as the result's, are left whole.
    Raises UnsupportedModelError for a model whose matrices can't be packed, UsageError for a width that the
    groups don't divide.
    """
    planned = MetaModel(PlannedCheckpoint(meta_model.checkpoint, cut), meta_model.dtype)
    plan = plan_quantization(planned, list(weights), scheme, handling="module")
    return quantized_specs(kept_tensors(planned), plan, packed=True)
