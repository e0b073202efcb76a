"""The card of a carried adapter, by the conventions of the Hub."""

from __future__ import annotations

from typing import Any

TAGS = ["lora", "surgeon"]


def adapter_card(manifest: dict[str, Any], config: dict[str, Any]) -> str:
    """README.md of the adapter; `manifest` is its surgeon.json, `config` its adapter_config.json."""
    from huggingface_hub import ModelCardData

    base, entry = str(config["base_model_name_or_path"]), manifest["adapter"]
    fields: dict[str, Any] = {"library_name": "peft", "tags": TAGS}
    if "/" in base:  # a Hub id; the name of a folder would be a broken link
        fields |= {"base_model": base, "base_model_relation": "adapter"}
    refit = entry["refit"]
    refitted = (
        f"A of {len(entry['refitted'])} down projections was refitted on {refit['text']['name']}."
        if refit
        else "No weight was refitted."
    )
    return f"""---
{ModelCardData(**fields).to_yaml()}
---

# {entry["source"]["name"]} for {base}

The LoRA adapter {entry["source"]["name"]} of {entry["source"]["base"] or "the dense model"}, carried onto the
pruned model {base}. Adapted modules cut to the channels that it kept: {len(entry["cut"])}; copied:
{len(entry["copied"])}. {refitted} Nothing was trained.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "path/to/this/folder")
```

Made with surgeon {manifest["versions"]["surgeon"]}.
"""
