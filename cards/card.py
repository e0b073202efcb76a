"""Render the model card of a shrunk checkpoint from its manifest and the source's own card."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

TAGS = ["pruned", "structured-pruning", "surgeon"]
METHOD_NAMES = {
    "scar-lp": "SCAR-LP",
    "scar-prot": "SCAR-Prot",
    "scar-conn": "SCAR-Conn",
    "magnitude": "weight magnitude",
    "activation": "activation power",
    "wanda": "Wanda-sp",
    "random": "random channels (a control)",
}


def render_card(manifest: dict[str, Any], source_card: str | None = None, template: str | None = None) -> str:
    """The card's Markdown with its YAML front matter.

    `manifest` is the content of surgeon.json, `source_card` the README.md of the source model (license and language
    are carried over), `template` jinja2 text used in place of the shipped one; it sees `manifest`, `front_matter`,
    `method`, `percent` and `saved`.
    """
    import jinja2

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
    )
    return re.sub(r"\n{3,}", "\n\n", rendered)


def front_matter(manifest: dict[str, Any], source_card: str | None = None) -> str:
    """YAML of the card, by the Hub's conventions; what the source's card does not say is left out."""
    from huggingface_hub import ModelCardData

    inherited = _inherited(source_card)
    name = manifest["source"]["name"]
    fields: dict[str, Any] = {**inherited, "library_name": "transformers", "pipeline_tag": "text-generation"}
    fields["tags"] = list(dict.fromkeys([*inherited.get("tags", []), *TAGS]))
    if "/" in name:  # a Hub id; a folder's name would be a broken link
        fields |= {"base_model": name, "base_model_relation": "finetune"}
    return str(ModelCardData(**fields).to_yaml())


def _inherited(source_card: str | None) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    if not source_card or not source_card.startswith("---"):
        return {}
    data = ModelCard(source_card, ignore_metadata_errors=True).data.to_dict()
    return {
        key: data[key] for key in ("license", "license_name", "license_link", "language") if data.get(key)
    }
