"""ChannelIndex: statistics of every FFN channel of a model, and its super weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from surgery.checkpoint.reader import Checkpoint
from surgery.errors import IndexMismatchError
from surgery.index import supernodes as supernode_module
from surgery.index.block_sums import BlockSums, restored, stored
from surgery.index.super_weights import SuperWeight
from surgery.model.families import DENSE, EXPERT

SCHEMA_VERSION = 1


JSON_FILE, TENSOR_FILE, SAMPLE_FILE = "index.json", "index.safetensors", "sample.safetensors"
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
LATER = ("halo_redundancy_published", "weight_range")  # missing from indexes of earlier versions
SECOND_ORDER = ("obs", "obs_loss", "unexplained", "taylor_weight", "read_norm")  # with --second-order


@dataclass
class FfnIndex:
    """Index of one FFN: a dense FFN, a shared FFN, or one expert.

    `statistics` are [F] float32 by name; `supernodes` sorted channel indices. `tokens` is the number of
    calibration tokens that reached the FFN; an expert that no token was routed to has no supernodes. `sample`
    [S, F] is q = u * dL/du of every `sample_stride`-th token, with --save-samples. For an expert, `positions`
    [S] are the positions of these tokens in their blocks. `by_block` [2, N, F] are LP and activation power
    summed over each block, with --save-samples too. `block_sums` is what intervals are computed from; None in
    indexes of earlier versions.
    """

    statistics: dict[str, torch.Tensor]
    supernodes: torch.Tensor
    tokens: int
    sample: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    kind: str = DENSE
    expert: int | None = None
    by_block: torch.Tensor | None = None
    block_sums: BlockSums | None = None

    @property
    def width(self) -> int:
        """Number of channels F."""
        return len(self.statistics["loss_proxy"])

    @property
    def halo(self) -> torch.Tensor:
        """Sorted indices of the halo: the top 10% of the other channels by connectivity."""
        if len(self.supernodes) == 0:
            return self.supernodes
        return supernode_module.halo(self.statistics["halo_connectivity"], self.supernodes)


@dataclass
class LayerIndex:
    """One decoder layer: its FFNs by name ("dense", "shared", "expert.0", …), and `maxima`.

    `maxima` are the largest |input| and |output| of the down projections on the first prompt.
    """

    ffns: dict[str, FfnIndex]
    maxima: dict[str, float] = field(default_factory=dict)

    @property
    def experts(self) -> list[FfnIndex]:
        """The routed experts; empty in a dense layer."""
        return [ffn for ffn in self.ffns.values() if ffn.expert is not None]

    @property
    def others(self) -> dict[str, FfnIndex]:
        """The FFNs that process every token."""
        return {name: ffn for name, ffn in self.ffns.items() if ffn.expert is None}

    @property
    def main(self) -> list[FfnIndex]:
        """The FFNs that a layer's figures are of: its routed experts, or its dense FFN."""
        return self.experts or list(self.ffns.values())[:1]

    @property
    def statistics(self) -> dict[str, torch.Tensor]:
        """Statistics by name: [E, F] for routed experts, [F] for a dense FFN."""
        if self.experts:
            names = self.experts[0].statistics
            return {name: torch.stack([e.statistics[name] for e in self.experts]) for name in names}
        return next(iter(self.ffns.values())).statistics

    @property
    def supernodes(self) -> torch.Tensor:
        """Sorted supernodes of a dense FFN; for experts, indices into the flattened [E, F] statistics."""
        if self.experts:
            return torch.cat([e.supernodes + n * e.width for n, e in enumerate(self.experts)])
        return next(iter(self.ffns.values())).supernodes

    @property
    def width(self) -> int:
        """Channels of the dense FFN, or of one expert; 0 without an FFN."""
        return (self.experts or list(self.ffns.values()))[0].width if self.ffns else 0

    def summary(self) -> dict[str, Any]:
        """The entry of `layers` in index.json."""
        if not self.ffns:
            return {
                "width": 0,
                "lp_share": {},
                "supernodes": [],
                "overlap": {},
                "halo": {"channels": 0, "redundancy_mean": 0.0},
            }
        fields = _summary(self.main)
        fields["supernodes"] = self.supernodes.tolist()
        fields["prompt_max"] = self.maxima
        if self.experts:
            fields["experts"] = len(self.experts)
            fields["expert_tokens"] = [expert.tokens for expert in self.experts]
            for name, ffn in self.others.items():
                fields[name] = {**_summary([ffn]), "supernodes": ffn.supernodes.tolist()}
        return fields


