"""Help texts with options grouped under headings; an option has the same heading in every command."""

from __future__ import annotations

import click

SECTIONS: dict[str, tuple[str, ...]] = {
    "Model": ("model", "onto", "revision", "range_reads", "index_folder"),
    "Pruning": (
        *("sparsity", "sparsities", "intermediate_size", "multiple_of", "method", "methods", "chosen"),
        *("protect", "repair", "repairs", "allocation", "allocations", "layer_widths", "pad"),
        *("target_params", "target_size", "target_memory", "speedup", "speed_of", "context", "packed_int4"),
        *("cuts", "search_cuts", "search_time"),
        *("drop_layers", "drop_attention", "drop_ffn", "kv_heads"),
        *("keep_experts", "expert_score", "keep_vocabulary", "vocabulary_text"),
    ),
    "Healing": (
        *("heal_tokens", "rounds", "tokens_seen", "heal_texts", "text_weights", "loss_on", "teacher"),
        *("train", "save_adapter", "learning_rate", "batch_tokens", "epochs", "temperature"),
        *("cross_entropy", "targets"),
    ),
    "Rounding": (
        *("bits", "symmetric", "groups", "flat", "per_channel", "per_tensor", "clip", "handling"),
        *("simulate", "compare", "roundings", "no_round", "rounding", "tuning_steps"),
    ),
    "Export": ("as_gguf", "type_name"),
    "Speed": (*("runtimes", "gguf_types", "prompt_tokens", "new_tokens", "batches", "repeats", "threads"),),
    "Conditions": ("conditions", "scale", "traced", "stop_words", "plan_only"),
    "Measurement": (
        *("text", "texts", "text_blocks", "text_block_size", "eval_text", "eval_blocks", "activations"),
        *("context", "no_speed", "target_size", "target_speed"),
        *("against", "tasks", "task_text", "fewshot", "limit", "include_path", "record"),
    ),
    "Calibration": (
        *("refit", "dense"),
        *("calibration", "calibration_weights", "text_column", "blocks", "block_size", "seed"),
        *("spike_prompt", "second_order", "save_samples"),
    ),
    "Page": ("comparison", "generate", "prompts", "tokens", "figures"),
    "Card and publishing": (
        "card_template",
        "stdout",
        "push_to",
        "private",
        "push_revision",
        "create_pr",
        "collection",
        "base_model",
    ),
    "Rented machine": ("jobs", "bucket"),
    "Run": ("device", "dtype", "memory", "trust_remote_code", "resume", "broadcast_reads"),
    "Output": ("out", "overwrite", "dry_run", "as_json", "quiet"),
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "Index and report": ("index", "merge-index", "show", "report", "find", "atlas"),
    "Prune, heal and quantise": ("prune", "compare", "heal", "adapt", "quantize"),
    "Measure": ("eval", "frontier", "bench", "ablate"),
    "Files": ("export", "card", "push", "shard-index"),
}


def section_of(option: str) -> str:
    """The heading of an option, by its Python name; "Other" if no heading lists it."""
    return next((title for title, names in SECTIONS.items() if option in names), "Other")


def grouped_options(command: click.Command, context: click.Context) -> dict[str, list[click.Parameter]]:
    """Heading -> options of a command: headings in the order of SECTIONS, options as declared."""
    found: dict[str, list[click.Parameter]] = {title: [] for title in (*SECTIONS, "Other")}
    for parameter in command.get_params(context):
        if "--help" in parameter.opts:
            found["Output"].append(parameter)
        elif not isinstance(parameter, click.Argument) and not getattr(parameter, "hidden", False):
            found[section_of(parameter.name or "")].append(parameter)
    return {title: options for title, options in found.items() if options}


class GroupedCommands(click.Group):
    """A group whose help lists commands under headings, each with the first sentence of its help."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        listed = [name for names in COMMANDS.values() for name in names]
        others = tuple(name for name in self.list_commands(ctx) if name not in listed)
        for title, names in {**COMMANDS, "Other": others}.items():
            found = [(name, self.commands[name]) for name in names if name in self.commands]
            if found:
                with formatter.section(title):
                    formatter.write_dl([(name, one.get_short_help_str(limit=200)) for name, one in found])


class GroupedCommand(click.Command):
    """A command whose help lists options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, options in grouped_options(self, ctx).items():
            records = [option.get_help_record(ctx) for option in options]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record is not None])
