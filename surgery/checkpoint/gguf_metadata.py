"""Metadata: the keys of a GGUF file under its architecture's name, which are all read or refused.

A key that nothing reads would be a part of the model that is lost without a word. So every read is noted, and
`refuse_unread` names the first key that is left. Keys under other prefixes (general, tokenizer, a tool's own
notes) are not part of the computation: llama.cpp doesn't read them for it.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import numpy as np

from surgery.checkpoint.gguf_file import GgufFile
from surgery.errors import CheckpointError

# Keys under the architecture's name that do not change what is computed.
NOTES = (
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "pooling_type",
    "vocab_size",  # the embedding's rows count
    "expert_shared_count",  # the shared expert's width counts
)
# Keys whose only values that are read are these; any other is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0,),
    "attention.clamp_kqv": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_gating_func": (0, 1),  # softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_used_count": (0,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}


class Metadata:
    """The metadata of `file` by the key's part after the architecture's name, as attention.head_count."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.prefix = f"{file.architecture}."
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default`. A list with the same value for all layers counts as the value."""
        self.read.add(key)
        value = self.file.metadata.get(self.prefix + key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return value[0]
        return value

    def number(self, key: str, default: float | None = None) -> Any:
        """`get` for a number. Raises CheckpointError when there is none, or layers differ in it."""
        value = self.get(key, default)
        if isinstance(value, list):
            self.refuse(key, "one value for all layers")
        if value is None or isinstance(value, (str, bool)) or not math.isfinite(value):
            self.refuse(key, "a finite number")
        # the shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def count(self, key: str, default: int | None = None) -> int:
        """`number` for a count of one or more."""
        value = self.number(key, default)
        if value < 1 or value != int(value):
            self.refuse(key, "a whole number above 0")
        return int(value)

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Raise CheckpointError about `key`, whose value surgeon does not read."""
        value = self.file.metadata.get(self.prefix + key)
        raise CheckpointError(
            "surgeon does not read this value of a GGUF key",
            where=f"{self.file.path.name}: {self.prefix}{key}",
            expected=expected,
            found="no such key" if value is None else repr(value)[:60],
            next_step="use the safetensors checkpoint it was converted from",
        )

    def refuse_unread(self) -> None:
        """Raise CheckpointError for the first key of the architecture that nothing has read.

        Unknown keys are refused too: a key under the architecture's name describes the computation.
        """
        for full in self.file.metadata:
            key = full.removeprefix(self.prefix)
            if key == full or key in self.read or key in NOTES:
                continue
            if key in NEUTRAL:
                if self.get(key) not in NEUTRAL[key]:
                    self.refuse(key, " or ".join(str(value) for value in NEUTRAL[key]))
                continue
            raise CheckpointError(
                "surgeon does not know what this GGUF key means for the model",
                where=f"{self.file.path.name}: {full}",
                found=repr(self.file.metadata[full])[:60],
                next_step="use the safetensors checkpoint it was converted from",
            )
