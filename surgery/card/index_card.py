"""The data-set card of a published index."""

from __future__ import annotations

import re
import statistics
from typing import Any

from surgery.card.render import compiled_card, obligation, shipped_template
from surgery.card.source_card import inherited_metadata
from surgery.index.channel_index import ChannelIndex
from surgery.index.intervals import bounds, median_top_share, top_share, why_none

TAG = "surgeon-index"  # of every published index; `surgeon find` searches for it
CHANNELS_FILE = "channels.parquet"
KEY = "surgeon_index"  # of the card's metadata: what `surgeon find` lists


def model_tag(name: str) -> str:
    """The tag of the indexes of a model."""
    return f"base_model:{name}"


def render_index_card(
    index: ChannelIndex, repo: str, columns: list[str], source_card: str | None = None
) -> str:
    """The card's Markdown with its YAML front matter.

    `columns` are the statistics in the Parquet file. The license is that of `source_card`, the README.md of
    the model.
    """
    fields = index.as_json()
    inherited = inherited_metadata(source_card)
    shares = [layer["lp_share"]["0.01"] for layer in fields["layers"] if layer["width"]]
    named = inherited.get("license_name") or inherited.get("license") or ""
    link = inherited.get("license_link")
    text = compiled_card(shipped_template("index_card.md")).render(
        **fields,
        repo=repo,
        columns=[f"`{name}`" for name in columns],
        proved=[one for one in fields["structures"] if one["super"]],
        spikes=[one for one in fields["structures"] if not one["super"]],
        median_interval=bounds(median_top_share(index)),
        layer_intervals=[bounds(top_share(layer)) for layer in index.layers],
        why_no_intervals=why_none(index),
        shares={"median": statistics.median(shares), "min": min(shares), "max": max(shares)},
        second_order="obs" in columns,
        layer_widths=" and ".join(str(width) for width in sorted(set(fields_widths(fields)), reverse=True)),
        license=f"[{named}]({link})" if named and link else named,
        obligation=obligation(source_card),
        front_matter=_front_matter(fields, "obs" in columns, inherited),
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def fields_widths(fields: dict[str, Any]) -> list[int]:
    """FFN widths of the layers in index.json, without layers that have no FFN."""
    return [layer["width"] for layer in fields["layers"] if layer["width"]]


def _front_matter(fields: dict[str, Any], second_order: bool, inherited: dict[str, Any]) -> str:
    """The card's YAML: license, tags to be found by, what the viewer shows, and what `surgeon find` lists."""
    from huggingface_hub import DatasetCardData

    source, calibration = fields["source"], fields["calibration"]
    metadata: dict[str, Any] = {
        **{key: value for key, value in inherited.items() if key.startswith("license")},
        "pretty_name": f"Channel index of {source['name']}",
        "tags": ["surgeon", TAG, model_tag(source["name"])],
        "base_model": source["name"],
        "configs": [{"config_name": "channels", "data_files": CHANNELS_FILE, "default": True}],
        KEY: {
            "model": source["name"],
            "commit": source["revision"],
            "calibration": calibration["name"],
            "tokens": calibration["blocks"] * calibration["block_size"],
            "dtype": fields["run"]["dtype"],
            "second_order": second_order,
            "super_weights": len(fields["super_weights"]),
        },
    }
    return str(DatasetCardData(**metadata).to_yaml())
