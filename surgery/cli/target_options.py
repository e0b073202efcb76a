"""The options of `surgeon prune` that say how large the result may be, and what may go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from surgery import defaults
from surgery.cli.common import bars, say
from surgery.cli.options import collected
from surgery.cli.prune_options import CutOptions
from surgery.cli.target_values import (
    default_kinds,
    duration,
    factor,
    kinds,
    layers,
    one_target,
    search_seconds,
    target_amount,
)
from surgery.cut.kinds import KINDS
from surgery.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.budget.target import Target
    from surgery.engine.open_model import Model
    from surgery.engine.resume import Journal
    from surgery.index.channel_index import ChannelIndex
    from surgery.plan.kind_plan import KindPlan
    from surgery.plan.prune_plan import PrunePlan


@dataclass(frozen=True)
class TargetOptions:
    """How large the result may be, what may go for it, and which layers go in any case."""

    target_params: str | None
    target_size: str | None
    target_memory: str | None
    speedup: float | None
    speed_of: str
    context: str | None
    packed_int4: bool
    cuts: tuple[str, ...] | None
    drop_layers: tuple[int, ...]
    drop_attention: tuple[int, ...]
    drop_ffn: tuple[int, ...]
    kv_heads: int | None
    search_time: float | None

    @property
    def target(self) -> Target | None:
        """The target that is given; the amount of a speed is not known before it is measured (`measured`).

        Raises UsageError for several, or a memory without a context.
        """
        from surgery.budget.target import MEMORY, PARAMS, SIZE, SPEED, Target
        from surgery.cli.heal_options import parse_count

        speed = None if self.speedup is None else f"{self.speedup:g}x"
        stated = one_target(
            {PARAMS: self.target_params, SIZE: self.target_size, MEMORY: self.target_memory, SPEED: speed}
        )
        if (self.context is not None) != (self.target_memory is not None):
            raise UsageError("--target-memory and --context go together", where="--target-memory, --context")
        if self.packed_int4 and self.target_size is None and self.target_memory is None:
            raise UsageError("--packed-int4 is for --target-size and --target-memory", where="--packed-int4")
        if stated is None or stated[0] == SPEED:
            return None if stated is None else Target(SPEED, 0)
        context = parse_count(self.context, "--context") if self.context else 0
        return Target(stated[0], target_amount(*stated), context, self.packed_int4)

    def measured(self, model: Model, journal: Journal | None, quiet: bool) -> Target:
        """The target, with a speed in the time that a token may take on this machine."""
        from surgery.bench.layer_speed import measure_layer_speed
        from surgery.budget.target import SPEED, SpeedModel

        target = self.target
        assert target is not None
        if target.unit != SPEED:
            return target
        if journal is not None and "speed" in journal:
            speed = SpeedModel(**journal.load("speed")[0])
        else:
            say("Measuring how fast layers of this model's shapes are here", quiet)
            speed = measure_layer_speed(model, self.speed_of, progress=bars(quiet))
            if journal is not None:
                journal.save("speed", vars(speed))
                journal.mark("speed")
        assert self.speedup is not None
        layers, parameters = len(model.meta_model.layers), model.checkpoint.parameters
        dense = speed.seconds(layers, parameters)
        return replace(target, amount=int(1e9 * dense / self.speedup), speed=speed)

    def check(self, cut: CutOptions, rounds: int = 1) -> CutOptions:
        """`cut` checked, with whole FFNs where a target or layers alone say the size.

        Raises UsageError for options that contradict each other.
        """
        target = self.target
        if target is not None and cut.sized:
            raise UsageError("a target takes the place of --sparsity, --intermediate-size and --layer-widths")
        if target is None and self.cuts is not None:
            raise UsageError("--cuts is for a target", next_step="give --target-params or --target-size")
        if target is None and cut.allocation != "searched" and self.search_time is not None:
            raise UsageError("--search-time is for a target and for --allocation searched")
        if self.speed_of != "decode" and self.speedup is None:
            raise UsageError("--speed-of is for --target-speed", where="--speed-of")
        if target is not None and self.explicit:
            raise UsageError(
                "the search for a target chooses what goes",
                where="--drop-layers, --drop-attention, --drop-ffn, --kv-heads",
            )
        if rounds > 1 and (target is not None or self.explicit or cut.layer_widths is not None):
            raise UsageError(
                "several rounds cut FFN channels alone, by their number",
                where="--rounds",
                next_step="use --heal without --rounds, or --sparsity",
            )
        whole = target is not None or (self.explicit and not cut.sized)
        return (replace(cut, sparsity=0.0) if whole else cut).check()

    @property
    def explicit(self) -> bool:
        """Whether what goes besides FFN channels is said one by one."""
        return bool(self.drop_layers or any(self.dropped.values()) or self.kv_heads is not None)

    @property
    def dropped(self) -> dict[str, tuple[int, ...]]:
        """Layers that lose a whole sublayer, by kind of cut."""
        return {"attention": self.drop_attention, "whole-ffn": self.drop_ffn}

    @property
    def seconds(self) -> float:
        """What a search may take."""
        return search_seconds(self.search_time)

    def kinds(self, model: Model, tell: bool = False) -> tuple[str, ...]:
        """Names of the kinds that may go for a target: those asked for, or `default_kinds`."""
        return self.cuts if self.cuts is not None else default_kinds(model, tell)

    def name_for(self, model: Model, cut: CutOptions) -> str:
        """Folder and repo name: as of the cut, or with the target in place of a percentage."""
        speed = f"{self.speedup:g}x" if self.speedup is not None else None
        stated = self.target_params or self.target_size or self.target_memory or speed
        if stated is not None:
            return f"{model.short_name}-{cut.method}-{stated.strip().replace(' ', '')}"
        name = cut.name_for(model)
        name += f"-{len(self.drop_layers)}-layers" if self.drop_layers else ""
        name += f"-{self.kv_heads}-kv" if self.kv_heads is not None else ""
        name += f"-{len(self.drop_attention)}-attentions" if self.drop_attention else ""
        return name + (f"-{len(self.drop_ffn)}-ffns" if self.drop_ffn else "")

    def check_model(self, model: Model) -> None:
        """Refuse a model, layers or a target that won't do before anything is computed."""
        from surgery.cut.sublayers import SUBLAYERS
        from surgery.plan.kind_plan import check_an_ffn_stays, check_something_stays
        from surgery.search.plan_to_target import check_target

        if self.drop_layers:
            from surgery.cut.layers import check_removed

            check_removed(model.meta_model, self.drop_layers)
        check_something_stays(self.drop_attention, self.drop_ffn)
        have = [number for number, ffns in enumerate(model.meta_model.ffns) if ffns]
        check_an_ffn_stays(have, {*self.drop_ffn, *self.drop_layers})
        for kind, removed in self.dropped.items():
            SUBLAYERS[kind].check_removed(model.meta_model, removed)
        if self.kv_heads is not None:
            from surgery.cut.kv_heads import check_heads_kept

            check_heads_kept(model.meta_model, self.kv_heads)
        target = self.target
        if target is not None:
            check_target(model, target, self.kinds(model, tell=True))

    def parts(self, model: Model, index: ChannelIndex, quiet: bool) -> tuple[KindPlan, ...]:
        """What goes by number; which heads go is measured."""
        from surgery.cut.sublayers import SUBLAYERS
        from surgery.plan.kind_plan import layers_plan, sublayer_plan

        found = []
        if self.kv_heads is not None:
            from surgery.search.head_scores import head_scores, heads_plan

            found.append(heads_plan(head_scores(model, index, bars(quiet)), self.kv_heads))
        for kind, removed in self.dropped.items():
            if removed:
                found.append(sublayer_plan(kind, SUBLAYERS[kind].layers(model.meta_model), removed))
        if self.drop_layers:
            found.append(layers_plan(len(model.meta_model.layers), self.drop_layers))
        return tuple(found)

    def journal(
        self,
        model: Model,
        index: ChannelIndex,
        cut: CutOptions,
        fixed: tuple[KindPlan, ...],
        expert_score: str,
        seed: int,
        destination: Path,
        resume: bool,
    ) -> Journal | None:
        """The journal of the search, beside the destination; None where nothing is searched for."""
        from surgery.engine.resume import Journal
        from surgery.pruning.prune_pass import index_use_fingerprint

        if self.target is None and cut.allocation != "searched":
            return None
        fingerprint = {**index_use_fingerprint(model, index), "cut": vars(cut), "target": vars(self)}
        fingerprint |= {"seed": seed} if cut.method == "random" else {}
        fingerprint |= {"expert_score": expert_score} if "experts" in (self.cuts or ()) else {}
        fingerprint |= {"fixed": [part.facts for part in fixed]} if fixed else {}
        return Journal(destination, fingerprint, resume=resume, kind="search")

    def plan(
        self,
        model: Model,
        index: ChannelIndex,
        cut: CutOptions,
        fixed: tuple[KindPlan, ...],
        expert_score: str,
        seed: int,
        journal: Journal | None,
        quiet: bool,
    ) -> PrunePlan:
        """The plan that meets the target; `fixed` goes in any case. Raises PlanError where none does."""
        from surgery.search.plan_to_target import plan_to_target

        target = self.measured(model, journal, quiet)
        how: dict[str, Any] = {**vars(cut), "seed": seed}
        del how["sparsity"], how["intermediate_size"], how["layer_widths"]
        return plan_to_target(
            model,
            index,
            target,
            cuts=self.kinds(model),
            seconds=self.seconds,
            fixed=fixed,
            expert_score=expert_score,
            journal=journal,
            progress=bars(quiet),
            say=lambda line: say(line, quiet),
            **how,
        )


