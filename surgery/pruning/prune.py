"""prune: carry out a plan. One layer is read, edited and written at a time; the model is never held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.budget.prune_cost import prune_cost
from surgery.card.figures import CONCENTRATION, CUT, save_figures
from surgery.card.publish import write_card
from surgery.checkpoint.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    dump_manifest,
    reproduce_json,
    source_json,
    versions,
)
from surgery.checkpoint.other_files import copy_other_files
from surgery.checkpoint.output_folder import check_destination, complete_folder
from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.shard_writer import TensorSpec
from surgery.checkpoint.transformers_model import auto_class, load_tokenizer
from surgery.cut.ffn_channels import fates_json
from surgery.cut.model_cut import model_cut
from surgery.cut.tensors import edited_specs
from surgery.engine import distributed
from surgery.engine.open_model import Model
from surgery.engine.resume import Journal
from surgery.engine.streamed_model import StreamedModel
from surgery.errors import SurgeonError, UsageError
from surgery.index.channel_index import ChannelIndex
from surgery.model.families import check_prunable
from surgery.plan.prune_plan import PrunePlan
from surgery.progress import Progress, no_progress
from surgery.pruning.jobs import prune_job
from surgery.pruning.plan_intervals import with_intervals
from surgery.pruning.prune_pass import PrunePass, prune_fingerprint
from surgery.pruning.verify import verification_ids, verify_pruned
from surgery.pruning.verify_tokenizer import check_tokenizer
from surgery.repair.methods import REPAIRS

CARD_FILES = ("README.md", MANIFEST, CONCENTRATION, CUT)  # written anew, not carried over


@dataclass(frozen=True)
class Provenance:
    """What manifest and card say beside the plan: the `command` that makes the folder again, the `repo` it is
    published as, measurements of the `dense` source, and jinja2 text in place of the shipped card.
    """

    command: str | None = None
    repo: str | None = None
    dense: dict[str, Any] | None = None
    card_template: str | None = None


def prune(
    model: Model,
    index: ChannelIndex,
    plan: PrunePlan,
    out: str | Path,
    *,
    overwrite: bool = False,
    measure: Callable[[Model], dict[str, Any]] | None = None,
    provenance: Provenance | None = None,
    journal: Journal | None = None,
    progress: Progress[Any] = no_progress,
) -> Model:
    """Write the pruned checkpoint to folder `out`, verify it, and return it as a Model.

    Every tensor is read once (those outside the layers twice where memory is short): edited and written, and
    run with the removed channels masked on a block of calibration tokens, whose logits the written model must
    have too. `measure`, when given, measures the written model for manifest and card. With `journal`
    (`open_journal`; made here unless given) an interrupted prune resumes. The folder appears under its name
    only when verified; whatever happens, a folder already there stays as it was. Several processes share out
    the calibration blocks of a repair; the first writes, and all return when the folder is complete. Raises
    UsageError for more processes than blocks, DistributedError, DestinationError for
    a folder that can't be written, IndexMismatchError for an index of another model, MemoryBudgetError, and
    CheckpointError when verification fails.
    """
    destination = Path(out)
    index.check_source(model.checkpoint)
    check_prunable(model.checkpoint.config, model.name)
    check_destination(destination, overwrite=overwrite, source=model.folder)
    check_shares(len(index.input_ids), REPAIRS.find(plan.repair).changes_weights)
    distributed.init(model.run.device)
    plan = distributed.first_value(plan)
    journal = journal or open_journal(model, index, plan, destination)
    try:
        _write(model, index, plan, destination, measure, provenance or Provenance(), journal, progress)
    except SurgeonError as error:
        journal.fail(error)
        raise
    distributed.barrier()
    journal.finish()
    return model.written(destination)


def check_shares(blocks: int, repairs: bool) -> None:
    """Raise UsageError for processes that would have nothing to do: all but one where nothing is repaired."""
    processes = distributed.world_size()
    if processes > 1 and (not repairs or processes > blocks):
        raise UsageError(
            "processes share out the calibration blocks of a repair",
            expected=f"at most {blocks} processes" if repairs else "one process without a repair",
            found=str(processes),
        )


def open_journal(
    model: Model, index: ChannelIndex, plan: PrunePlan, out: Path, *, resume: bool = True
) -> Journal:
    """The journal of a prune, beside its folder; without `resume` an earlier one is thrown away."""
    return Journal(out, prune_fingerprint(model, index, plan), resume=resume, kind="prune")


def _write(
    model: Model,
    index: ChannelIndex,
    plan: PrunePlan,
    destination: Path,
    measure: Callable[[Model], dict[str, Any]] | None,
    provenance: Provenance,
    journal: Journal,
    progress: Progress[Any],
) -> None:
    meta_model, repair = model.meta_model, REPAIRS.find(plan.repair)
    cut = model_cut(meta_model, plan)
    specs = edited_specs(model.checkpoint, cut.edits)
    size = sum(spec.nbytes for spec in specs.values())
    cost = prune_cost(meta_model, prune_job(plan, index.input_ids.shape, size), model.run)
    ids = verification_ids(index.input_ids, cut.tokens)
    prune_pass = PrunePass(StreamedModel(model), cut, repair, specs, cost, journal)
    if distributed.rank() > 0:
        prune_pass.help(index.input_ids.long())
        return
    with complete_folder(destination) as folder:
        passed = prune_pass.run(folder, ids, index.input_ids.long(), progress)
        copy_other_files(model.checkpoint, folder, cut.config, (*CARD_FILES, *cut.left_out))
        for file, text in cut.files.items():
            (folder / file).write_text(text, encoding="utf-8")
        written = model.written(folder)
        repaired = repair.changes_weights
        verification, weights = verify_pruned(
            written, passed.logits, ids, plan.super_weights, repaired=repaired, tokens=cut.tokens
        )
        if cut.tokens is not None:
            check_tokenizer(load_tokenizer(model.checkpoint), written, cut.tokens)
        measurements: dict[str, Any] = {"verification": verification}
        if provenance.dense is not None:
            measurements["dense"] = provenance.dense
        if measure is not None:
            measurements["pruned"] = measure(written)
        manifest = make_manifest(model.checkpoint, index, plan, specs, measurements) | {
            "super_weights": weights,
            "structures": [found.as_json() for found in index.structures if found.is_super],
            "command": provenance.command,
            "auto_class": auto_class(meta_model.config).__name__,
            "repo": provenance.repo,
            "repair_label": repair.label,
            "repair": passed.repairs,
            "final_norm": None if passed.norm_scale is None else passed.norm_scale.as_json(),
            "outside_model": fates_json(meta_model, cut.edits),
            "left_behind": sorted({*model.checkpoint.left_behind, *cut.left_out}),
        }
        manifest["reproduce"] = reproduce_json(manifest)
        (folder / MANIFEST).write_text(dump_manifest(manifest), encoding="utf-8")
        save_figures(folder, manifest)
        write_card(folder, manifest, model.checkpoint, provenance.card_template)


def make_manifest(
    checkpoint: Checkpoint,
    index: ChannelIndex,
    plan: PrunePlan,
    specs: dict[str, TensorSpec],
    measurements: dict[str, Any],
) -> dict[str, Any]:
    """The content of surgeon.json: what was pruned from what, chosen how, and what was measured."""
    return {
        "schema_version": SCHEMA_VERSION,
        "source": source_json(checkpoint),
        "result": {
            "parameters": sum(spec.numel for spec in specs.values()),
            "bytes": sum(spec.nbytes for spec in specs.values()),
        },
        "plan": with_intervals(plan, index),
        "calibration": index.calibration,
        "index_run": index.run,
        **index.published_json(),
        "versions": versions(),
        "measurements": measurements,
    }
