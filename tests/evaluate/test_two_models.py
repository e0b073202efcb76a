"""Two models compared: on texts against both run whole, on tasks against counting by hand."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import opened, token_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.errors import MemoryBudgetError
from surgery.evaluate.agreement import agreement_cost, compare_on_text
from surgery.evaluate.lm_eval import Answer, TaskResults
from surgery.evaluate.paired import compare_tasks
from surgery.evaluate.text_tasks import (
    CONTEXT_WORDS,
    CONTINUATION_WORDS,
    OPTIONS,
    cloze_items,
    continuation_items,
)


def log_probabilities(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """[N, T - 1, V] float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(ids).logits[:, :-1].double().log_softmax(-1)


def test_agreement_is_that_of_both_models_whole(save_tiny: Callable[..., Path], license_text: str) -> None:
    ours, theirs = save_tiny("llama"), save_tiny("llama", name="other", seed=1, intermediate_size=48)
    blocks = token_blocks(AutoTokenizer.from_pretrained(ours), license_text, "t", block_size=24, blocks=6)
    found = compare_on_text(opened(ours), opened(theirs), blocks)
    ids = blocks.ids.long()
    log_p, log_q = (log_probabilities(folder, ids) for folder in (ours, theirs))
    nats = [-part.gather(-1, ids[:, 1:, None])[..., 0].sum(1) for part in (log_p, log_q)]
    kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean(1)
    top1 = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(1)
    assert found.model.nats == pytest.approx(float(nats[0].sum()), rel=1e-6)
    assert found.against.nats == pytest.approx(float(nats[1].sum()), rel=1e-6)
    for estimate, values in ((found.kl, kl), (found.top1, top1)):
        assert estimate.mean == pytest.approx(float(values.mean()), rel=1e-4)
        assert estimate.stderr == pytest.approx(float(values.std() / math.sqrt(6)), rel=1e-3)
    more = (found.model.nats - found.against.nats) / math.log(2) / blocks.predicted_bytes
    assert found.bits_per_byte.mean == pytest.approx(more)
    cost = agreement_cost(opened(ours), opened(theirs), [(6, 24)])
    tight = opened(ours, memory=cost.smallest_bytes)
    assert compare_on_text(tight, opened(theirs), blocks).kl.mean == pytest.approx(found.kl.mean)
    with pytest.raises(MemoryBudgetError):
        compare_on_text(opened(ours, memory=cost.smallest_bytes - 1), opened(theirs), blocks)


def results(task: str, right: list[int], chosen: list[int]) -> TaskResults:
    answers = [
        Answer(number, f"question {number}", ("a", "b"), option, 0, {"acc": float(good)})
        for number, (good, option) in enumerate(zip(right, chosen, strict=True))
    ]
    return TaskResults({"results": {task: {"acc": statistics.fmean(right)}}}, {task: answers})


def test_flips_and_paired_differences() -> None:
    model, dense = [1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0]
    (pair,) = compare_tasks(
        results("t", model, [1 - x for x in model]), results("t", dense, [1 - x for x in dense])
    )
    (row,) = pair.differences
    each = [a - b for a, b in zip(model, dense, strict=True)]
    assert (row.model, row.against) == (0.5, pytest.approx(4 / 6))
    assert row.difference == pytest.approx(-1 / 6)
    assert row.stderr == pytest.approx(statistics.stdev(each) / math.sqrt(6))
    assert [(flip.number, flip.lost) for flip in pair.flips] == [(1, True), (2, True), (4, False)]
    assert pair.changed == 3 and pair.flips[0].chosen == "b" and pair.flips[0].right == "a"
    assert pair.as_json()["lost"] == 2 and pair.as_json()["flipped"] == 0.5


def test_items_are_of_the_text(license_text: str) -> None:
    plain = " ".join(license_text.split())
    items = continuation_items(license_text, 20, seed=3)
    assert (
        items == continuation_items(license_text, 20, seed=3) != continuation_items(license_text, 20, seed=4)
    )
    assert len(items) > 8 and len({item["answer"] for item in items}) > 1
    for item in items:
        right = item["options"][item["answer"]]
        assert " ".join((item["context"] + right).split()) in plain
        assert len(item["context"].split()) == CONTEXT_WORDS
        assert len(set(item["options"])) == OPTIONS
        for option in item["options"]:
            assert len(option.split()) == CONTINUATION_WORDS and " ".join(option.split()) in plain
        assert len({option[: len(option) - len(option.lstrip())] for option in item["options"]}) == 1
    words = cloze_items(license_text, 10, seed=3)
    assert len(words) == 10
    for item in words:
        assert " ".join((item["context"] + item["word"]).split()) in plain
        assert (
            item["word"][0] == " "
            and item["word"][1:].isalpha()
            and item["context"] == item["context"].rstrip()
        )


def test_eval_against_compares_texts_and_tasks(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    save_tiny("llama")
    save_tiny("llama", name="other", seed=1)
    tasks = ["--tasks", "surgeon_continuation,surgeon_cloze", "--task-text", "text.txt", "--limit", "12"]
    texts = ["--text", "text.txt", "--text-blocks", "2", "--text-block-size", "32"]
    measured = ["--dtype", "float32", *texts]
    options = [*measured, *tasks]
    found = json.loads(surgeon("eval", "tiny", "--against", "other", *options, "--json").stdout)
    alone = json.loads(surgeon("eval", "other", *measured, "--json").stdout)
    (text,) = found["against"]["texts"]
    assert text["bits_per_byte"] == pytest.approx(alone["bits_per_byte"])
    more = found["bits_per_byte"] - alone["bits_per_byte"]
    assert text["bits_per_byte_more"]["mean"] == pytest.approx(more)
    (continuation, cloze) = found["against"]["paired"]
    accuracy = found["against"]["tasks"]["results"]["surgeon_continuation"]["acc"]
    assert continuation["differences"][0]["against"] == accuracy and cloze["changed"] is None
    same = surgeon("eval", "tiny", "--against", "tiny", *measured).stdout
    assert "KL 0.0000" in same and "same likeliest token 100.0%" in same
    told = json.loads(surgeon("eval", "tiny", *options, "--dry-run", "--json").stdout)
    assert told["costs"]["flops"] > 0 and told["tasks"] == ["surgeon_continuation", "surgeon_cloze"]
    refused = surgeon("eval", "tiny", "--against", "other", "--activations", "w8a8", *texts, code=2).stderr
    assert "--against" in refused
