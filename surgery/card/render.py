"""Render the model card of a pruned or quantised checkpoint from its manifest and the source's own card."""

from __future__ import annotations

import functools
import re
from importlib import resources
from typing import Any

from surgery.card.hub_metadata import base_model, is_gguf, layers_differ, own_tags, trials, widths_differ
from surgery.card.perplexity_change import perplexity_change
from surgery.card.source_card import inherited_metadata
from surgery.card.speed import speed_section
from surgery.plan.layer_rows import cut_lines, search_line

OBLIGATIONS = {
    "llama": (
        "The source is under a Llama community license: display “Built with Llama” where you use this model, "
        "keep the license and its notice with every copy, and begin the name of any model you make from it "
        "with “Llama”."
    ),
    "gemma": (
        "The source is under the Gemma Terms of Use: pass them and the use restrictions on with every copy, "
        "and say that files were changed (config.json and the weights were)."
    ),
}


def render_card(manifest: dict[str, Any], source_card: str | None = None, template: str | None = None) -> str:
    """The card's Markdown with its YAML front matter.

    `manifest` is the content of surgeon.json. License, language and tags are taken from `source_card`, the
    README.md of the source model. `template` is jinja2 text used in place of the shipped template. It sees
    `manifest`, `front_matter`, `obligation`, `auto_class`, `load_from`, `heals`, `trials`, `speed` and
    `perplexity_change`; for a pruned model also `method`, `lp_intervals`, `paper`, `percent`, `saved`,
    `widths`, `widths_differ`, `per_layer`, `padded`, `repair`, `repair_label`, `repaired`, `cuts` and
    `search`.
    """
    quantized, pruned = "quantization" in manifest, "plan" in manifest
    variables = {
        "manifest": manifest,
        "front_matter": front_matter(manifest, source_card),
        "obligation": obligation(source_card),
        "auto_class": manifest.get("auto_class", "AutoModelForCausalLM"),
        "load_from": manifest.get("repo") or "path/to/this/folder",
        "heals": manifest.get("heals") or [],
        "trials": trials(manifest),
        "speed": speed_section(manifest),
        "perplexity_change": perplexity_change,
        **(_pruned_variables(manifest) if pruned and not quantized else {}),
    }
    name = "quantized_card.md" if quantized else "model_card.md" if pruned else "healed_card.md"
    name = "gguf_card.md" if is_gguf(manifest) else name
    text = shipped_template(name) if template is None else template
    return re.sub(r"\n{3,}", "\n\n", compiled_card(text).render(variables))


@functools.cache
def compiled_card(text: str) -> Any:
    """The jinja2 template of a card, which takes longer to compile than to render."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(shipped_template),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["gib"] = lambda count: f"{count / 2**30:.2f} GiB"
    environment.filters["count"] = lambda count: f"{count:,}"
    environment.filters["millions"] = lambda count: f"{count / 1e6:,.1f} M"
    return environment.from_string(text)


def shipped_template(name: str) -> str:
    """The text of a template of the package."""
    return resources.files("surgery").joinpath(f"card/templates/{name}").read_text(encoding="utf-8")


def _pruned_variables(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a template sees of a pruned model besides its manifest."""
    plan, source, result = manifest["plan"], manifest["source"], manifest["result"]
    one_width = {"intermediate_size": {"before": plan["width_before"], "after": plan["width_after"]}}
    return {
        "method": plan.get("method_label") or plan["method"],
        "paper": plan.get("paper", ""),
        "percent": f"{100 * plan['sparsity']:.0f}%",
        "saved": f"{100 * (1 - result['bytes'] / source['bytes']):.0f}%",
        "widths": plan.get("widths") or one_width,
        "widths_differ": widths_differ(plan),
        "per_layer": layers_differ(plan),
        "cuts": cut_lines(plan),
        "search": search_line(plan),
        "padded": bool(plan.get("padded")),
        "repair": plan.get("repair", "none"),
        "repair_label": manifest.get("repair_label", ""),
        "repaired": describe_repair(manifest),
        "lp_intervals": lp_interval_note(plan),
    }


def lp_interval_note(plan: dict[str, Any]) -> str:
    """What the intervals of the plan's LP shares are, or why it has none."""
    if any(layer.get("lp_kept_interval") for layer in plan["layers"]):
        return (
            "Lines and bands are 95% intervals over the calibration blocks; the kept channels were chosen on "
            "the same blocks."
        )
    return plan.get("no_intervals") or "No intervals: this was pruned by a version that computed none."


def describe_repair(manifest: dict[str, Any]) -> str:
    """Which matrices repair changed, in how many layers."""
    entries = manifest.get("repair") or []
    ffns = sum(any(r["ridge"] is not None for r in entry["ffns"].values()) for entry in entries)
    attention = sum(bool(entry["attention"] and entry["attention"]["ridge"] is not None) for entry in entries)
    parts = [f"the FFN's down projection in {ffns} of {len(entries)} layers"]
    experts = sum(bool(entry.get("experts", {}).get("changed")) for entry in entries)
    if experts:
        parts.append(f"those of the routed experts together in {experts}")
    if attention:
        parts.append(f"the attention's output projection in {attention}")
    if manifest.get("final_norm"):
        parts.append(f"the final norm, times {manifest['final_norm']['scale']:.3f}")
    return ", ".join(parts)


def front_matter(manifest: dict[str, Any], source_card: str | None = None) -> str:
    """The card's YAML, by the conventions of the Hub (`hub_metadata`).

    The results in the source's card are left out, because they are not results of this model.
    """
    from huggingface_hub import EvalResult, ModelCardData

    heals, own = manifest.get("heals") or [], own_tags(manifest)
    inherited = inherited_metadata(source_card)
    name = manifest["source"]["name"]
    tags = [tag for tag in inherited.pop("tags", []) if tag not in own]
    fields: dict[str, Any] = {
        **inherited,
        "library_name": "gguf" if is_gguf(manifest) else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*tags, *own],
        **base_model(manifest),
    }
    measured = manifest["measurements"].get("pruned")
    if heals:
        measured = heals[-1].get("evaluation", {}).get("after")
    calibration = manifest.get("calibration") or {}
    texts = [part["name"] for part in calibration.get("parts") or [calibration] if "name" in part]
    texts += [part["name"] for entry in heals for part in entry["text"]["parts"]]
    texts += [measured["text"]] if measured else []
    datasets = list(dict.fromkeys(text.partition(":")[0] for text in texts if "/" in text))
    if datasets:
        fields["datasets"] = datasets
    if measured:
        fields["model_name"] = (manifest.get("repo") or name).split("/")[-1]
        fields["eval_results"] = [
            EvalResult(
                task_type="text-generation",
                dataset_type=measured["text"].partition(":")[0],
                dataset_name=measured["text"],
                metric_type=kind,
                metric_name=f"{kind.replace('_', ' ')} ({measured['block_size']}-token blocks)",
                metric_value=measured[kind],
            )
            for kind in ("perplexity", "bits_per_byte")
        ]
    return str(ModelCardData(**fields).to_yaml())


def obligation(source_card: str | None) -> str:
    """What the source's license requires of modified copies; empty if nothing special is known."""
    data = inherited_metadata(source_card)
    license_id = str(data.get("license_name") or data.get("license") or "").lower()
    return next((text for word, text in OBLIGATIONS.items() if license_id.startswith(word)), "")
