"""Render the model card of a shrunk checkpoint from its manifest and the source's own card."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

TAGS = ["pruned", "structured-pruning", "surgeon"]
METHOD_NAMES = {
    "scar-lp": "SCAR-LP",
    "scar-prot": "SCAR-Prot",
    "lp-hybrid": "LP-hybrid",
    "scar-conn": "SCAR-Conn",
    "scar-prot-published": "SCAR-Prot (redundancy as in the papers' code)",
    "lp-conditional": "LP × unexplained variance",
    "obs-loss": "loss-aware OBS",
    "obs": "OBS",
    "flap": "FLAP (WIFV)",
    "wanda-channel": "the papers' Wanda-channel",
    "taylor": "activation Taylor",
    "llm-pruner": "LLM-Pruner (param_first)",
    "optipfair": "optipfair's hybrid score",
    "magnitude": "weight magnitude",
    "activation": "activation power",
    "wanda": "Wanda-sp",
    "random": "random channels (a control)",
}
OBLIGATIONS = {
    "llama": (
        "The source is under a Llama community license: display “Built with Llama” where you use this model, keep the "
        "license and its notice with every copy, and begin the name of any model you make from it with “Llama”."
    ),
    "gemma": (
        "The source is under the Gemma Terms of Use: pass them and the use restrictions on with every copy, and say "
        "that files were changed (config.json and the weights were)."
    ),
}


def render_card(manifest: dict[str, Any], source_card: str | None = None, template: str | None = None) -> str:
    """The card's Markdown with its YAML front matter.

    `manifest` is the content of surgeon.json, `source_card` the README.md of the source model (license, language and
    tags are carried over), `template` jinja2 text used in place of the shipped one; it sees `manifest`,
    `front_matter`, `method`, `percent`, `saved`, `obligation`, `widths`, `widths_differ`, `per_layer`, `repair`, `repaired`, `auto_class` and `load_from`.
    """
    import jinja2

    if "quantization" in manifest:
        return _render_quantized(manifest, template)
    text = template
    if text is None:
        text = resources.files("cards").joinpath("model_card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["gib"] = lambda count: f"{count / 2**30:.2f} GiB"
    environment.filters["millions"] = lambda count: f"{count / 1e6:,.1f} M"
    plan, source, result = manifest["plan"], manifest["source"], manifest["result"]
    rendered = environment.from_string(text).render(
        manifest=manifest,
        front_matter=front_matter(manifest, source_card),
        method=METHOD_NAMES.get(plan["method"], plan["method"]),
        percent=f"{100 * plan['sparsity']:.0f}%",
        saved=f"{100 * (1 - result['bytes'] / source['bytes']):.0f}%",
        obligation=obligation(source_card),
        widths=plan.get("widths")
        or {"intermediate_size": {"before": plan["width_before"], "after": plan["width_after"]}},
        widths_differ=plan.get("allocation", "uniform") != "uniform",
        per_layer=plan.get("allocation", "uniform") != "uniform" and not plan.get("padded"),
        repair=plan.get("repair", "none"),
        repaired=describe_repair(manifest),
        auto_class=manifest.get("auto_class", "AutoModelForCausalLM"),
        load_from=manifest.get("repo") or "path/to/this/folder",
    )
    return re.sub(r"\n{3,}", "\n\n", rendered)


def _render_quantized(manifest: dict[str, Any], template: str | None) -> str:
    """The card of a quantised checkpoint; a template sees `manifest` and `load_from`."""
    import jinja2

    text = template
    if text is None:
        text = resources.files("cards").joinpath("quantized_card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    load_from = manifest.get("repo") or "path/to/this/folder"
    rendered = environment.from_string(text).render(manifest=manifest, load_from=load_from)
    return re.sub(r"\n{3,}", "\n\n", rendered).rstrip() + "\n"


def describe_repair(manifest: dict[str, Any]) -> str:
    """What repair changed: which matrices, in how many layers."""
    entries = manifest.get("repair") or []
    ffns = sum(any(r["ridge"] is not None for r in entry["ffns"].values()) for entry in entries)
    attention = sum(bool(entry["attention"] and entry["attention"]["ridge"] is not None) for entry in entries)
    parts = [f"the FFN's down projection in {ffns} of {len(entries)} layers"]
    if attention:
        parts.append(f"the attention's output projection in {attention}")
    return ", ".join(parts)


def front_matter(manifest: dict[str, Any], source_card: str | None = None) -> str:
    """YAML of the card, by the Hub's conventions; what the source's card does not say is left out.

    The Hub knows no relation "pruned": `finetune` and the tag `pruned` say it. The source's own results are not
    carried over, since they are not this model's.
    """
    from huggingface_hub import EvalResult, ModelCardData

    inherited = _inherited(source_card)
    name = manifest["source"]["name"]
    tags = [tag for tag in inherited.pop("tags", []) if tag not in TAGS]
    fields: dict[str, Any] = {**inherited, "library_name": "transformers", "pipeline_tag": "text-generation"}
    fields["tags"] = [*tags, *TAGS]
    if "/" in name:  # a Hub id; a folder's name would be a broken link
        fields |= {"base_model": name, "base_model_relation": "finetune"}
    shrunk = manifest["measurements"].get("shrunk")
    texts = [manifest["calibration"]["name"], *([shrunk["text"]] if shrunk else [])]
    datasets = list(dict.fromkeys(text.partition(":")[0] for text in texts if "/" in text))
    if datasets:
        fields["datasets"] = datasets
    if shrunk:
        fields["model_name"] = (manifest.get("repo") or name).split("/")[-1]
        fields["eval_results"] = [
            EvalResult(
                task_type="text-generation",
                dataset_type=shrunk["text"].partition(":")[0],
                dataset_name=shrunk["text"],
                metric_type=kind,
                metric_name=f"{kind.replace('_', ' ')} ({shrunk['block_size']}-token blocks)",
                metric_value=shrunk[kind],
            )
            for kind in ("perplexity", "bits_per_byte")
        ]
    return str(ModelCardData(**fields).to_yaml())


def obligation(source_card: str | None) -> str:
    """What the source's license asks of whoever passes a changed copy on; empty where nothing special is known."""
    data = _inherited(source_card)
    license_id = str(data.get("license_name") or data.get("license") or "").lower()
    return next((text for word, text in OBLIGATIONS.items() if license_id.startswith(word)), "")


def _inherited(source_card: str | None) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    if not source_card or not source_card.startswith("---"):
        return {}
    data = ModelCard(source_card, ignore_metadata_errors=True).data.to_dict()
    keys = ("license", "license_name", "license_link", "language", "tags")
    return {key: data[key] for key in keys if data.get(key)}
