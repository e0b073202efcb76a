"""heal: distil the dense model into a pruned one, streamed, and write the result as a new complete folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.budget.heal_cost import HealCost
from surgery.budget.prune_cost import VERIFY_TOKENS
from surgery.card.figures import HEAL, save_heal_figure
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
from surgery.checkpoint.transformers_model import auto_class
from surgery.engine import distributed
from surgery.engine.open_model import Model
from surgery.engine.resume import Journal, journal_folder
from surgery.engine.streamed_model import StreamedModel
from surgery.errors import SurgeonError
from surgery.heal.adapter import adapter_bytes, adapter_folder, check_adapter
from surgery.heal.distil_loss import TopTokens
from surgery.heal.heal_text import HealText
from surgery.heal.options import HealOptions, estimate_heal
from surgery.heal.pair import check_known, shared_tokens, student_manifest, tokens_digest
from surgery.heal.processes import check_same
from surgery.heal.saved_states import agree_on_saves
from surgery.heal.state import HeldState, StateFiles
from surgery.heal.targets import StoredTargets, Teacher
from surgery.heal.train import Division, History, Schedule, Trainer
from surgery.heal.trainable import Trainables, open_state
from surgery.heal.write import trained_logits, write_trained
from surgery.progress import Progress, no_progress
from surgery.pruning.prune import Provenance
from surgery.pruning.verify import check_logits, check_super_weights

JOURNAL = "heal"  # kind of the journal


@dataclass(frozen=True)
class HealResult:
    """What a heal saw, and the written model; None where training did not help, and nothing was written, and
    in all processes but the first.
    """

    history: History
    entry: dict[str, Any]
    written: Model | None


def open_heal_journal(
    student: Model, teacher: Model, text: HealText, options: HealOptions, out: Path, *, resume: bool = True
) -> Journal:
    """The journal of a heal, beside its folder; without `resume` an earlier one is thrown away."""
    fingerprint = {
        "student": source_json(student.checkpoint),
        "files": student.checkpoint.file_fingerprints(),
        "teacher": source_json(teacher.checkpoint),
        "teacher_files": teacher.checkpoint.file_fingerprints(),
        "text": text.as_json(),
        "shared_tokens": tokens_digest(shared_tokens(student, teacher)),
        "options": options.as_json(),
        "recompute": options.recompute,
        "run": student.run.as_json(),
        "memory": student.run.memory,
        "processes": [distributed.rank(), distributed.world_size()],
    }
    return Journal(out, fingerprint, resume=resume, kind=JOURNAL)


def check_outputs(
    student: Model, options: HealOptions, cost: HealCost, out: Path, adapter: Path | None, *, overwrite: bool
) -> None:
    """Raise DestinationError when the folders `out` and `adapter` can't be written, as on a disk that is too
    small for them and the journal; what an interrupted run's journal has already is not counted again.

    Raises UsageError or UnsupportedModelError for an adapter that can't be saved.
    """
    held = (file.stat().st_size for file in journal_folder(out, JOURNAL).glob("*") if file.is_file())
    journals = (cost.target_bytes + cost.state_disk_bytes) * distributed.processes_here()
    needs = student.checkpoint.nbytes + journals - sum(held)
    if adapter is not None:
        check_adapter(student, options.train, adapter, out, overwrite=overwrite)
        needs += adapter_bytes(student.meta_model, options.train)
    check_destination(out, overwrite=overwrite, source=student.folder, needs_bytes=max(0, needs))


def heal(
    student: Model,
    teacher: Model,
    text: HealText,
    out: str | Path,
    options: HealOptions | None = None,
    *,
    overwrite: bool = False,
    adapter: Path | None = None,
    measure: Callable[[Model], dict[str, Any]] | None = None,
    provenance: Provenance | None = None,
    journal: Journal | None = None,
    progress: Progress[Any] = no_progress,
) -> HealResult:
    """Train a student towards its teacher, and write the best state to folder `out`, verified.

    `adapter` is a second folder, for the adapter alone (`surgery.heal.adapter`). `measure`, when given,
    measures student and result for manifest and card; `provenance` is what they say of command and repo. With
    `journal` (`open_heal_journal`; made here unless given) an interrupted heal resumes with the same result.
    Where no held-out measure is better than that before training, nothing is written. Of several processes
    the first writes, and all return when the folder is complete. Raises UsageError or UnsupportedModelError
    for a pair that can't be trained or an adapter that can't be saved, DestinationError, MemoryBudgetError,
    NumericsError, DistributedError, and CheckpointError when verification fails.
    """
    options, destination = options or HealOptions(), Path(out)
    manifest = student_manifest(student)
    rows = shared_tokens(student, teacher)
    if options.targets != "none":
        check_known(rows, text.ids, student, teacher)
    cost = estimate_heal(student, teacher, tuple(text.ids.shape), len(text.held_out.ids), options)
    check_outputs(student, options, cost, destination, adapter, overwrite=overwrite)
    distributed.init(student.run.device)
    check_same(_shared(student, teacher, rows, text, options), student.run.device)
    journal = journal or open_heal_journal(student, teacher, text, options, destination)
    try:
        trainer, history = _train(student, teacher, rows, text, options, cost, journal, progress)
        entry = heal_entry(student, teacher, rows, text, options, history)
        written = None
        if history.improved and distributed.rank() == 0:
            if measure is not None:
                entry["evaluation"] = {"before": measure(student)}
            with adapter_folder(student, trainer.trainables, adapter):
                _write(student, trainer, manifest, entry, provenance or Provenance(), destination, measure)
            written = student.written(destination)
        distributed.barrier()
    except SurgeonError as error:
        journal.fail(error)
        raise
    journal.finish()
    return HealResult(history, entry, written)


def _shared(
    student: Model, teacher: Model, rows: torch.Tensor | None, text: HealText, options: HealOptions
) -> dict[str, Any]:
    """What several processes of one heal have in common, by name."""
    return {
        "the student": source_json(student.checkpoint),
        "the teacher": source_json(teacher.checkpoint),
        "the text": text.as_json(),
        "the tokens": tokens_digest(rows),
        "the options": [options.as_json(), options.recompute, student.run.dtype_name],
    }


def _train(
    student: Model,
    teacher: Model,
    rows: torch.Tensor | None,
    text: HealText,
    options: HealOptions,
    cost: HealCost,
    journal: Journal,
    progress: Progress[Any],
) -> tuple[Trainer, History]:
    """Compute the targets that are kept on disk, and train."""
    schedule = options.schedule(*text.ids.shape)
    targets = _targets(teacher, rows, text, options, schedule, cost, journal, progress)
    model = StreamedModel(student, keep_bytes=cost.keep_bytes)
    files = journal if cost.state_on == "disk" else None
    agree_on_saves(journal, (HeldState.mark, StateFiles.mark), model.device)
    state = open_state(model.meta_model, options.train, model.device, files)
    trainer = Trainer(
        model,
        Trainables(model.meta_model, options.train, options.seed, model.device, state),
        text.ids,
        targets,
        held_out=text.held_out,
        counted=text.counted,
        schedule=schedule,
        peak=options.peak,
        loss=options.loss,
        division=Division(cost.micro_batch, cost.hidden_on, cost.graph_bytes),
        journal=journal,
    )
    if not cost.ends_held:
        return trainer, trainer.run(progress)
    with model.other_weights():
        return trainer, trainer.run(progress)


def _targets(
    teacher: Model,
    rows: torch.Tensor | None,
    text: HealText,
    options: HealOptions,
    schedule: Schedule,
    cost: HealCost,
    journal: Journal,
    progress: Progress[Any],
) -> Callable[[torch.Tensor], TopTokens]:
    """The targets of blocks with given numbers: none, computed anew, or from files, which are filled now."""
    block_size = text.ids.shape[1]
    if options.targets == "none":
        return lambda numbers: TopTokens.none(len(numbers), block_size - 1)
    source = Teacher(
        StreamedModel(teacher, keep_bytes=cost.teacher_bytes),
        top=options.top,
        temperature=options.loss.temperature,
        micro_batch=cost.micro_batch,
        place=cost.hidden_on,
        rows=rows,
    )
    if options.targets == "recompute":
        return lambda numbers: source.targets(text.ids[numbers])
    stored = StoredTargets(journal, schedule.own, block_size, source.top)
    stored.fill(source, text.ids, progress)
    source.model.kept.clear()  # its layers have done their work
    return stored.take


def heal_entry(
    student: Model,
    teacher: Model,
    rows: torch.Tensor | None,
    text: HealText,
    options: HealOptions,
    history: History,
) -> dict[str, Any]:
    """The entry of `heals` in surgeon.json: what the model was healed on, how, and what that changed."""
    best = history.measures[history.best]
    seen = len(history.losses) * options.batch(text.ids.shape[1]) * text.ids.shape[1]
    shared = {} if rows is None else {"shared_tokens": int((rows >= 0).sum())}
    return {
        "student": student.name,
        "teacher": {"name": teacher.name, "revision": teacher.checkpoint.revision, **shared},
        "options": options.as_json(),
        "text": text.as_json(),
        "steps": len(history.losses),
        "kept_step": best["step"],
        "tokens": min(seen, text.ids.numel() * options.epochs),
        "seconds": round(history.seconds, 1),
        "losses": history.losses,
        "measures": history.measures,
        "held_out": {
            name: {
                "blocks": len(ids),
                "before": math.exp(history.measures[0]["nats"][name]),
                "after": math.exp(best["nats"][name]),
            }
            for name, ids in text.held_out.texts.items()
        },
    }


def _write(
    student: Model,
    trainer: Trainer,
    manifest: dict[str, Any] | None,
    entry: dict[str, Any],
    provenance: Provenance,
    destination: Path,
    measure: Callable[[Model], dict[str, Any]] | None,
) -> None:
    """Write the folder, verify it, and add manifest, card and the figure of the loss."""
    ids = trainer.held_out.ids[:1, :VERIFY_TOKENS]
    expected = trained_logits(trainer.model, trainer.trainables, ids)
    trainer.model.kept.clear()  # what it computed with has done its work
    with complete_folder(destination) as folder:
        write_trained(student, trainer.trainables, folder)
        copy_other_files(student.checkpoint, folder, student.checkpoint.config, ("README.md", MANIFEST, HEAL))
        written = student.written(folder)
        entry["verification"] = check_logits(
            written, expected, ids, "the trained one in memory", rounded=True
        )
        if measure is not None:
            entry["evaluation"]["after"] = measure(written)
        fields = healed_manifest(student, manifest, entry, provenance)
        fields["super_weights"] = check_super_weights(
            written.checkpoint, written.meta_model, tuple(fields["super_weights"]), repaired=True
        )
        (folder / MANIFEST).write_text(dump_manifest(fields), encoding="utf-8")
        save_heal_figure(folder, fields)
        write_card(folder, fields, student.checkpoint, provenance.card_template)


def healed_manifest(
    student: Model, manifest: dict[str, Any] | None, entry: dict[str, Any], provenance: Provenance
) -> dict[str, Any]:
    """The student's surgeon.json with one more entry in `heals`; task results are not those of this model."""
    checkpoint = student.checkpoint
    fields: dict[str, Any] = (
        dict(manifest) if manifest else {"source": source_json(checkpoint), "super_weights": []}
    )
    measurements = {key: value for key, value in fields.get("measurements", {}).items() if key != "tasks"}
    heals = [*fields.get("heals", []), {**entry, "command": provenance.command}]
    healed = {
        **fields,
        "schema_version": SCHEMA_VERSION,
        "result": {"parameters": checkpoint.parameters, "bytes": checkpoint.nbytes},
        "auto_class": auto_class(student.meta_model.config).__name__,
        "measurements": measurements,
        "heals": heals,
        "repo": provenance.repo,
        "versions": versions(),
    }
    commands = [fields.get("command"), *(heal["command"] for heal in heals)]
    return healed | {"reproduce": reproduce_json(healed) | {"commands": [one for one in commands if one]}}
