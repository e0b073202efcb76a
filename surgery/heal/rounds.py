"""prune_and_heal: reach a size in one or several rounds of index, cut and heal.

What a round starts from is the healed result of the round before. Its folders lie in a journal beside the
result, so that an interrupted run goes on with the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery import defaults
from surgery.card.figures import save_figures
from surgery.card.publish import write_card
from surgery.checkpoint.manifest import MANIFEST, dump_manifest, read_manifest, source_json
from surgery.checkpoint.output_folder import check_destination, complete_folder, replace_text
from surgery.engine.open_model import Model
from surgery.engine.resume import Journal
from surgery.errors import PlanError, SurgeonError
from surgery.heal.heal import HealResult, heal
from surgery.heal.heal_text import HealText
from surgery.heal.options import HealOptions
from surgery.index.build import build_index, index_fingerprint
from surgery.index.calibration import Calibration
from surgery.index.channel_index import ChannelIndex
from surgery.plan.composed import composed_plan
from surgery.plan.methods import METHODS
from surgery.plan.prune_plan import PrunePlan
from surgery.plan.widths import default_multiple, width_changes
from surgery.progress import Progress, no_progress
from surgery.pruning.plan_pruning import plan_pruning
from surgery.pruning.prune import Provenance, prune


@dataclass(frozen=True)
class Reports:
    """What a run tells while it works: `say` gets a line, `measure` measures a model for the card."""

    say: Callable[[str], None] = lambda _: None
    measure: Callable[[Model], dict[str, Any]] | None = None
    progress: Progress[Any] = no_progress


def round_sizes(
    widths: dict[str, int], cut: dict[str, Any], rounds: int
) -> list[dict[str, int | float | None]]:
    """The `sparsity` or `intermediate_size` of each round's cut of what the round before left.

    Every round keeps the same share of its channels: where the whole keeps a share k, n of R rounds keep
    k^(n/R). `widths` are those of the dense model by config key, `cut` the arguments of `plan_pruning` for
    the whole. Raises PlanError for widths per layer and for rounds of which one would remove nothing.
    """
    if rounds == 1:
        return [{name: cut.get(name) for name in ("sparsity", "intermediate_size")}]
    if cut.get("allocation", "uniform") != "uniform":
        raise PlanError(
            "several rounds need one width for all layers",
            where="--rounds",
            expected="--allocation uniform",
            found=cut["allocation"],
        )
    multiple = cut.get("multiple_of")
    last = width_changes(widths, cut.get("sparsity"), cut.get("intermediate_size"), multiple)
    share = last[0].after / last[0].before
    if len(widths) > 1:
        return [{"sparsity": 1 - share ** (1 / rounds), "intermediate_size": None}] * rounds
    before = last[0].before
    step = multiple or default_multiple(before)
    sizes = [round(before * share ** (done / rounds) / step) * step for done in range(1, rounds)]
    sizes.append(last[0].after)
    if any(size >= larger for larger, size in zip([before, *sizes], sizes, strict=False)):
        raise PlanError(
            "so many rounds would not remove channels in each",
            where="--rounds",
            expected=f"fewer, as widths are multiples of {step}",
            found=" → ".join(str(size) for size in (before, *sizes)),
        )
    return [{"sparsity": None, "intermediate_size": size} for size in sizes]


def prune_and_heal(
    model: Model,
    calibration: Calibration,
    text: HealText,
    out: str | Path,
    options: HealOptions | None = None,
    *,
    cut: dict[str, Any],
    rounds: int = 1,
    index: ChannelIndex | None = None,
    plan: PrunePlan | None = None,
    overwrite: bool = False,
    provenance: Provenance | None = None,
    resume: bool = True,
    reports: Reports | None = None,
) -> HealResult:
    """Prune `model` and heal the result towards it, in `rounds`, and write the last result to folder `out`.

    `cut` are the arguments of `plan_pruning` for the whole size. Every round has a fresh index on
    `calibration` (`index`, when given, is the first) and trains on its part of `text`; `plan` is the cut of
    an only round, where it is made already. A heal that does not help is left out. Manifest and card tell all
    rounds as one cut of `model`. Raises what `prune` and `heal` raise, and PlanError for a size that can't be
    reached in so many rounds.
    """
    destination = Path(out)
    check_destination(
        destination, overwrite=overwrite, source=model.folder, needs_bytes=3 * model.checkpoint.nbytes
    )
    run = _Rounds(model, calibration, text, options or HealOptions(), cut, rounds, reports or Reports(), plan)
    fingerprint = {
        "source": source_json(model.checkpoint),
        "files": model.checkpoint.file_fingerprints(),
        "calibration": calibration.blocks.as_json(),
        "index": None if index is None else index.run,
        "cut": cut,
        "plan": None if plan is None else plan.digest,
        "rounds": rounds,
        "text": text.as_json(),
        "options": run.options.as_json(),
        "run": model.run.as_json(),
    }
    journal = Journal(destination, fingerprint, resume=resume, kind="rounds")
    if journal.done:
        run.reports.say("Resuming an interrupted run")
    try:
        result = run.run(journal, destination, index, provenance or Provenance())
    except SurgeonError as error:
        journal.fail(error)
        raise
    journal.finish()
    return result


@dataclass(frozen=True)
class _Rounds:
    """The parts of one run."""

    model: Model
    calibration: Calibration
    text: HealText
    options: HealOptions
    cut: dict[str, Any]
    rounds: int
    reports: Reports
    plan: PrunePlan | None

    def run(
        self, journal: Journal, destination: Path, index: ChannelIndex | None, provenance: Provenance
    ) -> HealResult:
        """Carry out all rounds; what is marked in the journal is not done again."""
        sizes = round_sizes(self.model.meta_model.widths(), self.cut, self.rounds)
        start = self.model
        for number, size in enumerate(sizes, 1):
            last = number == self.rounds
            said = provenance if last else Provenance()
            if self.rounds > 1:
                self.reports.say(f"Round {number} of {self.rounds}")
            pruned = journal.path(f"round-{number}")
            if f"cut {number}" not in journal:
                self._cut(start, size, index if number == 1 else None, pruned, said)
                journal.mark(f"cut {number}")
            student = self.model.written(pruned)
            if last:
                return self._last(student, destination, said)
            healed = journal.path(f"round-{number}-healed")
            if f"heal {number}" not in journal:
                self._heal(student, number, healed, said)
                journal.mark(f"heal {number}")
            start = self.model.written(healed) if healed.exists() else student
            journal.forget_folders(f"round-{number - 1}", f"round-{number - 1}-healed")
        raise AssertionError("a run has at least one round")

    def _cut(
        self, start: Model, size: dict[str, Any], index: ChannelIndex | None, out: Path, said: Provenance
    ) -> None:
        """Index and prune what a round starts from; the manifest tells it as a cut of the dense model."""
        progress = self.reports.progress
        if index is None:
            second = METHODS.find(self.cut.get("method", defaults.METHOD)).second_order
            journal = Journal(out, index_fingerprint(start, self.calibration, second))
            index = build_index(
                start, self.calibration, second_order=second, journal=journal, progress=progress
            )
        plan = self.plan if self.rounds == 1 else None
        plan = plan or plan_pruning(start, index, **{**self.cut, **size}, progress=progress)
        if self.rounds > 1:
            self.reports.say(f"FFN width {plan.width_before} → {plan.width_after}")
        measure = self.reports.measure if said.command else None
        prune(start, index, plan, out, overwrite=True, measure=measure, provenance=said, progress=progress)
        if self.rounds > 1:
            earlier = None if start is self.model else start.checkpoint.read_json(MANIFEST)
            manifest = in_rounds(earlier, read_manifest(out))
            replace_text(out / MANIFEST, dump_manifest(manifest))
            save_figures(out, manifest)

    def _heal(self, student: Model, number: int, out: Path, said: Provenance) -> HealResult:
        return heal(
            student,
            self.model,
            self.text.part(number - 1, self.rounds),
            out,
            self.options,
            overwrite=True,  # an incomplete run's, or checked before the first round
            measure=self.reports.measure if said.command else None,
            provenance=said,
            progress=self.reports.progress,
        )

    def _last(self, student: Model, destination: Path, said: Provenance) -> HealResult:
        """Heal the last round's cut into the destination; where that does not help, the cut goes there."""
        result = self._heal(student, self.rounds, destination, said)
        if result.written is not None:
            return result
        assert student.folder is not None
        with complete_folder(destination) as folder:
            shutil.copytree(student.folder, folder, dirs_exist_ok=True)
            write_card(folder, read_manifest(folder), self.model.checkpoint, said.card_template)
        return replace(result, written=self.model.written(destination))


def in_rounds(earlier: dict[str, Any] | None, later: dict[str, Any]) -> dict[str, Any]:
    """The manifest `later` of a round's cut, told as a cut of the dense model.

    `earlier` is the manifest of what the round started from, None for the dense model itself. `rounds` lists
    the cuts: width before and after, and the share of channels removed from what was there.
    """
    plan = later["plan"]
    cut = {name: plan[name] for name in ("width_before", "width_after", "sparsity")}
    if earlier is None:
        return {**later, "rounds": [cut]}
    return {
        **later,
        "source": earlier["source"],
        "plan": composed_plan(earlier["plan"], plan),
        "heals": earlier.get("heals", []),
        "rounds": [*earlier["rounds"], cut],
    }
