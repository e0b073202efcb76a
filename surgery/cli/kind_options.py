"""Options of `surgeon prune` for what goes besides FFN channels by its own number: experts and tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from surgery.cli.common import bars, say
from surgery.cli.options import CalibrationOptions, collected, text_words
from surgery.cli.prune_options import CutOptions
from surgery.errors import UsageError

EXPERT_SCORES = ("reap", "lp")  # as surgery.pruning.experts.EXPERT_SCORES, which imports torch

if TYPE_CHECKING:
    from surgery.engine.open_model import Model
    from surgery.index.channel_index import ChannelIndex
    from surgery.plan.kind_plan import KindPlan
    from surgery.plan.prune_plan import PrunePlan


@dataclass(frozen=True)
class KindOptions:
    """How many routed experts and tokens of the vocabulary stay, and what says which."""

    keep_experts: int | None
    expert_score: str
    keep_vocabulary: float | None
    vocabulary_text: tuple[str, ...]

    def check(self, healed: bool, rounds: int = 1, cuts: tuple[str, ...] | None = None) -> None:
        """Raise UsageError for options that contradict each other, or a heal, whose text has the whole
        vocabulary's tokens.

        `cuts` are the kinds that may go for a target: how many tokens go is not searched for.
        """
        if "vocab" in (cuts or ()) and self.keep_vocabulary is None:
            raise UsageError(
                "how many tokens stay is not searched for: KL compares models of the same tokens",
                where="--cuts",
                next_step="give --keep-vocabulary too",
            )
        if self.any and rounds > 1:
            raise UsageError(
                "several rounds cut FFN channels alone",
                where="--rounds, --keep-experts, --keep-vocabulary",
                next_step="use --heal without --rounds, or --sparsity alone",
            )
        if self.vocabulary_text and self.keep_vocabulary is None:
            raise UsageError(
                "this text says which tokens stay",
                where="--vocabulary-text",
                next_step="give --keep-vocabulary",
            )
        if self.keep_vocabulary is not None and healed:
            raise UsageError(
                "a smaller vocabulary is not healed in the same command, as its text has other tokens",
                where="--keep-vocabulary, --heal",
                next_step="leave out --heal, then run `surgeon heal` on the result",
            )

    @property
    def any(self) -> bool:
        """Whether anything goes."""
        return self.keep_vocabulary is not None or self.keep_experts is not None

    def check_model(self, model: Model) -> None:
        """Raise PlanError or UnsupportedModelError, before any work, for a model that can't be cut so."""
        from surgery.cut.experts import check_count, check_experts
        from surgery.cut.vocabulary import check_vocabulary

        if self.keep_experts is not None:
            check_experts(model.meta_model)
            check_count(model.meta_model, {self.keep_experts})
        if self.keep_vocabulary is not None:
            check_vocabulary(model.meta_model)

    def sized(self, cut: CutOptions, *, elsewhere: bool) -> CutOptions:
        """`cut` with whole FFNs where these options alone say what goes; `elsewhere`: others say it too.

        A smaller vocabulary changes no layer, so that nothing is repaired then unless a repair is asked for.
        """
        if elsewhere or not self.any or cut.sized:
            return cut
        asked = click.get_current_context().get_parameter_source("repair") is ParameterSource.COMMANDLINE
        repair = cut.repair if asked or self.keep_experts is not None else "none"
        return replace(cut, sparsity=0.0, repair=repair)

    def experts(self, model: Model, index: ChannelIndex, protect: bool, quiet: bool) -> tuple[KindPlan, ...]:
        """The experts that go, by what `index` was calibrated on. Raises PlanError, MemoryBudgetError."""
        if self.keep_experts is None:
            return ()
        from surgery.pruning.experts import plan_experts

        say("Measuring what each expert adds", quiet)
        part = plan_experts(
            model, index, self.keep_experts, self.expert_score, protect=protect, progress=bars(quiet)
        )
        return (part,)

    def vocabulary(self, model: Model, text: CalibrationOptions, quiet: bool) -> tuple[KindPlan, ...]:
        """The tokens that go. Raises PlanError, UnsupportedModelError or CalibrationError."""
        if self.keep_vocabulary is None:
            return ()
        from surgery.pruning.vocabulary import plan_vocabulary

        texts = self.vocabulary_text or text.calibration
        say(f"Counting tokens of {len(texts)} texts", quiet)
        return (
            plan_vocabulary(model, self.keep_vocabulary, texts, text_column=text.text_column, seed=text.seed),
        )

    def name(self, plan_name: str) -> str:
        """A folder's name, with the experts and the vocabulary."""
        experts = "" if self.keep_experts is None else f"-e{self.keep_experts}"
        return plan_name + experts + ("" if self.keep_vocabulary is None else f"-v{self.keep_vocabulary:g}")

    def words(self, plan: PrunePlan) -> list[str]:
        """The options as words, free of paths of this machine."""
        facts = {part.kind: part.facts for part in plan.cuts}
        words = []
        if "experts" in facts:
            words += ["--keep-experts", str(facts["experts"]["after"])]
            words += ["--expert-score", facts["experts"]["score"]]
        if "vocab" not in facts:
            return words
        return [
            *words,
            "--keep-vocabulary",
            str(facts["vocab"]["after"]),
            *text_words("--vocabulary-text", self.vocabulary_text, None),
        ]


kind_options = collected(
    KindOptions,
    "kinds",
    [
        click.option(
            "--keep-experts",
            type=int,
            metavar="NUMBER",
            help="Keep so many routed experts in every layer. FFNs keep their width unless a size is "
            "given too.",
        ),
        click.option(
            "--expert-score",
            type=click.Choice(EXPERT_SCORES),
            default=EXPERT_SCORES[0],
            show_default=True,
            help="Which experts stay: those that add the most where the router chooses them (reap), or those "
            "whose channels have the largest loss proxy (lp).",
        ),
        click.option(
            "--keep-vocabulary",
            type=float,
            metavar="NUMBER",
            help="Keep so many tokens of the vocabulary, or below 1 this share: the most used ones. Added "
            "tokens, those of the chat template and single bytes always stay. FFNs stay whole unless a size "
            "is given too.",
        ),
        click.option(
            "--vocabulary-text",
            multiple=True,
            metavar="TEXT",
            help="Count tokens in this text, as --calibration names it; may be given several times. "
            "[default: the calibration texts]",
        ),
    ],
)