def _summary(ffns: list[FfnIndex]) -> dict[str, Any]:
    """LP shares, overlaps and halo of FFNs of equal width.

    Averages over FFNs: LP shares are weighted by LP mass, overlaps by supernodes, redundancy by halo
    channels.
    """
    seen = [ffn for ffn in ffns if len(ffn.supernodes)]
    norms = [sum(f.statistics[n] for n in ("gate_norm", "up_norm", "down_norm")) for f in seen]
    mass = [float(f.statistics["loss_proxy"].double().sum()) for f in seen]
    cores = [len(f.supernodes) for f in seen]
    halos = [f.halo for f in seen]

    def average(values: list[float], weights: list[Any]) -> float:
        total = sum(weights)
        return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 0.0

    def overlaps(values: list[Any]) -> float:
        shares = [supernode_module.overlap(f.supernodes, v) for f, v in zip(seen, values, strict=True)]
        return average(shares, cores)

    return {
        "width": ffns[0].width,
        "lp_share": {
            str(fraction): average(
                [supernode_module.mass_share(f.statistics["loss_proxy"], fraction) for f in seen], mass
            )
            for fraction in (0.001, 0.01, 0.05)
        },
        "overlap": {
            "activation_power": overlaps([f.statistics["activation_power"] for f in seen]),
            "max_abs": overlaps([f.statistics["max_abs"] for f in seen]),
            "weight_norm": overlaps(norms),
        },
        "halo": {
            "channels": sum(len(members) for members in halos),
            "redundancy_mean": average(
                [
                    float(f.statistics["halo_redundancy"][members].mean()) if len(members) else 0.0
                    for f, members in zip(seen, halos, strict=True)
                ],
                [len(members) for members in halos],
            ),
        },
    }


@dataclass
class ChannelIndex:
    """Statistics of all layers, the super weights, and how they were computed.

    `widths` maps config keys to FFN widths, the key with the most channels first. `keys` maps a kind of FFN
    (dense, shared, experts) to its config key. `input_ids` [N, T] are the calibration blocks.
    """

    source: dict[str, Any]
    calibration: dict[str, Any]
    run: dict[str, Any]
    loss: dict[str, float]
    layers: list[LayerIndex]
    super_weights: list[SuperWeight]
    echoes: list[SuperWeight]
    input_ids: torch.Tensor
    widths: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.widths:  # built by hand, or by a version that supported one width only
            self.widths = {"intermediate_size": self.layers[0].width}

    def width_key(self, ffn: FfnIndex) -> str:
        """The config key that holds an FFN's width."""
        return self.keys.get(ffn.kind) or next(iter(self.widths))

    def as_json(self) -> dict[str, Any]:
        """The content of index.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "calibration": self.calibration,
            "run": self.run,
            "loss": self.loss,
            "widths": self.widths,
            "width_keys": self.keys,
            "layers": [layer.summary() for layer in self.layers],
            "super_weights": [weight.as_json() for weight in self.super_weights],
            "echoes": [weight.as_json() for weight in self.echoes],
        }

    def save(self, folder: Path) -> None:
        """Write index.json, index.safetensors and, if there are samples, sample.safetensors into a folder."""
        samples: dict[str, torch.Tensor] = {}
        tensors = {"calibration.input_ids": self.input_ids.to(torch.int32).contiguous()}
        for number, layer in enumerate(self.layers):
            tensors |= layer_tensors(number, layer)
            samples |= sample_tensors(number, layer)
        if samples:
            save_file(samples, folder / SAMPLE_FILE)
        save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
        text = json.dumps(self.as_json(), indent=1, allow_nan=False)
        (folder / JSON_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> ChannelIndex:
        """Read an index folder.

        Raises IndexMismatchError for a folder that is not an index, is damaged, or has another schema
        version.
        """
        path = Path(folder).expanduser()
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
            tokens = fields["calibration"]["tokens"]
            layers = [
                layer_from(number, entry, tensors, tokens) for number, entry in enumerate(fields["layers"])
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
                widths=fields.get("widths", {}),
                keys=fields.get("width_keys", {}),
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
        """Raise IndexMismatchError unless the checkpoint has the source's tensor names, dtypes and shapes."""
        if self.source["shape_digest"] != checkpoint.shape_digest:
            raise IndexMismatchError(
                "the index was made from another checkpoint",
                where=checkpoint.name,
                expected=f"the tensors of {self.source['name']}",
                found="other names, dtypes or shapes",
                next_step="index this checkpoint, or name the right --index",
            )


