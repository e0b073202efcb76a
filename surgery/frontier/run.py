"""Makes and measures the points of a frontier, one after another; a finished point is not computed again."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery import defaults
from surgery.budget.kv_cache import cached_numbers
from surgery.checkpoint.manifest import MANIFEST
from surgery.engine.open_model import Model
from surgery.engine.resume import Journal
from surgery.engine.token_stream import TokenStream
from surgery.errors import AutoRoundError, SurgeonError, UnsupportedModelError, UsageError
from surgery.evaluate.agreement import (
    Agreement,
    agreement_cost,
    check_same_tokens,
    last_states,
    measure_agreement,
)
from surgery.evaluate.perplexity import default_block_size, evaluation_blocks
from surgery.frontier.points import Point, predicted_bytes
from surgery.frontier.speed import measure_speeds
from surgery.heal.heal import heal
from surgery.heal.heal_text import HealText
from surgery.index.channel_index import ChannelIndex
from surgery.progress import Progress, no_progress
from surgery.pruning.plan_pruning import plan_pruning
from surgery.pruning.prune import prune
from surgery.pruning.prune_pass import index_use_fingerprint
from surgery.quantize.autoround import tuned_matrices
from surgery.quantize.plan import QuantizePlan, plan_quantization
from surgery.quantize.write import write_quantized
from surgery.text import TokenBlocks


@dataclass(frozen=True)
class FrontierOptions:
    """How points are made and measured.

    `method`, `repair` and `multiple_of` as for pruning; `context`: tokens of the KV cache that is counted;
    `text_blocks` and `text_block_size` are those of every text, None for all and for the model's.
    """

    method: str = defaults.METHOD
    repair: str = defaults.REPAIR
    multiple_of: int | None = None
    context: int = 4096
    text_blocks: int | None = None
    text_block_size: int | None = None
    speed: bool = True


class Frontier:
    """The points of one model, made in the folder of a journal and measured on texts.

    `texts` are blocks of the model's own tokenizer, `specs` the names they were drawn by, for `other`, a
    model of another tokenizer perhaps. `healing` is the text of a heal, None without.
    """

    def __init__(
        self,
        model: Model,
        index: ChannelIndex,
        points: Sequence[Point],
        specs: Sequence[str],
        texts: Sequence[TokenBlocks],
        journal: Journal,
        options: FrontierOptions,
        *,
        other: Model | None = None,
        healing: HealText | None = None,
        progress: Progress[Any] = no_progress,
    ) -> None:
        self.model, self.index, self.points = model, index, list(points)
        self.specs, self.texts, self.options = list(specs), list(texts), options
        self.journal, self.other, self.healing = journal, other, healing
        self.progress = progress
        self.weights = [weight.as_json() for weight in index.super_weights]
        self.failed: list[dict[str, str]] = []
        self._dense: list[TokenStream] | None = None

    def run(self) -> dict[str, Any]:
        """Make and measure every point; the content of frontier.json without its sentence.

        A point that can't be made, as a cut that training did not help, is left out and named under
        `left_out`. Raises errors of memory, disk, the network and of the dense model.
        """
        made = [point for point in self.points if self._made(point)]
        rows = [self._measured(point) for point in made]
        self._dense = None
        if self.options.speed:
            self._add_speeds(rows)
        return {
            "source": self.index.source,
            "calibration": self.index.calibration,
            "run": self.model.run.as_json(),
            "options": asdict(self.options),
            "points": [{**row, "speed": row.get("speed")} for row in rows],
            "left_out": self.failed,
        }

    # -- points -------------------------------------------------------------------------------------------

    def _made(self, point: Point) -> bool:
        """Write the checkpoint of a point, unless it is there; whether that could be done."""
        why = None
        for slug in (point.base, point.slug):
            if f"left out {slug}" in self.journal:
                why = self.journal.load(f"left-out-{slug}")[0]["why"]
        if why is None:
            try:
                base = self._base(point)
                if point.scheme is not None:
                    self._rounded(base, point)
                return True
            except (UsageError, UnsupportedModelError, AutoRoundError) as error:
                if point.slug == "dense":
                    raise
                why = error.message
                self.journal.save(f"left-out-{point.slug}", {"why": why})
                self.journal.mark(f"left out {point.slug}")
        self.failed.append({"name": point.name, "why": why})
        return False

    def _measured(self, point: Point) -> dict[str, Any]:
        """The row of a point, from the journal or computed now."""
        step, name = f"point {point.slug}", f"point-{point.slug}"
        if step in self.journal:
            return self.journal.load(name)[0]
        base = self._base(point)
        folder = self._rounded(base, point) if point.scheme is not None else None
        texts = self._quality(base if folder is None else base.written(folder), point)
        predicted = None
        if point.other is None:
            predicted = predicted_bytes(self.model, point, self.weights, self.options.multiple_of)
        size = base.checkpoint.nbytes if folder is None else _files_bytes(folder)
        row = {
            "name": point.name,
            "slug": point.slug,
            "sparsity": point.sparsity,
            "healed": point.healed,
            "scheme": None if point.scheme is None else point.scheme.name,
            "bytes": size,
            "predicted_bytes": predicted,
            **self._cache(base),
            "texts": texts,
        }
        self.journal.save(name, row)
        self.journal.mark(step)
        return row

    def _cache(self, base: Model) -> dict[str, Any]:
        """`cache_bytes` of the context in the dtype that is computed in; None, and why, where not known."""
        try:
            numbers = cached_numbers(base.checkpoint.config, self.options.context, base.name)
        except UnsupportedModelError as error:
            return {"cache_bytes": None, "cache_missing": f"{error.message}: {error.found}"}
        return {"cache_bytes": numbers * base.run.dtype.itemsize}

    def _folder(self, name: str) -> Path:
        return self.journal.path(f"{name}-checkpoint")

    def _base(self, point: Point) -> Model:
        """The model that a point is, or is rounded from; made now where it is not there yet."""
        if point.other is not None:
            assert self.other is not None
            return self.other
        # A model of its own: its modules can't hold the dense weights at the same time.
        if point.sparsity is None:
            return Model(self.model.checkpoint, self.model.run)
        folder = self._folder(point.base)
        if folder.exists():
            return self.model.written(folder)
        if not point.healed:
            plan = plan_pruning(
                self.model,
                self.index,
                sparsity=point.sparsity,
                method=self.options.method,
                repair=self.options.repair,
                multiple_of=self.options.multiple_of,
            )
            return prune(self.model, self.index, plan, folder, progress=self.progress)
        assert self.healing is not None
        student = self._base(dataclasses.replace(point, healed=0, scheme=None))
        found = heal(student, self.model, self.healing, folder, progress=self.progress)
        if found.written is None:
            raise UsageError("training did not help this cut", where=point.name)
        return found.written

    def _plan(self, base: Model, point: Point) -> QuantizePlan:
        """How the base is rounded: as `surgeon quantize` packs it, modules of super weights whole."""
        assert point.scheme is not None
        weights = self.weights
        if point.is_cut:
            fields = base.checkpoint.read_json(MANIFEST)
            weights = [weight for weight in fields["super_weights"] if weight["column"] is not None]
        return plan_quantization(base.meta_model, weights, point.scheme, "module")

    def _rounded(self, base: Model, point: Point) -> Path:
        """The packed folder of a rounded point."""
        folder = self._folder(point.slug)
        if folder.exists():
            return folder
        plan = self._plan(base, point)
        quiet = self.progress is no_progress
        with tuned_matrices(base, plan, self.index.input_ids, quiet=quiet) as tuned:
            write_quantized(
                base, plan, {}, folder, packed=True, weights=[], tuned=tuned, progress=self.progress
            )
        return folder

    # -- quality ------------------------------------------------------------------------------------------

    def _quality(self, measured: Model, point: Point) -> list[dict[str, Any]]:
        """What a point's texts measured, compared with the dense model where the tokenizer is the same."""
        texts = self.texts
        cost = agreement_cost(measured, self.model, [blocks.ids.shape for blocks in texts])
        same = point.other is None or _same_tokens(measured, self.model)
        if not same:
            size = self.options.text_block_size or default_block_size(measured.checkpoint.config)
            texts = [evaluation_blocks(measured, spec, self.options.text_blocks, size) for spec in self.specs]
        if same and self._dense is None:
            self._dense = last_states(self.model, self.texts, cost, self.progress)
        streams = last_states(measured, texts, cost, self.progress)
        dense = self._dense if same else streams
        assert dense is not None
        found = [measure_agreement(*each) for each in zip(streams, dense, texts, strict=True)]
        return [_text_json(one, compared=same) for one in found]

    # -- speed --------------------------------------------------------------------------------------------

    def _add_speeds(self, rows: list[dict[str, Any]]) -> None:
        """Measure tokens a second of every point, or say why they are missing."""
        folders = {row["slug"]: self._speed_folder(row) for row in rows}
        speeds = measure_speeds(folders, self.model, self.journal, self.progress)
        for row in rows:
            found = speeds[row["slug"]]
            if isinstance(found, str):
                row["speed_missing"] = found
            else:
                row["speed"] = asdict(found)

    def _speed_folder(self, row: dict[str, Any]) -> Path | None:
        """The folder that transformers loads for a point; None for a source that it reads otherwise."""
        made = self._folder(row["slug"])
        if made.exists():
            return made
        source = self.other if row["slug"].startswith("other-") else self.model
        assert source is not None
        folder = Path(source.checkpoint.source.path)
        whole = source.checkpoint.stored_form is None and any(folder.glob("*.safetensors"))
        return folder if whole else None

    def discard(self) -> None:
        """Delete the checkpoints of all points."""
        for point in self.points:
            shutil.rmtree(self._folder(point.slug), ignore_errors=True)


def frontier_fingerprint(
    model: Model, index: ChannelIndex, texts: Sequence[TokenBlocks], options: FrontierOptions
) -> dict[str, Any]:
    """What makes two runs the same; points are steps, so that a run with more of them goes on."""
    return {
        **index_use_fingerprint(model, index),
        "texts": [[blocks.name, blocks.digest] for blocks in texts],
        "options": asdict(options),
    }


def _same_tokens(one: Model, other: Model) -> bool:
    try:
        check_same_tokens(one, other)
    except SurgeonError:
        return False
    return True


def _files_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _text_json(found: Agreement, *, compared: bool) -> dict[str, Any]:
    """The entry of a text in a point's row."""
    fields = found.as_json()
    return {
        **found.model.as_json(),
        "kl": fields["kl"] if compared else None,
        "top1": fields["top1"] if compared else None,
        "bits_per_byte_more": fields["bits_per_byte_more"] if compared else None,
        "block_nats": list(found.block_nats),
    }
