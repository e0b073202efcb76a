"""What the Hub is told of a folder surgeon wrote: base model, relation to it, tags, and how to try it."""

from __future__ import annotations

from typing import Any

MADE_BY = "surgeon"  # the tag by which all models that surgeon made are found
PRUNED_TAGS = ["pruned", "structured-pruning", MADE_BY]
QUANTIZED_TAGS = ["quantized", MADE_BY]
GGUF_TAGS = ["gguf", MADE_BY]
# model types whose class in vLLM takes the FFN's width from `intermediate_size`, so that a uniform cut loads
VLLM_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def is_gguf(manifest: dict[str, Any]) -> bool:
    """Whether the folder holds a GGUF file."""
    return "gguf" in manifest


def is_quantized(manifest: dict[str, Any]) -> bool:
    """Whether the folder is another form of its base model's weights: rounded, packed, or GGUF."""
    return "quantization" in manifest or is_gguf(manifest)


def own_tags(manifest: dict[str, Any]) -> list[str]:
    """Tags by what was done; of a pruned model the method's name too, so that a program finds it."""
    if is_gguf(manifest):
        return GGUF_TAGS
    if is_quantized(manifest):
        return QUANTIZED_TAGS
    distilled = any(heal["options"]["cross_entropy"] < 1 for heal in manifest.get("heals") or [])
    healed = ["distilled"] if distilled else []
    if "plan" not in manifest:
        return [*healed, MADE_BY]
    return [*PRUNED_TAGS, *healed, manifest["plan"]["method"]]


def base_model(manifest: dict[str, Any]) -> dict[str, str]:
    """`base_model` and `base_model_relation` of the card; empty where the base is not on the Hub.

    The base is the source where that was on the Hub, else the repo that `surgeon push --base-model` named: of
    a packed or GGUF form, that of the plain folder. The Hub has no relation "pruned": pruned and healed
    models get `finetune`.
    """
    source = manifest["source"]["name"]
    base = manifest.get("base_model") or (source if "/" in source else None)
    if base is None:  # the name of a folder would be a broken link
        return {}
    return {
        "base_model": base,
        "base_model_relation": "quantized" if is_quantized(manifest) else "finetune",
    }


def widths_differ(plan: dict[str, Any]) -> bool:
    """Whether layers keep different numbers of channels, padded or not."""
    own = [set(change.get("per_layer") or ()) - {None} for change in (plan.get("widths") or {}).values()]
    return any(len(widths) > 1 for widths in own)


def layers_differ(plan: dict[str, Any]) -> bool:
    """Whether a plan's layers differ in width or lack attention or FFN: surgeon's loader has to load them."""
    uneven = widths_differ(plan) and not plan.get("padded")
    return uneven or not {"attention", "whole-ffn"}.isdisjoint(plan.get("cuts", {}))


def trials(manifest: dict[str, Any]) -> list[str]:
    """Command lines that run the published model, of the runtimes that load this form of it.

    Layers that differ need surgeon's loader, which neither `transformers serve` nor vLLM imports.
    """
    repo = manifest.get("repo")
    if repo is None or layers_differ(manifest.get("plan") or {}):
        return []
    if is_gguf(manifest):
        return [f"llama-cli -hf {repo}", f"llama-server -hf {repo}"]
    vllm = [f"vllm serve {repo}"] if manifest["source"].get("model_type") in VLLM_TYPES else []
    return [f"hf download {repo}", *vllm]
