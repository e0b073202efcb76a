"""What `surgeon frontier` is about to do: its points, their sizes, and what they take."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from surgery import defaults
from surgery.byte_units import format_bytes, format_duration
from surgery.cli.common import calibration_shape, check_prunable
from surgery.cli.frontier_options import MeasureOptions, PointOptions
from surgery.cli.heal_options import parse_count
from surgery.cli.options import CalibrationOptions, ModelOptions

if TYPE_CHECKING:
    from surgery.budget.budget import Cost
    from surgery.engine.open_model import Model
    from surgery.frontier.points import Point
    from surgery.heal.heal_text import HealText
    from surgery.index.channel_index import ChannelIndex
    from surgery.text import TokenBlocks


@dataclass(frozen=True)
class FrontierJob:
    """What a frontier is made of: models opened, points chosen, texts drawn; no weight is read yet."""

    model: Model
    other: Model | None
    points: list[Point]
    texts: list[TokenBlocks]
    healing: HealText | None
    chosen: PointOptions

    @classmethod
    def prepare(
        cls,
        how: ModelOptions,
        source: str,
        chosen: PointOptions,
        measured: MeasureOptions,
        calibration: CalibrationOptions,
    ) -> FrontierJob:
        """Open the models and draw the texts. Raises what can be refused before any work."""
        from surgery.evaluate.perplexity import evaluation_blocks
        from surgery.frontier.points import all_points
        from surgery.plan.widths import width_changes

        model = how.open(source)
        check_prunable(model)
        for sparsity in chosen.sparsities:
            width_changes(model.meta_model.widths(), sparsity, None, chosen.multiple_of)
        other = None if chosen.against is None else replace(how, revision=()).open(chosen.against)
        healing = heal_text(model, chosen.heal_tokens, calibration)
        key = "" if other is None else digest(other.checkpoint.file_fingerprints())
        points = all_points(
            sorted(set(chosen.sparsities)),
            chosen.schemes(model),
            0 if chosen.heal_tokens is None else parse_count(chosen.heal_tokens),
            None if other is None else other.name,
            key,
        )
        texts = [
            evaluation_blocks(model, text, measured.text_blocks, measured.text_block_size)
            for text in measured.texts
        ]
        return cls(model, other, points, texts, healing, chosen)

    def plan(self, index: ChannelIndex | None, calibration: CalibrationOptions) -> FrontierPlan:
        """Sizes and costs of all points, before any work. Raises MemoryBudgetError."""
        from surgery.frontier.points import predicted_bytes

        weights = [] if index is None else [weight.as_json() for weight in index.super_weights]
        sizes = {}
        for point in self.points:
            if point.other is None:
                sizes[point.name] = predicted_bytes(self.model, point, weights, self.chosen.multiple_of)
        if self.other is not None:
            sizes[self.other.name] = self.other.checkpoint.nbytes
        shape = calibration_shape(index, calibration)
        costs = self._costs(shape, index is None)
        made = [sizes[point.name] for point in self.points if point.other is None and point.slug != "dense"]
        tuned = [sizes[point.name] for point in self.points if point.tuned]
        return FrontierPlan(self.model, sizes, costs, sum(made), max(tuned, default=0), index is None)

    def _costs(self, calibration: tuple[int, int], indexes: bool) -> list[Cost]:
        """What every step takes: the index, cuts, heals, and the passes that measure the points."""
        from surgery.budget.index_cost import index_cost
        from surgery.budget.pass_cost import rounding_cost
        from surgery.evaluate.agreement import agreement_cost
        from surgery.heal.options import HealOptions, estimate_heal
        from surgery.pruning.jobs import estimate_prune
        from surgery.quantize.autoround import autoround_cost

        model = self.model
        costs: list[Cost] = []
        if indexes:
            costs.append(index_cost(model.meta_model, *calibration, model.run))
        for point in self.points:
            if point.is_cut and not point.healed and point.scheme is None:
                costs.append(
                    estimate_prune(
                        model,
                        sparsity=point.sparsity,
                        intermediate_size=None,
                        multiple_of=self.chosen.multiple_of,
                        allocation=defaults.ALLOCATION,
                        repair=self.chosen.repair,
                        calibration=calibration,
                    )
                )
            if point.healed and point.scheme is None:
                assert self.healing is not None
                shape = tuple(self.healing.ids.shape)
                costs.append(
                    estimate_heal(model, model, shape, len(self.healing.held_out.ids), HealOptions())
                )
        shapes = [tuple(blocks.ids.shape) for blocks in self.texts]
        both = agreement_cost(model, model, shapes)  # the dense model's passes, and a point's
        alone = replace(both, flops=both.flops / 4, read_bytes=both.read_bytes // 2)
        for point in self.points:
            if point.tuned:
                costs.append(autoround_cost(model, calibration))
            elif point.scheme is not None:
                costs.append(rounding_cost(model.meta_model, model.run))
        return [*costs, *([alone] * (len(self.points) + 1))]


@dataclass(frozen=True)
class FrontierPlan:
    """Bytes of every point by name, and what making and measuring them takes.

    `temporary_bytes` is what AutoRound writes to the folder of temporary files for the largest point.
    """

    model: Model
    sizes: dict[str, int]
    costs: list[Cost]
    disk_bytes: int
    temporary_bytes: int
    indexes: bool

    def lines(self) -> list[str]:
        """What there is to say before the work, without time."""
        least = max(cost.smallest_bytes for cost in self.costs)
        read = sum(cost.read_bytes for cost in self.costs)
        flops = sum(cost.flops for cost in self.costs)
        return [
            *(f"{name}: {format_bytes(size)}" for name, size in self.sizes.items()),
            *(["An index is made first"] if self.indexes else []),
            f"Memory: {format_bytes(least)} at least; speeds need the whole model in memory",
            f"Disk for checkpoints, until the end: {format_bytes(self.disk_bytes)}",
            f"Weights read: {format_bytes(read)}; {flops / 1e12:,.1f} TFLOP",
        ]

    def seconds(self) -> float:
        """Seconds of all steps on this machine, without those that measure speed."""
        from surgery.budget.machine import measure_machine

        wide = any(getattr(cost, "float64_flops", 0) for cost in self.costs)  # repairs
        machine = measure_machine(self.model, wide=wide)
        return sum(max(cost.seconds(machine).values()) for cost in self.costs)


def show_plan(plan: FrontierPlan, as_json: bool) -> None:
    """Print what a frontier takes."""
    seconds = plan.seconds()
    if as_json:
        fields = {
            "points": [{"name": name, "bytes": size} for name, size in plan.sizes.items()],
            "costs": {
                "smallest_bytes": max(cost.smallest_bytes for cost in plan.costs),
                "read_bytes": sum(cost.read_bytes for cost in plan.costs),
                "flops": sum(cost.flops for cost in plan.costs),
                "disk_bytes": plan.disk_bytes,
                "seconds": seconds,
            },
        }
        click.echo(json.dumps(fields, indent=1))
        return
    click.echo(
        "\n".join([*plan.lines(), f"Time on this machine: about {format_duration(seconds)}, speeds aside"])
    )


def heal_text(model: Model, tokens: str | None, text: CalibrationOptions) -> HealText | None:
    """The blocks to heal on; None without --heal."""
    if tokens is None:
        return None
    from surgery.heal.heal_text import draw_heal_text

    return draw_heal_text(
        model,
        text.calibration,
        blocks=max(1, parse_count(tokens) // text.block_size),
        block_size=text.block_size,
        seed=text.seed,
        weights=text.calibration_weights,
        text_column=text.text_column,
    )


def digest(fields: Any) -> str:
    """Eight hex digits of JSON fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]