target_options = collected(
    TargetOptions,
    "target",
    [
        click.option(
            "--target-params",
            metavar="NUMBER",
            help="At most so many parameters, as 1B, in place of --sparsity: the best mixture of cuts is "
            "searched for.",
        ),
        click.option("--target-size", metavar="BYTES", help="At most so many bytes on disk, as 4GB."),
        click.option(
            "--target-memory",
            metavar="BYTES",
            help="At most so many bytes of weights and the keys and values of --context tokens, as 8GB.",
        ),
        click.option(
            "--target-speed",
            "speedup",
            metavar="FACTOR",
            callback=factor,
            help="At least so many times as many tokens a second in transformers on this machine, as 1.3x; "
            "layers of several shapes are timed first.",
        ),
        click.option(
            "--speed-of",
            type=click.Choice(("decode", "prefill")),
            default="decode",
            show_default=True,
            help="What --target-speed is of: writing one token after another, or reading a prompt.",
        ),
        click.option("--context", metavar="TOKENS", help="Tokens of context for --target-memory, as 32k."),
        click.option(
            "--packed-int4",
            is_flag=True,
            help="The bytes of the target are those after `surgeon quantize` with its defaults.",
        ),
        click.option(
            "--cuts",
            metavar="KINDS",
            callback=kinds,
            help=f"What may go for a target, of {', '.join(KINDS)}, separated by commas. "
            f"[default: {','.join(defaults.TARGET_CUTS)}]",
        ),
        click.option(
            "--search-time",
            metavar="TIME",
            callback=duration,
            help="Stop trying mixtures, and widths of layers, after this time, as 20m. The first few are "
            "always tried. "
            f"[default: {defaults.SEARCH_SECONDS / 60:.0f}m]",
        ),
        click.option(
            "--drop-layers",
            metavar="NUMBERS",
            callback=layers,
            help="Remove these whole layers, as 5,12; FFNs stay whole unless a size is given too.",
        ),
        click.option(
            "--drop-attention",
            metavar="NUMBERS",
            callback=layers,
            help="Remove the attention of these layers; loading the result needs a loader.",
        ),
        click.option(
            "--drop-ffn",
            metavar="NUMBERS",
            callback=layers,
            help="Remove the whole FFN of these layers; loading the result needs a loader.",
        ),
        click.option(
            "--kv-heads",
            type=click.IntRange(min=1),
            help="Keep so many key/value heads in every layer, with the query heads that share them.",
        ),
    ],
)
