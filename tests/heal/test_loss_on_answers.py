"""`surgeon heal` on chat: what the loss is on, how that is told, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import opened
from transformers import AutoTokenizer

from surgery.errors import UsageError
from surgery.heal.heal import open_heal_journal
from surgery.heal.heal_text import HealText, draw_heal_text
from surgery.heal.options import HealOptions

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
HEAL = (
    *("--tokens", "512", "--block-size", "32", "--batch-tokens", "128", "--cross-entropy", "0.9"),
    *("--train", "norms", "--teacher", "teacher"),
)


@pytest.fixture
def folder(save_tiny: Callable[..., Path]) -> Path:
    """A folder with a student and its teacher, which have a chat template, and with texts."""
    save_tiny("llama", name="teacher", seed=1)
    student = save_tiny("llama", name="student", hidden_size=16, head_dim=4)
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(student)
    asked = [{"prompt": f"How much is {n} and {n}?", "completion": f"{2 * n}."} for n in range(200)]
    (student.parent / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    unasked = [{"messages": [{"role": "user", "content": "Is anyone here?"}]}] * 200
    (student.parent / "users.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unasked))
    return student.parent


def drawn(folder: Path, blocks: int, block_size: int, loss_on: str) -> HealText:
    spec = str(folder / "chat.jsonl")
    model = opened(folder / "student")
    return draw_heal_text(model, [spec], blocks=blocks, block_size=block_size, seed=3, loss_on=loss_on)


@pytest.mark.usefixtures("folder")
def test_answers_are_counted_and_told(surgeon: Callable[..., Any]) -> None:
    texts = ("--text", "chat.jsonl", "--text", "text.txt")
    result = surgeon("heal", "student", *HEAL, *texts, "--out", "healed", "--json")
    entry = json.loads(result.stdout)
    text = entry["text"]
    chat, plain = text["parts"]
    assert text["loss_on"] == "answers"
    assert plain["tokens_counted"] == 8 * 31
    # "<assistant>6.\n" after "<user>How much is 3 and 3?\n" and before "\n\n"
    assert 0 < chat["tokens_counted"] < 8 * 31 / 5
    assert text["tokens_counted"] == chat["tokens_counted"] + plain["tokens_counted"]
    assert f"of which the loss counts {text['tokens_counted']}" in result.stderr
    every = json.loads(
        surgeon("heal", "student", *HEAL, *texts, "--loss-on", "all", "--dry-run", "--json").stdout
    )
    assert every["text"]["sha256"] == text["sha256"]
    assert every["text"]["tokens_counted"] == 16 * 31


def test_the_masks_of_blocks_belong_to_their_tokens(folder: Path) -> None:
    text = drawn(folder, 12, 64, "answers")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    for ids, counted in zip(text.ids, text.counted, strict=True):
        shown = tokenizer.decode(ids.tolist())
        assert len(shown) == 64
        found = [slice(*one.span(1)) for one in re.finditer(r"<assistant>(\d+\.\n)", shown)]
        assert all(counted[part].all() for part in found)
        others = [slice(*one.span()) for one in re.finditer(r"\n<user>[^\n]*\n<assistant>", shown)]
        assert found or others
        assert not any(counted[part].any() for part in others)


def test_the_journal_knows_what_the_loss_is_on(folder: Path) -> None:
    model = opened(folder / "student")

    def resumed(loss_on: str) -> bool:
        text = drawn(folder, 4, 32, loss_on)
        return open_heal_journal(model, model, text, HealOptions(), folder / "healed").resumed

    found = [resumed(loss_on) for loss_on in ("answers", "answers", "all", "all")]
    assert found == [False, True, False, True]
    with pytest.raises(UsageError, match="unknown --loss-on"):
        resumed("questions")


def test_plain_text_gives_the_same_bytes_for_both(folder: Path, surgeon: Callable[..., Any]) -> None:
    for loss_on in ("answers", "all"):
        surgeon("heal", "student", *HEAL, "--text", "text.txt", "--loss-on", loss_on, "--out", loss_on)
    files = [(folder / name / "model.safetensors").read_bytes() for name in ("answers", "all")]
    assert files[0] == files[1]
    commands = [
        json.loads((folder / name / "surgeon.json").read_text())["heals"][0]["command"]
        for name in ("answers", "all")
    ]
    assert ["--loss-on all" in command for command in commands] == [False, True]


@pytest.mark.usefixtures("folder")
def test_text_without_an_answer_is_refused(surgeon: Callable[..., Any]) -> None:
    refused = surgeon("heal", "student", *HEAL, "--text", "users.jsonl", code=1).stderr
    assert "belongs to an answer" in refused and "users.jsonl" in refused and "--loss-on all" in refused
    surgeon("heal", "student", *HEAL, "--text", "users.jsonl", "--loss-on", "all", "--dry-run")


def test_held_out_blocks_are_those_of_all_tokens(folder: Path) -> None:
    texts = [drawn(folder, 4, 32, loss_on) for loss_on in ("answers", "all")]
    assert torch.equal(texts[0].held_out.ids, texts[1].held_out.ids)
    assert texts[1].counted.all() and not texts[0].counted.all()
