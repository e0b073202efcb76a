"""The load gate: what a written checkpoint must pass before it is called finished, and again before it is pushed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from surgery.checkpoint import Checkpoint
from surgery.devices import default_memory, pick_dtype
from surgery.errors import CheckpointError
from surgery.families import text_config
from surgery.heap import SHARE
from surgery.indexing import RunOptions
from surgery.plan import ResizePlan
from surgery.sizes import Sizes
from surgery.skeleton import Skeleton, auto_class, build_config, quiet_transformers
from surgery.stream import StreamedModel
from surgery.tokens import TokenStream

GATE_TOKENS = 64
# Cut and masked models sum the same products in another order; a wrong slice is off by the size of the logits.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def cpu_options(checkpoint: Checkpoint) -> RunOptions:
    """Compute on the CPU in the dtype `auto` picks."""
    device = torch.device("cpu")
    return RunOptions(device, pick_dtype("auto", checkpoint, device), default_memory())


def run_to_logits(
    written: Checkpoint, ids: torch.Tensor, options: RunOptions
) -> tuple[Skeleton, torch.Tensor]:
    """A checkpoint's skeleton, and its logits [T, V] float32, on the CPU, for one block of ids [1, T].

    Every weight is read once where `options.memory` can hold those outside the layers throughout.
    """
    model = StreamedModel(written, options.device, options.dtype, memory=options.memory)
    sizes = Sizes.of(model.skeleton, options.dtype, ids.shape[1])
    fits = sizes.outside_held + 2 * sizes.layer + sizes.merging <= options.memory - options.memory // SHARE
    with model.outside() if fits else contextlib.nullcontext():
        stream = TokenStream(model, ids, micro_batch=1)
        for number, layer in model.walk(range(len(model.layers))):
            stream.forward(number, layer)
        with model.outside():
            return model.skeleton, last_logits(model, stream)


@torch.no_grad()
def last_logits(model: StreamedModel, stream: TokenStream) -> torch.Tensor:
    """Logits [T, V] float32, on the CPU, of a stream's first block, which has left the last layer."""
    return model.logits(stream.store.get(0, slice(0, 1), model.device)[0]).float().cpu()


def pass_gate(
    written: Checkpoint, expected: torch.Tensor, ids: torch.Tensor, options: RunOptions, plan: ResizePlan
) -> dict[str, Any]:
    """Check a written checkpoint and return what was seen, for the manifest. Raises CheckpointError.

    It must load through transformers' Auto class with no missing, unexpected or mismatched key; its logits on `ids`
    [1, T] must be finite and equal `expected` [T, V], those of the masked source, up to rounding; every super weight
    the plan keeps must be at its new column.
    """
    check_loads(written.source.path)
    skeleton, logits = run_to_logits(written, ids, options)
    check_super_weights(written, skeleton, plan.super_weights, plan.repair != "none")
    difference = float((logits - expected).norm() / expected.norm())
    limit = TOLERANCE[options.dtype]
    if not difference < limit:
        raise CheckpointError(
            "the written model does not compute what the masked source does",
            where="the load gate",
            expected=f"logits within {limit} of the masked source's",
            found=f"{difference:.3g}",
            next_step="report this: it is a fault of surgeon's",
        )
    return {
        "tokens": ids.shape[1],
        "relative_difference": difference,
        "tolerance": limit,
        "dtype": str(options.dtype).removeprefix("torch."),
    }


def check_super_weights(
    written: Checkpoint, skeleton: Skeleton, weights: tuple[dict[str, Any], ...], repaired: bool
) -> None:
    """Raise CheckpointError unless each super weight has its value at its new coordinates.

    Repair changes values: they are noted as `value_after` then, not compared.
    """
    for weight in weights:
        if weight["column"] is None:
            continue
        value = _stored_weight(written, skeleton, weight)
        weight["value_after"] = value
        # The index read it in the compute dtype, which may be coarser than the stored one.
        if not repaired and abs(value - weight["value"]) > 0.01 * abs(weight["value"]):
            raise CheckpointError(
                "a super weight is not where the manifest says",
                where=f"layer {weight['layer']} [{weight['row']}, {weight['column']}]",
                expected=str(weight["value"]),
                found=str(value),
            )


def _stored_weight(written: Checkpoint, skeleton: Skeleton, weight: dict[str, Any]) -> float:
    """The value a written checkpoint has at a super weight's coordinates."""
    layer = weight["layer"]
    ffn = next(ffn for ffn in skeleton.ffns[layer] if weight["ffn"] in ffn.units)
    name = ffn.site.down if ffn.stacked else f"{ffn.site.down}.weight"
    target = f"{skeleton.layers_path}.{layer}.{name}"
    assembly = next(a for a in skeleton.inside[layer] if target in a.targets)
    skeleton.fill(skeleton.assemble(assembly, [written.read(stored) for stored in assembly.stored]))
    value = float(ffn.down_weight(ffn.units.index(weight["ffn"]))[weight["row"], weight["column"]])
    skeleton.drop([assembly])
    return value


def check_folder(folder: Path) -> None:
    """The gate for a finished folder, as before a push: it loads, and its weights and logits are finite."""
    check_loads(folder)
    written = Checkpoint.open(folder)
    ids = torch.arange(min(GATE_TOKENS, int(text_config(written.config).get("vocab_size", GATE_TOKENS))))[
        None
    ]
    options = cpu_options(written)
    _, logits = run_to_logits(written, ids, options)
    if not logits.isfinite().all():
        raise CheckpointError("the model's logits are not finite", where=folder.name)


def check_loads(folder: Path) -> None:
    """Raise CheckpointError unless AutoModelForCausalLM takes every tensor of `folder` and wants no other.

    Loaded onto the meta device: names and shapes are checked by transformers itself, no weight is read.
    """
    source = Checkpoint.open(folder)
    check_keys(folder, source.config)


def check_keys(folder: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError unless the Auto class of a config takes every tensor of `folder`, packed or not."""
    from transformers.utils import logging

    automatic = auto_class(build_config(config, folder.name))
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet_transformers():
            _, info = automatic.from_pretrained(
                str(folder), device_map="meta", output_loading_info=True, dtype="auto"
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError) as error:
        raise CheckpointError(
            "the checkpoint does not load", where=folder.name, found=str(error).splitlines()[0]
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            raise CheckpointError(
                f"the checkpoint does not load cleanly: {kind}",
                where=folder.name,
                found=str(sorted(info[kind], key=str)[:3]),
            )
