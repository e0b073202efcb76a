"""Verification: what a written checkpoint must pass before it appears under its name, and again before a
push.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from surgery.budget.budget import Budget
from surgery.budget.model_size import ModelSize
from surgery.budget.prune_cost import VERIFY_TOKENS
from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.transformers_model import check_loads, text_config
from surgery.engine.open_model import Model, open_model
from surgery.engine.run_options import storage_dtype
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.errors import CheckpointError
from surgery.model.ffn import ffn_named
from surgery.model.meta_model import MetaModel

# Cut and masked models sum the same products in another order; a wrong slice is off by the size of the
# logits.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def run_to_logits(opened: Model, ids: torch.Tensor) -> torch.Tensor:
    """A model's logits [T, V] float32, on the CPU, for one block of ids [1, T].

    Every weight is read once where the memory budget can hold those outside the layers throughout.
    """
    model = StreamedModel(opened)
    size = ModelSize.of(model.meta_model, opened.run.dtype, ids.shape[1])
    fits = size.other_resident + 2 * size.layer + size.merging <= Budget.of(opened.run).usable
    with model.other_weights() if fits else contextlib.nullcontext():
        stream = TokenStream(model, ids, micro_batch=1)
        for number, layer in model.stream_layers(range(len(model.layers))):
            stream.forward(number, layer)
        with model.other_weights():
            return last_logits(model, stream)


@torch.no_grad()
def last_logits(model: StreamedModel, stream: TokenStream) -> torch.Tensor:
    """Logits [T, V] float32, on the CPU, of the first block of a stream that has left the last layer."""
    return model.logits(stream.last_hidden(slice(0, 1))[0]).float().cpu()


def verify_pruned(
    written: Model,
    expected: torch.Tensor,
    ids: torch.Tensor,
    super_weights: tuple[dict[str, Any], ...] = (),
    *,
    repaired: bool = False,
    tokens: torch.Tensor | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Check a written checkpoint; returns what was measured, and the super weights as found. Raises
    CheckpointError.

    It must load through transformers' Auto class with no missing, unexpected or mismatched key; its logits on
    `ids` [1, T] must be finite and equal `expected` [T, V], those of the masked source, up to rounding; every
    kept one of `super_weights` must be at its new column, with its value unless weights were `repaired`.
    `ids` and `expected` are those of the source; `tokens` [V'] are the old ids of the tokens that the written
    model has, where its vocabulary is smaller.
    """
    if tokens is not None:
        ids, expected = torch.searchsorted(tokens, ids), expected[:, tokens]
    measured = check_logits(written, expected, ids, "the masked source")
    return measured, check_super_weights(written.checkpoint, written.meta_model, super_weights, repaired)


def verification_ids(calibration: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Ids [1, T] of the source to verify a cut with: the start of its calibration blocks [N, T].

    With `tokens`, the ids that stay, those that go are passed over.
    """
    if tokens is None:
        return calibration[:1, :VERIFY_TOKENS].long()
    flat = calibration.long().flatten()
    found = flat[torch.isin(flat, tokens)][: min(VERIFY_TOKENS, calibration.shape[1])]
    return (found if len(found) else tokens[:VERIFY_TOKENS])[None]


def check_logits(
    written: Model, expected: torch.Tensor, ids: torch.Tensor, source: str, *, rounded: bool = False
) -> dict[str, Any]:
    """Load a written checkpoint, and compare its logits on `ids` [1, T] with `expected` [T, V], those of
    `source`.

    With `rounded` its weights have fewer digits than those of `source` where the stored dtype is coarser.
    Returns what was measured. Raises CheckpointError where it does not load or differs by more than rounding.
    """
    check_loads(written.checkpoint.source.path, written.meta_model.may_be_unexpected)
    logits = run_to_logits(written, ids)
    difference = float((logits - expected).norm() / expected.norm())
    dtypes = [written.run.dtype, *([storage_dtype(written.checkpoint)] if rounded else [])]
    limit = max(TOLERANCE[dtype] for dtype in dtypes)
    if not difference < limit:
        raise CheckpointError(
            f"the written model does not compute what {source} does",
            where="verification",
            expected=f"logits within {limit} of those of {source}",
            found=f"{difference:.3g}",
            next_step="report this: it is a bug in surgeon",
        )
    return {
        "tokens": ids.shape[1],
        "relative_difference": difference,
        "tolerance": limit,
        "dtype": written.run.dtype_name,
    }


def check_super_weights(
    written: Checkpoint, meta_model: MetaModel, weights: tuple[dict[str, Any], ...], repaired: bool
) -> list[dict[str, Any]]:
    """The super weights with the values they have in a written checkpoint, as `value_after`.

    Raises CheckpointError unless each has its value at its new coordinates; a repair changes values, which
    are not compared then.
    """
    found = []
    for weight in weights:
        if weight["column"] is None:
            found.append(weight)
            continue
        value = _stored_weight(written, meta_model, weight)
        found.append({**weight, "value_after": value})
        # The index read it in the compute dtype, which may be coarser than the stored one.
        if not repaired and abs(value - weight["value"]) > 0.01 * abs(weight["value"]):
            raise CheckpointError(
                "a super weight is not where the manifest says",
                where=f"layer {weight['layer']} [{weight['row']}, {weight['column']}]",
                expected=str(weight["value"]),
                found=str(value),
            )
    return found


def _stored_weight(written: Checkpoint, meta_model: MetaModel, weight: dict[str, Any]) -> float:
    """The value a written checkpoint has at a super weight's coordinates."""
    ffn = ffn_named(meta_model.ffns[weight["layer"]], weight["ffn"])
    stored_parameter = meta_model.stored_parameter(weight["layer"], ffn.down_name)
    tensors = [written.read(stored) for stored in stored_parameter.stored]
    meta_model.fill(meta_model.assemble(stored_parameter, tensors))
    value = float(ffn.down_weight()[weight["row"], weight["column"]])
    meta_model.drop([stored_parameter])
    return value


def verify_folder(folder: Path) -> None:
    """Verify a finished folder, as before a push: it loads, and its weights and logits are finite."""
    written = open_model(folder, device="cpu")
    check_loads(folder, written.meta_model.may_be_unexpected)
    vocabulary = int(text_config(written.checkpoint.config).get("vocab_size", VERIFY_TOKENS))
    ids = torch.arange(min(VERIFY_TOKENS, vocabulary))[None]
    if not run_to_logits(written, ids).isfinite().all():
        raise CheckpointError("the model's logits are not finite", where=folder.name)
