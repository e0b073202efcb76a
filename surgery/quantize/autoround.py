"""Rounding by AutoRound, which trains how every weight is rounded (SignRound, arXiv 2309.05516).

Of each decoder layer's matrices the library auto-round trains an offset in [-1/2, 1/2] of every weight and
the range of every group, by the sign of the gradient of the squared error of the layer's output on
calibration text. It holds the whole model in memory, and runs in a process of its own, because it changes
transformers. What it returns is packed codes and scales, which are written as those of rounding to nearest
are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import surgery
from surgery.budget.budget import Budget
from surgery.budget.model_size import ModelSize
from surgery.budget.pass_cost import PassCost, rounding_cost
from surgery.byte_units import format_bytes
from surgery.checkpoint.transformers_model import text_config
from surgery.engine.open_model import Model
from surgery.errors import AutoRoundError, MemoryBudgetError, UnsupportedModelError, UsageError
from surgery.quantize.compressed_tensors import PARTS, unpacked
from surgery.quantize.plan import QuantizePlan, plan_quantization
from surgery.quantize.rounding import Scheme

PACKAGE = Path(surgery.__file__).parent.parent  # where the job finds this package
STEPS = 200  # of training a layer, the library's default
BATCH = 8  # blocks of a step
BITS = (2, 3, 4, 8)
TINY = 1e-30  # a matrix of zeros is rounded to zeros
MULTIPLE = 32  # of the sides of a matrix; the library passes over others
SEED = 42


def check_autoround(model: Model, scheme: Scheme) -> None:
    """Raise UsageError or UnsupportedModelError for what AutoRound can't round, or if it is not installed.

    Nothing is refused for a scheme that rounds to nearest.
    """
    if not scheme.tuned:
        return
    if find_spec("auto_round") is None:
        raise UsageError(
            "AutoRound is done by the library auto-round, which is not installed",
            next_step="pip install 'ffn-surgeon[autoround]', or round to nearest",
        )
    if not scheme.symmetric or scheme.granularity not in ("group", "channel") or scheme.bits not in BITS:
        raise UsageError(
            "AutoRound rounds symmetrically, with a scale for each row or group",
            expected=f"{', '.join(map(str, BITS))} bits, symmetric, groups or channels",
            found=scheme.name,
        )
    checkpoint = model.checkpoint
    folder = Path(checkpoint.source.path)
    missing = sorted(
        {entry.file for entry in checkpoint.tensors.values() if not (folder / entry.file).exists()}
    )
    if checkpoint.stored_form is not None or missing:
        raise UnsupportedModelError(
            "AutoRound reads a model from a folder with all its safetensors files",
            where=checkpoint.name,
            found=checkpoint.stored_form or f"{missing[0]} is not in it",
            next_step="round to nearest, or give a folder: hf download ORG/NAME --local-dir FOLDER",
        )
    if "per_layer_config" in text_config(checkpoint.config):
        raise UnsupportedModelError(
            "AutoRound loads the model by a class of transformers, whose layers are all alike",
            where=checkpoint.name,
            found="per_layer_config",
            next_step="round to nearest",
        )
    _check_matrices(model, plan_quantization(model.meta_model, [], scheme, "none"))


def _check_matrices(model: Model, plan: QuantizePlan) -> None:
    """Raise UnsupportedModelError for a plan with a matrix that the library passes over or names otherwise.

    Experts that transformers joins in memory are such matrices.
    """
    other = [name for name in plan.tensors if plan.modules.get(name, "") + ".weight" != name]
    if other:
        raise UnsupportedModelError(
            "AutoRound rounds matrices that are a module of their own, under the name they are stored by",
            where=other[0],
            next_step="round to nearest",
        )
    tensors = model.checkpoint.tensors
    odd = [name for name in plan.tensors if any(size % MULTIPLE for size in tensors[name].shape)]
    if odd:
        raise UnsupportedModelError(
            f"AutoRound rounds matrices whose sides are multiples of {MULTIPLE}",
            where=odd[0],
            found=" x ".join(map(str, tensors[odd[0]].shape)),
            next_step="round to nearest, or cut to another width (--multiple-of)",
        )


def autoround_cost(model: Model, shape: tuple[int, ...], steps: int | None = None) -> PassCost:
    """The cost of tuning on blocks of `shape` [N, T]. Raises MemoryBudgetError.

    In memory are the model, in float32 where the machine has no fast bfloat16; inputs and outputs of a layer
    and their masks; activations of a step; and 28 bytes for every weight of a layer that is trained.
    """
    blocks, block_size = shape
    size = ModelSize.of(model.meta_model, model.run.dtype, block_size)
    states = 2 * blocks * block_size * size.hidden * 4 + 4 * blocks * block_size**2
    itemsize = model.run.dtype.itemsize
    weights = size.layer // itemsize
    activations = size.saved_token * min(BATCH, blocks) * block_size
    numbers = sum(entry.numel for entry in model.checkpoint.tensors.values())
    needed = max(model.checkpoint.nbytes, numbers * itemsize) + states + activations + 28 * weights
    budget = Budget.of(model.run)
    smallest = budget.smallest(needed)
    limit = budget.usable if budget.on_device else model.run.memory
    if smallest > limit:
        raise MemoryBudgetError(
            "AutoRound holds the whole model, which is more than the memory budget",
            where=model.checkpoint.name,
            expected=f"at least {format_bytes(smallest)}",
            found=format_bytes(limit),
            next_step="round to nearest, or use fewer or smaller --blocks",
        )
    layers = len(model.meta_model.layer_parameters)
    trained = (steps or STEPS) * min(BATCH, blocks)
    seen = 3 * trained + 2 * blocks  # forward and backward of a step; inputs and outputs
    flops = 2.0 * layers * size.layer / itemsize * seen * block_size
    return replace(
        rounding_cost(model.meta_model, model.run),
        host_bytes=needed,
        device_bytes=needed * budget.on_device,
        smallest_bytes=smallest,
        flops=flops,
    )


@dataclass(frozen=True)
class TunedMatrices(Mapping[str, dict[str, torch.Tensor]]):
    """Packed parts (PARTS) of matrices by stored name, in the safetensors files of a folder.

    Headers are read when a matrix is first asked for, so that the folder need not be there before.

    `tuning` is what surgeon.json says of the training: `steps` of a layer, `blocks` of `block_size` tokens
    and the sha256 of their ids, `seed`, the version of auto_round.
    """

    folder: Path
    tuning: dict[str, Any]

    @cached_property
    def files(self) -> dict[str, Path]:
        """The file of every matrix."""
        files: dict[str, Path] = {}
        for path in sorted(self.folder.rglob("*.safetensors")):
            with safe_open(path, framework="pt") as stored:
                names = [name for name in stored.keys() if name.endswith(f".{PARTS[0]}")]  # noqa: SIM118
            files |= {name.removesuffix(PARTS[0]) + "weight": path for name in names}
        return files

    def __getitem__(self, name: str) -> dict[str, torch.Tensor]:
        stem = name.removesuffix("weight")
        with safe_open(self.files[name], framework="pt") as stored:
            return {part: stored.get_tensor(stem + part) for part in PARTS}

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def parts(self, name: str, tensor: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
        """The parts of a matrix, scales in the dtype of the stored `tensor` W [R, C].

        Raises AutoRoundError where the rounded values are further from W than 0 is: then they are those of
        another matrix, or not finite.
        """
        parts = self[name]
        parts["weight_scale"] = parts["weight_scale"].to(tensor.dtype)
        values = unpacked(parts, scheme).float()
        if not (values - tensor.float()).norm() < tensor.float().norm().clamp_min(TINY):
            raise AutoRoundError("AutoRound gave values that are not those of the matrix", where=name)
        return parts


@contextmanager
def tuned_matrices(
    model: Model,
    plan: QuantizePlan,
    ids: torch.Tensor | None,
    steps: int | None = None,
    *,
    quiet: bool = False,
) -> Iterator[TunedMatrices | None]:
    """The matrices of a plan, tuned on calibration blocks of ids [N, T]; they are gone afterwards.

    None where the plan rounds to nearest, which needs no ids. Raises UsageError and UnsupportedModelError as
    `check_autoround`, AutoRoundError where the library fails.
    """
    check_autoround(model, plan.scheme)
    if not plan.scheme.tuned:
        yield None
        return
    assert ids is not None
    with tempfile.TemporaryDirectory(prefix="surgeon-autoround-") as name:
        folder = Path(name)
        save_file({"ids": ids.to(torch.int32).contiguous()}, folder / "ids.safetensors")
        scheme = plan.scheme
        job: dict[str, Any] = {
            "model": str(Path(model.checkpoint.source.path).absolute()),
            "ids": str(folder / "ids.safetensors"),
            "scheme": {
                "bits": scheme.bits,
                "group_size": scheme.size if scheme.granularity == "group" else -1,
                "sym": True,
                "data_type": "int",
                "act_bits": 16,
            },
            "ignored": list(plan.ignored),
            # that of the packed files: scales trained in another lose digits when they are written
            "scale_dtype": str(model.checkpoint.tensors[plan.tensors[0]].dtype).removeprefix("torch."),
            "batch": min(BATCH, len(ids)),
            "steps": steps or STEPS,
            "seed": SEED,
            "device": str(model.run.device),
            "out": str(folder / "out"),
            "error": str(folder / "error"),
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _run(folder, quiet)
        tuning: dict[str, Any] = {
            "steps": job["steps"],
            "blocks": ids.shape[0],
            "block_size": ids.shape[1],
            "sha256": sha256(ids.int().numpy().tobytes()).hexdigest(),
            "seed": SEED,
            "auto_round": version("auto-round"),
        }
        tuned = TunedMatrices(folder / "out", tuning)
        other = sorted(set(plan.tensors) ^ set(tuned))
        if other:
            raise AutoRoundError(
                "AutoRound rounded other matrices than those of the plan",
                where=model.checkpoint.name,
                found=f"{len(other)} differ, as {other[0]}",
                next_step="round to nearest",
            )
        yield tuned


def _run(folder: Path, quiet: bool) -> None:
    """Run the job in a folder; the library's progress goes to stderr.

    -P keeps modules of the current folder, which may be a checkpoint's, from being imported. The job ends
    when its stdin does, also where this process is killed.
    """
    command = [sys.executable, "-P", "-m", "surgery.quantize.autoround_job", str(folder / "job.json")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AR_")}
    environment |= {"AR_LOG_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    paths = [str(PACKAGE), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if quiet else None,
    ) as process:
        try:
            status = process.wait()
        except BaseException:
            process.kill()
            raise
    if status:
        told = folder / "error"
        found = told.read_text(encoding="utf-8") if told.exists() else f"exit status {status}"
        if status == -9:
            found = "killed, perhaps for lack of memory"
        raise AutoRoundError(
            "AutoRound failed", where="the library auto-round", found=found, next_step="round to nearest"
        )
