"""`surgeon prune --heal TOKENS`: train the result, in one round or in several of index, cut and heal."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from surgery.cli.common import bars, say
from surgery.cli.heal_options import HowToTrain, TrainingOptions, how_to_train
from surgery.cli.options import CalibrationOptions, collected
from surgery.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from surgery.budget.heal_cost import HealCost
    from surgery.budget.prune_cost import PruneCost
    from surgery.cli.prune_options import CutOptions
    from surgery.engine.open_model import Model
    from surgery.heal.heal_text import HealText
    from surgery.index.channel_index import ChannelIndex
    from surgery.plan.prune_plan import PrunePlan
    from surgery.pruning.prune import Provenance


@dataclass(frozen=True)
class HealingOptions(HowToTrain):
    """Whether and how to heal after a cut, as the command line says it."""

    heal_tokens: str | None
    rounds: int

    def check(self) -> None:
        """Raise UsageError for options of a heal without one."""
        source = click.get_current_context().get_parameter_source
        given = [field.name for field in fields(self) if source(field.name) is ParameterSource.COMMANDLINE]
        if self.heal_tokens is None and given:
            raise UsageError(
                "this option says how to heal",
                where=", ".join(f"--{name.replace('_', '-')}" for name in given),
                next_step="give --heal TOKENS, as --heal 1M",
            )

    def training(self, text: CalibrationOptions) -> TrainingOptions:
        """These as the options of `surgeon heal`, on the calibration texts."""
        how = {field.name: getattr(self, field.name) for field in fields(HowToTrain)}
        return TrainingOptions(
            tokens_seen=self.heal_tokens or "",
            heal_texts=text.calibration,
            text_weights=text.calibration_weights,
            text_column=text.text_column,
            block_size=text.block_size,
            seed=text.seed,
            save_adapter=None,  # it would fit the cut before its heal, which is not written
            **how,
        )

    @property
    def words(self) -> list[str]:
        """The options as words."""
        if self.heal_tokens is None:
            return []
        words = ["--heal", self.heal_tokens, *(["--rounds", str(self.rounds)] if self.rounds > 1 else [])]
        return words + self.how_words


healing_options = collected(
    HealingOptions,
    "healing",
    [
        click.option(
            "--heal",
            "heal_tokens",
            metavar="TOKENS",
            help="Then train the result towards MODEL on so many tokens of the calibration texts, as 1M.",
        ),
        click.option(
            "--rounds",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Reach the size in so many rounds of index, cut and heal; --heal counts the tokens of all.",
        ),
        *how_to_train,
    ],
)


@dataclass(frozen=True)
class Healing:
    """A heal that is judged to be possible, before anything is computed: its text, and its cost at most."""

    options: HealingOptions
    training: TrainingOptions
    text: HealText
    cost: HealCost
    spike_prompt: str | None

    @classmethod
    def prepare(
        cls, model: Model, options: HealingOptions, cut: CutOptions, text: CalibrationOptions
    ) -> Healing | None:
        """None where no heal is asked for. Raises UsageError, PlanError, CalibrationError, MemoryBudgetError.

        The cost is that of a student as large as MODEL, which the pruned one is smaller than.
        """
        from surgery.heal.options import estimate_heal
        from surgery.heal.rounds import round_sizes

        options.check()
        if options.heal_tokens is None:
            return None
        if cut.pad:
            raise UsageError("training would fill the zeros of a padded model", where="--pad, --heal")
        round_sizes(model.meta_model.widths(), vars(cut), options.rounds)
        training = options.training(text)
        how, drawn = training.options(), training.draw(model)
        cost = estimate_heal(model, model, tuple(drawn.ids.shape), len(drawn.held_out.ids), how)
        return cls(options, training, drawn, cost, text.spike_prompt)

    def run(
        self,
        model: Model,
        index: ChannelIndex,
        plan: PrunePlan,
        destination: Path,
        measured: Callable[[Model], dict[str, Any]] | None,
        provenance: Provenance,
        cut: CutOptions,
        resume: bool,
        quiet: bool,
    ) -> None:
        """Prune and heal, and write the folder; says so where a heal did not help."""
        from surgery.heal.rounds import Reports, prune_and_heal
        from surgery.index.calibration import calibration_of

        else_gone = {"cuts": {part.kind: part.facts for part in plan.cuts}} if plan.cuts else {}
        result = prune_and_heal(
            model,
            calibration_of(index, model, self.spike_prompt),
            self.text,
            destination,
            self.training.options(),
            cut={**vars(cut), "seed": self.training.seed, **else_gone},
            rounds=self.options.rounds,
            index=index,
            plan=plan,
            overwrite=True,  # checked before anything was computed
            provenance=provenance,
            resume=resume,
            reports=Reports(lambda line: say(line, quiet), measured, bars(quiet)),
        )
        if not result.history.improved:
            say("The last heal did not help: the folder has the weights before it", quiet=False)


def show_heal_dry_run(
    model: Model, healing: Healing, cost: PruneCost, lines: list[str], fields: dict[str, Any], as_json: bool
) -> None:
    """Print what a cut and its heal take."""
    from surgery.budget.machine import measure_machine
    from surgery.cli.costs import cost_json, heal_cost_lines, time_line

    machine = measure_machine(model, wide=bool(cost.float64_flops))
    if as_json:
        heal = {"text": healing.text.as_json(), "options": healing.training.options().as_json()}
        heal |= cost_json(healing.cost, machine, 1)
        click.echo(json.dumps({**fields, **cost_json(cost, machine, 1), "heal": heal}, indent=1))
        return
    more = f", in {healing.options.rounds} rounds; the cut's figures are those of one" * (
        healing.options.rounds > 1
    )
    healed = [f"Healing, at most{more}:", *heal_cost_lines(healing.cost), time_line(healing.cost, machine, 1)]
    click.echo("\n".join([*lines, time_line(cost, machine, 1), *healed]))
