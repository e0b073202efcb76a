"""Streamed log-likelihoods against lm-eval's own model, which runs the whole model by from_pretrained."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fp8 import store_fp8
from helpers.tiny_gguf import PROMPT, llama_cpp_logprobs, write_gguf
from helpers.tiny_models import opened, tiny_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from surgery.engine.open_model import open_model
from surgery.errors import CalibrationError, UsageError
from surgery.evaluate.continuations import (
    Request,
    length_matters,
    padded_length,
    score_continuations,
    scoring_cost,
)
from surgery.evaluate.harness_model import SurgeonLM

LENGTH = 40  # a context length that some requests exceed


def instances(kind: str, arguments: list[tuple[str, ...]]) -> list[Instance]:
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]


def pairs(text: str, count: int = 24) -> list[tuple[str, str]]:
    """Contexts of 0 to 60 bytes, each twice, with continuations of 1 to 12; some are cut from the left."""
    draw = random.Random(0)
    found = []
    for _ in range(count):
        start, context, rest = draw.randrange(5000), draw.choice((0, 3, 9, 17, 30, 60)), draw.randint(1, 12)
        for other in (start + context, draw.randrange(5000)):
            found.append((text[start : start + context], text[other : other + rest]))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_scores_are_those_of_lm_eval_in_memory(
    family: str, save_tiny: Callable[..., Path], license_text: str
) -> None:
    folder = save_tiny(family)
    ours = SurgeonLM(opened(folder), max_length=LENGTH)
    theirs = HFLM(str(folder), device="cpu", dtype="float32", max_length=LENGTH, batch_size=4)
    asked = pairs(license_text)
    found = ours.loglikelihood(instances("loglikelihood", asked))
    expected = theirs.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], rel=1e-4, abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    texts = [(license_text[:130],), (license_text[200:205],), (license_text[300 : 300 + LENGTH],)]
    rolled = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    whole = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    assert rolled == pytest.approx(whole, rel=1e-5)


def test_greedy_continuations_are_told(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("llama")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = [5, 9, 2, 40]
    for _ in range(3):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    asked = [Request(tuple(ids[:4]), tuple(ids[4:])), Request(tuple(ids[:4]), (*ids[4:6], ids[6] ^ 1))]
    scores = score_continuations(opened(folder), asked, max_length=64)
    assert [score.greedy for score in scores] == [True, False]
    # the first two tokens are likelier alone than with a third; they share the run of the longer request
    shorter = score_continuations(
        opened(folder), [*asked, Request(*(tuple(ids[:4]), tuple(ids[4:6])))], max_length=64
    )
    assert shorter[2].nats > shorter[0].nats == scores[0].nats


def test_several_passes_give_the_same_scores(save_tiny: Callable[..., Path], license_text: str) -> None:
    folder = save_tiny("llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    asked = [Request(tuple(a.encode() or b"\1"), tuple(b.encode())) for a, b in pairs(license_text, 60)]
    asked = [Request(tuple(i % 64 for i in r.context), tuple(i % 64 for i in r.continuation)) for r in asked]
    plenty = scoring_cost(opened(folder), asked, max_length=LENGTH)
    little = opened(folder, memory=plenty.smallest_bytes + 60_000)
    cost = scoring_cost(little, asked, max_length=LENGTH)
    assert cost.read_bytes >= 2 * plenty.read_bytes and cost.write_bytes == 0
    assert cost.host_bytes <= little.run.memory
    once = score_continuations(opened(folder), asked, max_length=LENGTH)
    several = score_continuations(little, asked, max_length=LENGTH)
    assert [s.greedy for s in several] == [s.greedy for s in once]
    assert [s.nats for s in several] == pytest.approx([s.nats for s in once], rel=1e-5)


def test_padding_is_an_eighth_at_most() -> None:
    for tokens in range(1, 3000):
        assert tokens <= padded_length(tokens) <= max(8, tokens + tokens // 8 + 1)
    assert len({padded_length(tokens) for tokens in range(1, 4097)}) < 80


def test_blocks_are_not_padded_where_rotary_embeddings_depend_on_their_length(
    save_tiny: Callable[..., Path], license_text: str
) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    folder = save_tiny("llama", max_position_embeddings=20, rope_parameters=rope)
    model = opened(folder)
    assert length_matters(model.meta_model.config)
    theirs = HFLM(str(folder), device="cpu", dtype="float32", max_length=LENGTH, batch_size=1)
    asked = instances("loglikelihood", pairs(license_text, 8))
    expected = [nats for nats, _ in theirs.loglikelihood(asked, disable_tqdm=True)]
    found = [nats for nats, _ in SurgeonLM(model, max_length=LENGTH).loglikelihood(asked)]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_what_cannot_be_scored_is_refused(save_tiny: Callable[..., Path]) -> None:
    model = opened(save_tiny("llama"))
    for request in (Request((), (1,)), Request((1,), ()), Request((1,), (1,) * 9)):
        with pytest.raises(CalibrationError, match="can't be scored"):
            score_continuations(model, [request], max_length=8)
    generate: Any = instances("generate_until", [("a", "b")])
    with pytest.raises(UsageError, match="generate text"):
        SurgeonLM(model).generate_until(generate)


def test_gguf_files_are_scored_as_by_llama_cpp(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", "llama")
    expected = llama_cpp_logprobs(path)[:40]
    asked = [Request(tuple(PROMPT), (token,)) for token in range(40)]
    scores = score_continuations(open_model(path, device="cpu", dtype="float32"), asked, max_length=256)
    assert torch.allclose(torch.tensor([score.nats for score in scores]), expected, atol=2e-4)


def test_fp8_folders_are_scored_on_their_dequantised_weights(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("llama")
    dense = store_fp8(folder, "blocks")
    model = tiny_model("llama")
    model.load_state_dict(dense)
    ids = [5, 9, 2, 40, 7, 30]
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    asked = [Request(tuple(ids[:3]), tuple(ids[3:]))]
    (score,) = score_continuations(open_model(folder, device="cpu", dtype="float32"), asked, max_length=64)
    assert score.nats == pytest.approx(float(log_p[[2, 3, 4], ids[3:]].sum()), rel=1e-4)
