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
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from surgery.budget.budget import Budget, refuse_below
from surgery.budget.model_size import ModelSize
from surgery.budget.pass_cost import PassCost, rounding_cost
from surgery.engine.open_model import Model
from surgery.errors import NumericsError, SurgeonError, UnsupportedModelError, UsageError
from surgery.model.ffn import Ffn
from surgery.quantize.compressed_tensors import PARTS, unpacked
from surgery.quantize.plan import QuantizePlan
from surgery.quantize.rounding import Scheme

STEPS = 200  # of training a layer, the library's default
BATCH = 8  # blocks of a step
BITS = (2, 3, 4, 8)
MULTIPLE = 32  # of the sides of a matrix; the library passes over others
SEED = 42


def check_autoround(model: Model, scheme: Scheme) -> None:
    """Raise UsageError or UnsupportedModelError for what AutoRound can't round, or if it is not installed."""
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
    if checkpoint.stored_form is not None or not any(folder.glob("*.safetensors")):
        raise UnsupportedModelError(
            "AutoRound reads what transformers loads from a folder of safetensors",
            where=checkpoint.name,
            found=checkpoint.stored_form or "no such folder",
            next_step="round to nearest",
        )
    if "auto_map" in checkpoint.config:
        raise UnsupportedModelError(
            "AutoRound loads the model by a class of transformers, and this one needs code of its own",
            where=checkpoint.name,
            next_step="round to nearest",
        )


def check_matrices(model: Model, plan: QuantizePlan) -> None:
    """Raise UnsupportedModelError for a plan with a matrix that the library passes over."""
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
    """The cost of tuning on blocks of `shape` [N, T], and of writing. Raises MemoryBudgetError.

    In memory are the model, inputs and outputs of a layer, and the layer in float32 with what is trained.
    """
    blocks, block_size = shape
    size = ModelSize.of(model.meta_model, model.run.dtype, block_size)
    states = 2 * blocks * block_size * size.hidden * 4
    itemsize = model.run.dtype.itemsize
    needed = model.checkpoint.nbytes + states + 4 * 4 * size.layer // itemsize
    smallest = Budget.of(model.run).smallest(needed)
    refuse_below(smallest, model.run.memory, "host")
    layers = len(model.meta_model.layer_parameters)
    seen = (steps or STEPS) * min(
        BATCH, blocks
    ) * 3 + 2 * blocks  # forward and backward of a step; inputs and outputs
    flops = 2.0 * layers * size.layer / itemsize * seen * block_size
    return replace(
        rounding_cost(model.meta_model, model.run), host_bytes=needed, smallest_bytes=smallest, flops=flops
    )


@dataclass(frozen=True)
class TunedMatrices(Mapping[str, dict[str, torch.Tensor]]):
    """Packed parts (PARTS) of matrices by stored name, in the safetensors files of a folder.

    `tuning` is what surgeon.json says of the training: `steps` of a layer, `blocks` of `block_size` tokens.
    """

    files: dict[str, Path]
    tuning: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> TunedMatrices:
        """The packed matrices in a folder."""
        files: dict[str, Path] = {}
        for path in sorted(folder.rglob("*.safetensors")):
            with safe_open(path, framework="pt") as stored:
                names = [name for name in stored.keys() if name.endswith(f".{PARTS[0]}")]  # noqa: SIM118
            files |= {name.removesuffix(PARTS[0]) + "weight": path for name in names}
        return cls(files)

    def __getitem__(self, name: str) -> dict[str, torch.Tensor]:
        stem = name.removesuffix("weight")
        with safe_open(self.files[name], framework="pt") as stored:
            return {part: stored.get_tensor(stem + part) for part in PARTS}

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def parts(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of a matrix, scales in the dtype of the stored `tensor` [R, C]. Raises NumericsError."""
        parts = self[name]
        parts["weight_scale"] = parts["weight_scale"].to(tensor.dtype)
        if not parts["weight_scale"].isfinite().all():
            raise NumericsError("AutoRound gave scales that are not finite", where=name)
        return parts


@contextmanager
def tuned_matrices(
    model: Model, plan: QuantizePlan, ids: torch.Tensor, steps: int | None = None, *, quiet: bool = False
) -> Iterator[TunedMatrices]:
    """The matrices of a plan, tuned on calibration blocks of ids [N, T]; they are gone afterwards.

    Raises UsageError and UnsupportedModelError as `check_autoround`, SurgeonError where the library fails.
    """
    check_autoround(model, plan.scheme)
    check_matrices(model, plan)
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
            "batch": min(BATCH, len(ids)),
            "steps": steps or STEPS,
            "seed": SEED,
            "device": model.run.device.type,
            "out": str(folder / "out"),
            "error": str(folder / "error"),
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _run(folder, quiet)
        tuned = TunedMatrices.of(folder / "out")
        blocks, block_size = ids.shape
        told = {"steps": job["steps"], "blocks": blocks, "block_size": block_size}
        missing = sorted(set(plan.tensors) - set(tuned))
        if missing:
            raise UnsupportedModelError(
                "AutoRound did not round every matrix of the plan",
                where=model.checkpoint.name,
                found=f"{len(missing)} left, as {missing[0]}",
                next_step="round to nearest",
            )
        yield replace(tuned, tuning=told)


def _run(folder: Path, quiet: bool) -> None:
    """Run the job in a folder; the library's progress goes to stderr."""
    command = [sys.executable, "-m", "surgery.quantize.autoround_job", str(folder / "job.json")]
    environment = {**os.environ, "AR_LOG_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if quiet else None,
        check=False,
    )
    if done.returncode:
        told = folder / "error"
        found = told.read_text(encoding="utf-8") if told.exists() else f"exit status {done.returncode}"
        raise SurgeonError(
            "AutoRound failed", where="the library auto-round", found=found, next_step="round to nearest"
        )


@dataclass(frozen=True)
class InstallPacked:
    """An edit that installs the packed matrices of a folder in the resident layer, unpacked.

    `names` maps parameter paths in the layer to stored names.
    """

    folder: Path
    scheme: Scheme
    names: dict[str, str]

    def apply(self, _: list[Ffn], layer: nn.Module) -> int:
        """Change the resident layer; returns the number of matrices changed."""
        tuned = TunedMatrices.of(self.folder)
        for path, stored in self.names.items():
            layer.get_parameter(path).data.copy_(unpacked(tuned[stored], self.scheme))
        return len(self.names)