def layer_tensors(number: int, layer: LayerIndex) -> dict[str, torch.Tensor]:
    """Tensors of one layer by stored name: `layers.{i}.{name}`, or `layers.{i}.shared.{name}` if shared."""
    groups = {"": layer.statistics} if layer.ffns else {}
    if layer.experts:
        groups |= {f"{key}.": ffn.statistics for key, ffn in layer.others.items()}
    found = {
        f"layers.{number}.{prefix}{name}": value.contiguous()
        for prefix, statistics in groups.items()
        for name, value in statistics.items()
    }
    for prefix in groups:
        ffns = [layer.ffns[prefix[:-1]]] if prefix else layer.main
        sums = [ffn.block_sums for ffn in ffns]
        found |= stored(f"layers.{number}.{prefix}", sums, stacked=not prefix and bool(layer.experts))
    return found


def sample_name(number: int, ffn: str, kind: str = "q") -> str:
    """Stored name of one FFN's sample (`kind` "q"), its tokens' positions ("position"), or its "blocks"."""
    return f"layers.{number}.{ffn}.{kind}"


def sample_tensors(number: int, layer: LayerIndex) -> dict[str, torch.Tensor]:
    """Samples of one layer, their positions and the sums by block, by stored name."""
    found = {}
    for name, ffn in layer.ffns.items():
        for kind, tensor in (("q", ffn.sample), ("position", ffn.positions), ("blocks", ffn.by_block)):
            if tensor is not None:
                found[sample_name(number, name, kind)] = tensor.contiguous()
    return found


def layer_from(
    number: int, entry: dict[str, Any], tensors: dict[str, torch.Tensor], tokens: int
) -> LayerIndex:
    """Inverse of `layer_tensors` and `LayerIndex.summary`; `tokens` is the number of calibration tokens."""

    def load(prefix: str, expert: int | None = None) -> dict[str, torch.Tensor]:
        stem = f"layers.{number}.{prefix}"
        found = {name: tensors[stem + name] for name in STATISTICS}
        found |= {name: tensors[stem + name] for name in (*LATER, *SECOND_ORDER) if stem + name in tensors}
        return found if expert is None else {name: value[expert] for name, value in found.items()}

    def samples(ffn: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        sample, positions = (tensors.get(sample_name(number, ffn, kind)) for kind in ("q", "position"))
        return sample, positions

    core = torch.tensor(entry["supernodes"], dtype=torch.long)
    maxima = entry.get("prompt_max", {})
    if entry["width"] == 0:
        return LayerIndex({}, maxima)
    if "experts" not in entry:
        dense = FfnIndex(load(""), core, tokens, *samples(DENSE))
        return LayerIndex(_with_blocks(number, {DENSE: dense}, tensors), maxima)
    ffns = {}
    for expert, routed in enumerate(entry["expert_tokens"]):
        expert_core = core[core // entry["width"] == expert] % entry["width"]
        name = f"{EXPERT}{expert}"
        ffns[name] = FfnIndex(load("", expert), expert_core, routed, *samples(name), "experts", expert)
    for key in entry:
        if f"layers.{number}.{key}.loss_proxy" in tensors:
            shared = torch.tensor(entry[key]["supernodes"], dtype=torch.long)
            ffns[key] = FfnIndex(load(f"{key}."), shared, tokens, *samples(key), key)
    return LayerIndex(_with_blocks(number, ffns, tensors), maxima)


def _with_blocks(
    number: int, ffns: dict[str, FfnIndex], tensors: dict[str, torch.Tensor]
) -> dict[str, FfnIndex]:
    """The FFNs of a layer, given what is stored of their sums by block."""
    for name, ffn in ffns.items():
        prefix = "" if name == DENSE or ffn.expert is not None else f"{name}."
        ffn.block_sums = restored(f"layers.{number}.{prefix}", tensors, ffn.expert)
        ffn.by_block = tensors.get(sample_name(number, name, "blocks"))
    return ffns
