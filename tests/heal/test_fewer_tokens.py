"""Healing a model with a smaller vocabulary: the teacher's distribution over the tokens that stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION, opened, tiny_model
from helpers.tokenizers_made import fast_tokenizer, text
from transformers import AutoModelForCausalLM

from surgery.engine.streamed_model import StreamedModel
from surgery.errors import UsageError
from surgery.heal.pair import check_known, shared_tokens
from surgery.heal.targets import Teacher
from surgery.vocabulary.kept_ids import ids_of

TOKENS, ROWS = 700, 704  # the embedding has rows that no token has


@pytest.fixture
def pair(tmp_path: Path, surgeon: Callable[..., Any]) -> tuple[Path, Path]:
    """Folders of a tiny model, and of it with 500 tokens and half of its channels."""
    ids = {"vocab_size": ROWS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    tiny_model("llama", **ids).save_pretrained(tmp_path / "dense")
    fast_tokenizer("byte-level", TOKENS).save_pretrained(tmp_path / "dense")
    (tmp_path / "words.txt").write_text(text())
    cut = (
        "--keep-vocabulary",
        "500",
        "--vocabulary-text",
        "words.txt",
        "--sparsity",
        "0.5",
        "--multiple-of",
        "4",
    )
    surgeon("prune", "dense", *cut, *CALIBRATION, "--out", "cut")
    return tmp_path / "dense", tmp_path / "cut"


def test_targets_are_the_dense_distribution_over_the_tokens_that_stay(pair: tuple[Path, Path]) -> None:
    dense, cut = pair
    kept = ids_of(json.loads((cut / "surgeon.json").read_text())["plan"]["cuts"]["vocab"]["kept_ids"])
    rows = shared_tokens(opened(cut), opened(dense))
    assert rows is not None and rows.tolist() == kept
    assert shared_tokens(opened(dense), opened(dense)) is None
    teacher = Teacher(
        StreamedModel(opened(dense)),
        top=2048,
        temperature=1.0,
        micro_batch=2,
        place="device",
        rows=rows,
    )
    ids = torch.randint(0, 500, (2, 12), generator=torch.Generator().manual_seed(1))
    found = teacher.targets(ids)
    assert found.ids.shape == (2, 11, 500)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(dense).eval()(torch.tensor(kept)[ids]).logits
    expected = logits[:, :-1, kept].log_softmax(-1)
    assert torch.allclose(found.log_p.float(), expected.gather(-1, found.ids.long()), atol=0.01)


def test_rows_without_a_token_are_never_a_target(pair: tuple[Path, Path]) -> None:
    """A student with two rows that the teacher has no token for, and one token in another place."""
    dense, rows = opened(pair[0]), torch.tensor([5, -1, 7, 300, -1])
    teacher = Teacher(
        StreamedModel(dense), top=2048, temperature=1.0, micro_batch=1, place="device", rows=rows
    )
    ids = torch.tensor([[0, 2, 3, 0]])
    found = teacher.targets(ids)
    assert found.ids.shape == (1, 3, 3) and set(found.ids.flatten().tolist()) == {0, 2, 3}
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(pair[0]).eval()(rows[ids]).logits
    expected = logits[:, :-1, [5, 7, 300]].log_softmax(-1)
    places = torch.tensor([0, -1, 1, 2])[found.ids.long()]
    assert torch.allclose(found.log_p.float(), expected.gather(-1, places), atol=0.01)
    check_known(rows, ids, dense, dense)
    check_known(None, ids, dense, dense)
    with pytest.raises(UsageError, match="no embedding of a token"):
        check_known(rows, torch.tensor([[0, 4]]), dense, dense)


def test_tokens_are_matched_by_their_texts(pair: tuple[Path, Path]) -> None:
    """Two ids are swapped in the student."""
    dense, cut = pair
    file = cut / "tokenizer.json"
    made = json.loads(file.read_text())
    words = made["model"]["vocab"]
    one, other = list(words)[300:302]
    before = shared_tokens(opened(cut), opened(dense))
    words[one], words[other] = words[other], words[one]
    file.write_text(json.dumps(made))
    after = shared_tokens(opened(cut), opened(dense))
    assert before is not None and after is not None
    moved = (before != after).nonzero()[:, 0].tolist()
    assert sorted(moved) == sorted([words[one], words[other]])
    assert after[moved].tolist() == before[moved].flip(0).tolist()


def test_a_smaller_vocabulary_is_healed(pair: tuple[Path, Path], surgeon: Callable[..., Any]) -> None:
    how = (
        "--text",
        "words.txt",
        "--block-size",
        "16",
        "--batch-tokens",
        "64",
        "--tokens",
        "1024",
        "--train",
        "all",
    )
    surgeon("heal", "cut", *how, "--learning-rate", "1e-3", "--out", "healed")
    (heal,) = json.loads((pair[1].parent / "healed" / "surgeon.json").read_text())["heals"]

    assert all(one["after"] < one["before"] for one in heal["held_out"].values())
    assert heal["teacher"]["shared_tokens"] == 500
    assert "over the\n500 tokens that both have" in (pair[1].parent / "healed" / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained("healed").config.vocab_size == 500


def test_a_student_with_other_tokens_is_refused(pair: tuple[Path, Path]) -> None:
    dense, cut = pair
    with pytest.raises(UsageError, match="200 others"):
        shared_tokens(opened(dense), opened(cut))
