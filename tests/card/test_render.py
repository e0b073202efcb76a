"""Model cards: compared with files that a person has read (`cards/`), and read as the Hub reads them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from helpers.tiny_models import ROOT
from huggingface_hub import ModelCard

from surgery.card.eval_results import eval_results
from surgery.card.hub_metadata import trials
from surgery.card.render import render_card
from surgery.repair.methods import REPAIRS

GOLDEN = ROOT / "cards"
MEASURED = {
    "perplexity": 17.53,
    "bits_per_byte": 1.183,
    "nats": 46901.2,
    "tokens": 16376,
    "bytes": 57177,
    "block_size": 2048,
    "text": "Salesforce/wikitext:wikitext-2-raw-v1:test",
    "sha256": "1" * 64,
    "convention": "non-overlapping blocks of 2048 tokens",
}
WEIGHT = {"layer": 1, "row": 788, "column_before": 2427, "column": 1200, "value": -0.6055}
VERIFICATION = {"tokens": 512, "relative_difference": 2.13e-6, "tolerance": 1e-3, "dtype": "float32"}
REPAIRED_LAYER = {"ffns": {"dense": {"ridge": 0.01}}, "attention": {"ridge": 0.1}}
LAYER = {"supernodes": 15, "supernodes_kept": 15}
SOURCE_CARDS = {
    "no-card": None,
    "llama": "---\nlicense: llama3.1\nlanguage:\n- en\n- de\ntags:\n- facebook\n---\n# Source\n",
    "evaluated": (
        "---\nlicense: apache-2.0\nmodel-index:\n- name: source\n  results:\n  - task:\n      type: "
        "text-generation\n    dataset:\n      type: mmlu\n      name: MMLU\n    metrics:\n    - type: "
        "accuracy\n      value: 0.99\n---\n"
    ),
}


def manifest(kind: str) -> dict[str, Any]:
    """The content of surgeon.json for one of the golden cards; the model of "evaluated" is repaired."""
    measured = kind != "no-card"
    repaired = kind == "evaluated"
    names = {"llama": "meta-llama/Llama-3.1-8B", "evaluated": "org/source", "no-card": "a-folder"}
    measurements: dict[str, Any] = {"verification": VERIFICATION}
    if measured:
        measurements["dense"] = {**MEASURED, "perplexity": 11.53, "bits_per_byte": 1.01}
        measurements["pruned"] = MEASURED
    if kind == "evaluated":  # the others are of a version that kept no losses of blocks
        for name, nats, step in (("dense", 5004.9, 1), ("pruned", 5851.6, 3)):
            blocks = [nats + 40 * place + step * place**2 for place in range(-4, 4)]
            measurements[name] = {**measurements[name], "block_nats": blocks}
    return {
        "source": {
            "name": names[kind],
            "revision": "abc123" if measured else None,
            "parameters": 134_515_008,
            "bytes": 269_030_016,
        },
        "result": {"parameters": 114_608_448, "bytes": 229_216_896},
        "plan": {
            "method": "scar-prot",
            "method_label": "SCAR-Prot",
            "paper": "Supernodes and Halos, arXiv 2604.23475",
            "repair": "lstsq-acc" if repaired else "none",
            "sparsity": 0.25,
            "width_before": 1536,
            "width_after": 1152,
            "layers": [{**LAYER, "lp_kept_interval": [0.9, 0.95]} if repaired else LAYER] * 2,
            "divides": {"32": [1, 2, 4], "64": [1, 2], "128": [1], "256": []},
        },
        "super_weights": [WEIGHT] if measured else [],
        "repair_label": REPAIRS["lstsq-acc" if repaired else "none"].label,
        "repair": [REPAIRED_LAYER, REPAIRED_LAYER] if repaired else [],
        "measurements": measurements,
        "calibration": {
            "blocks": 64,
            "block_size": 512,
            "name": "Salesforce/wikitext:wikitext-2-raw-v1:train" if measured else "text.txt",
            "sha256": "0" * 64,
            "seed": 42,
        },
        "versions": {"surgeon": "0.1.0", "transformers": "5.23.0", "torch": "2.13.0"},
        "command": "surgeon prune a-folder --intermediate-size 1152",
        "repo": "me/smaller" if measured else None,
    }


@pytest.mark.parametrize("kind", SOURCE_CARDS)
def test_golden_cards(kind: str) -> None:
    assert render_card(manifest(kind), SOURCE_CARDS[kind]) == (GOLDEN / f"{kind}.md").read_text()


@pytest.mark.parametrize("kind", SOURCE_CARDS)
def test_the_hub_can_read_the_metadata(kind: str) -> None:
    data = ModelCard(render_card(manifest(kind), SOURCE_CARDS[kind])).data
    assert data.library_name == "transformers" and "pruned" in data.tags
    if kind == "no-card":
        assert data.base_model is None and data.eval_results is None and data.license is None
        return
    assert data.base_model == manifest(kind)["source"]["name"]
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {
        "perplexity": 17.53,
        "bits_per_byte": 1.183,
    }
    assert data.datasets == ["Salesforce/wikitext"]


def test_rendering_over_our_own_card_changes_nothing() -> None:
    first = render_card(manifest("llama"), SOURCE_CARDS["llama"])
    assert render_card(manifest("llama"), first) == first


def test_a_template_can_be_replaced() -> None:
    text = render_card(manifest("llama"), None, "{{ method }} {{ percent }}, {{ load_from }}")
    assert text == "SCAR-Prot 25%, me/smaller"


def test_a_quantised_card_carries_the_license_over() -> None:
    quantised = {
        "source": {"name": "meta-llama/Llama-3.1-8B", "revision": None, "bytes": 16 << 30},
        "result": {"bytes": 5 << 30},
        "quantization": {"name": "INT4", "matrices": 224, "packed": True, "super_weights": "module"},
        "super_weights": [],
        "measurements": {},
        "command": None,
    }
    text = render_card(quantised, SOURCE_CARDS["llama"])
    data = ModelCard(text).data
    assert data.license == "llama3.1" and data.tags == ["facebook", "quantized", "surgeon"]
    assert data.base_model == "meta-llama/Llama-3.1-8B" and data.base_model_relation == "quantized"
    assert "Built with Llama" in text and render_card(quantised, text) == text


def test_only_registered_benchmarks_run_whole_become_eval_results() -> None:
    values = {"exact_match,strict-match": 0.2767, "exact_match,flexible-extract": 0.28, "samples": 1319}
    tasks: dict[str, Any] = {
        "harness": "lm-eval 0.4.9",
        "settings": {"gsm8k": {"fewshot": 5, "limit": None}, "piqa": {"fewshot": 0, "limit": None}},
        "results": {"gsm8k": values, "piqa": {"acc": 0.6}},
    }
    (file, content), *more = eval_results({"measurements": {"tasks": tasks}}).items()
    assert file == ".eval_results/gsm8k.yaml" and not more
    assert yaml.safe_load(content) == [
        {
            "dataset": {"id": "openai/gsm8k", "task_id": "gsm8k"},
            "value": 27.67,
            "notes": "lm-eval 0.4.9, 5-shot, exact_match,strict-match",
        }
    ]
    tasks["settings"]["gsm8k"]["limit"] = 100
    assert eval_results({"measurements": {"tasks": tasks}}) == {} == eval_results({"measurements": {}})


def test_golden_manifests_are_plain_json() -> None:
    assert json.loads(json.dumps(manifest("llama"))) == manifest("llama")


def test_no_runtime_is_named_that_does_not_load_layers_that_differ() -> None:
    fields = {**manifest("no-card"), "repo": "me/cut"}
    fields["source"] = {**fields["source"], "model_type": "llama"}
    assert trials(fields) == ["hf download me/cut", "vllm serve me/cut"]
    fields["plan"] = {**fields["plan"], "cuts": {"attention": {"removed": [1]}}}
    assert trials(fields) == []


def test_measured_speed_is_on_the_card() -> None:
    speed = {"median": 1234.5, "min": 1000.0, "max": 2000.0, "runs": 3}
    batch = {"batch": 4, "prefill": speed, "decode": None, "warm_up_seconds": 1.0}
    measured = {"load_seconds": 2.0, "peak_bytes": 3 << 30, "device_bytes": None, "versions": {"torch": "2"}}
    results = [
        {"model": "m", "runtime": "transformers", "type": None, **measured, "batches": [batch]},
        {"model": "m", "runtime": "vllm", "type": None, "failed": "vllm is not installed"},
    ]
    settings = {"threads": 1, "prompt_tokens": 512, "new_tokens": 64, "repeats": 3}
    machine = {"processor": "some CPU", "accelerator": None}
    bench = {"settings": settings, "machine": machine, "results": results}
    text = render_card({**manifest("llama"), "bench": bench}, SOURCE_CARDS["llama"])
    assert "| m | transformers | 4 | 2.0 s | 3.0 GiB | 1,234.5 (1,000.0 to 2,000.0) | – |" in text
    assert "On some CPU, 1 thread: prompts of 512 tokens" in text and "vllm" not in text
