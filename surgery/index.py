"""ChannelIndex: what every FFN channel of a model is worth, and which single weights carry it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from surgery import halo as halo_module
from surgery.checkpoint import Checkpoint
from surgery.errors import IndexMismatchError
from surgery.super_weights import SuperWeight

SCHEMA_VERSION = 1
JSON_FILE, TENSOR_FILE = "index.json", "index.safetensors"
STATISTICS = (
    "loss_proxy",
    "activation_power",
    "curvature",
    "taylor",
    "mean",
    "max_abs",
    "gate_norm",
    "up_norm",
    "down_norm",
    "down_l1",
    "halo_connectivity",
    "halo_redundancy",
)
Item = TypeVar("Item")
Track = Callable[[Iterable[Item], str, int], Iterator[Item]]


@dataclass
class LayerIndex:
    """One layer: `statistics` by name ([F] float32) and `supernodes` as sorted channel indices."""

    statistics: dict[str, torch.Tensor]
    supernodes: torch.Tensor
    maxima: dict[str, float] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Number of channels F."""
        return len(self.statistics["loss_proxy"])

    @property
    def halo(self) -> torch.Tensor:
        """Sorted indices of the halo: the top 10% of the other channels by connectivity."""
        return halo_module.halo(self.statistics["halo_connectivity"], self.supernodes)

    def summary(self) -> dict[str, Any]:
        """The entry of `layers` in index.json."""
        values = self.statistics
        norms = values["gate_norm"] + values["up_norm"] + values["down_norm"]
        return {
            "width": self.width,
            "lp_share": {
                str(fraction): halo_module.mass_share(values["loss_proxy"], fraction)
                for fraction in (0.001, 0.01, 0.05)
            },
            "supernodes": self.supernodes.tolist(),
            "overlap": {
                "activation_power": halo_module.overlap(self.supernodes, values["activation_power"]),
                "max_abs": halo_module.overlap(self.supernodes, values["max_abs"]),
                "weight_norm": halo_module.overlap(self.supernodes, norms),
            },
            "halo": {
                "channels": len(self.halo),
                "redundancy_mean": float(values["halo_redundancy"][self.halo].mean())
                if len(self.halo)
                else 0.0,
            },
            "prompt_max": self.maxima,
        }


@dataclass
class ChannelIndex:
    """Statistics of all layers, super weights, and where all of it came from."""

    source: dict[str, Any]
    calibration: dict[str, Any]
    run: dict[str, Any]
    loss: dict[str, float]
    layers: list[LayerIndex]
    super_weights: list[SuperWeight]
    echoes: list[SuperWeight]
    input_ids: torch.Tensor

    def as_json(self) -> dict[str, Any]:
        """The content of index.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "calibration": self.calibration,
            "run": self.run,
            "loss": self.loss,
            "layers": [layer.summary() for layer in self.layers],
            "super_weights": [weight.as_json() for weight in self.super_weights],
            "echoes": [weight.as_json() for weight in self.echoes],
        }

    def save(self, folder: Path) -> None:
        """Write index.json and index.safetensors into an existing folder."""
        tensors = {"calibration.input_ids": self.input_ids.to(torch.int32).contiguous()}
        for number, layer in enumerate(self.layers):
            for name in STATISTICS:
                tensors[f"layers.{number}.{name}"] = layer.statistics[name].contiguous()
        save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
        text = json.dumps(self.as_json(), indent=1, allow_nan=False)
        (folder / JSON_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> ChannelIndex:
        """Read an index folder. Raises IndexMismatchError when it is not one, or is damaged."""
        path = Path(folder)
        try:
            fields = json.loads((path / JSON_FILE).read_text(encoding="utf-8"))
            tensors = load_file(path / TENSOR_FILE)
            if fields["schema_version"] != SCHEMA_VERSION:
                raise IndexMismatchError(
                    "the index was written by another version",
                    where=path.name,
                    expected=f"schema_version {SCHEMA_VERSION}",
                    found=str(fields["schema_version"]),
                    next_step="run surgeon index again",
                )
            layers = [
                LayerIndex(
                    {name: tensors[f"layers.{number}.{name}"] for name in STATISTICS},
                    torch.tensor(entry["supernodes"], dtype=torch.long),
                    entry.get("prompt_max", {}),
                )
                for number, entry in enumerate(fields["layers"])
            ]
            return cls(
                source=fields["source"],
                calibration=fields["calibration"],
                run=fields["run"],
                loss=fields["loss"],
                layers=layers,
                super_weights=[SuperWeight.from_json(entry) for entry in fields["super_weights"]],
                echoes=[SuperWeight.from_json(entry) for entry in fields["echoes"]],
                input_ids=tensors["calibration.input_ids"],
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise IndexMismatchError(
                "not a readable index folder",
                where=path.name,
                expected=f"{JSON_FILE} and {TENSOR_FILE}",
                found=f"{type(error).__name__}: {error}",
                next_step="run surgeon index again",
            ) from error

    def check_source(self, checkpoint: Checkpoint) -> None:
        """Raise IndexMismatchError unless this index describes that checkpoint (tensor names, dtypes, shapes)."""
        if self.source["shape_digest"] != checkpoint.shape_digest:
            raise IndexMismatchError(
                "the index was made from another checkpoint",
                where=checkpoint.name,
                expected=f"the tensors of {self.source['name']}",
                found="other names, dtypes or shapes",
                next_step="index this checkpoint, or name the right --index",
            )


def source_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `source` entry of index.json and surgeon.json."""
    return {
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "model_type": checkpoint.config.get("model_type"),
        "config_digest": checkpoint.config_digest,
        "shape_digest": checkpoint.shape_digest,
        "parameters": checkpoint.parameters,
        "bytes": checkpoint.nbytes,
    }


def untracked(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:  # noqa: ARG001
    """The progress bar that shows nothing."""
    yield from items
