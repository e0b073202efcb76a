"""How fast layers of a model's shapes are on this machine, and from that how fast any cut of it will be.

Random models of the family are timed in transformers, each in a process of its own: with n and n / 2 layers,
with whole FFNs and with half of their channels; all in turn, in ROUNDS rounds, of which the median counts, so
that a machine that slows down slows all of them. The time of a token is fitted by least squares, relative to
each measurement, to

    t = e + a L + b P

for L layers with P parameters: e is what embeddings, head and sampling take, a what a layer takes whatever
its size, b what every parameter takes. n is the model's own number of layers, or as many as fill FILL bytes,
so that weights do not stay in a processor's cache that the model exceeds.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from surgery.bench.bench import run_child
from surgery.bench.settings import BenchSettings
from surgery.budget.target import SpeedModel
from surgery.checkpoint.transformers_model import build_config, build_model
from surgery.cut.config_depth import shortened_config
from surgery.cut.ffn_channels import planned_cut
from surgery.engine.open_model import Model
from surgery.errors import PlanError, SurgeonError
from surgery.plan.widths import width_changes
from surgery.progress import Progress, no_progress

SETTINGS = BenchSettings(prompt_tokens=256, new_tokens=48, batches=(1,), repeats=3)
ROUNDS = 3
FILL = 512 << 20  # bytes of layers that are timed, where the model has so many
LEAST = 4  # layers
MULTIPLE = 8  # of the narrower width
DECODE, PREFILL = "decode", "prefill"
Point = tuple[int, int, float]  # layers, their parameters, seconds a token


def measure_layer_speed(
    model: Model,
    of: str = DECODE,
    settings: BenchSettings = SETTINGS,
    progress: Progress[Any] = no_progress,
    run: Callable[[dict[str, Any], Path], dict[str, Any]] = run_child,
) -> SpeedModel:
    """The SpeedModel of a model on this machine, for `of` = "decode" (one token at a time, after the prompt
    of `settings`) or "prefill" (a token of that prompt).

    Raises SurgeonError where transformers can't run such a model here.
    """
    config, name, path = model.checkpoint.config, model.name, model.meta_model.layers_path
    count = len(model.meta_model.layers)
    in_layers = _layer_parameters(config, name, path)
    layer_bytes = in_layers * model.run.dtype.itemsize // count
    full = min(count, max(LEAST, -(-FILL // max(1, layer_bytes))))
    depths = sorted({max(1, full // 2), full})
    shapes = [(depth, fields) for depth in depths for fields in (config, _narrower(model))]
    settings = replace(settings, dtype=model.run.dtype_name, device=str(model.run.device))
    seconds: list[list[float]] = [[] for _ in shapes]
    configs = [shortened_config(fields, list(range(depth)), name) for depth, fields in shapes]
    runs = list(enumerate(configs)) * ROUNDS
    for place, short in progress(runs, "speed of layers", len(runs)):
        with tempfile.TemporaryDirectory(prefix="surgeon-speed-") as folder:
            found = run(
                {**settings.as_json(), "runtime": "random", "config": short, "model": name}, Path(folder)
            )
        speed = found.get("batches", [{}])[0].get(of)
        if speed is None:
            raise SurgeonError(
                "the speed of this model's layers can't be measured here",
                where=name,
                found=found.get("failed", "times too short to tell apart"),
                next_step="use --target-params or --target-size",
            )
        seconds[place].append(1 / speed["median"])
    points = [
        (depth, _layer_parameters(short, name, path), statistics.median(times))
        for (depth, _), short, times in zip(shapes, configs, seconds, strict=True)
    ]
    return fit(points, of, model.checkpoint.parameters - in_layers)


def fit(points: list[Point], of: str, ends_parameters: int) -> SpeedModel:
    """The SpeedModel nearest to measured points, by relative least squares; no part is below 0."""
    rows = torch.tensor([[1.0, layers, parameters] for layers, parameters, _ in points], dtype=torch.float64)
    seconds = torch.tensor([point[2] for point in points], dtype=torch.float64)
    rows = rows / seconds[:, None]
    columns = [0, 1, 2]
    while True:
        scale = rows[:, columns].norm(dim=0)
        found = torch.linalg.lstsq(rows[:, columns] / scale, torch.ones(len(points), 1, dtype=torch.float64))
        parts = (found.solution[:, 0] / scale).tolist()
        if min(parts) >= 0:
            break
        columns.remove(columns[min(range(len(parts)), key=lambda i: parts[i])])
    known = dict(zip(columns, parts, strict=True))
    return SpeedModel(of, known.get(0, 0.0), known.get(1, 0.0), known.get(2, 0.0), ends_parameters)


def _narrower(model: Model) -> dict[str, Any]:
    """The config with half of the FFN channels, or with all where they can't be halved."""
    try:
        changes = width_changes(model.meta_model.widths(), 0.5, None, MULTIPLE)
    except PlanError:
        return model.checkpoint.config
    return planned_cut(model.meta_model, changes).config


def _layer_parameters(config: dict[str, Any], name: str, path: str) -> int:
    """Parameters of all decoder layers, which the model has at `path`."""
    built = build_model(build_config(config, name), torch.float32, name)
    return sum(parameter.numel() for parameter in built.get_submodule(path).parameters())
