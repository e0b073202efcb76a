"""Which tokens of chat belong to answers, for templates of every kind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from surgery.text import blocks as blocks_module
from surgery.text import draw_blocks, open_text
from surgery.text.answers import AnswersUnknown, ChatAnswers
from surgery.text.blocks import tokenise
from surgery.text.calibration_text import in_turn
from surgery.text.marks import MarkedText, TokenMarks

TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>\n{% endfor %}"
LAST = (  # as Qwen3: an empty thought in the last answer, none in earlier ones
    "{% set n = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set n.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.index0 > n.last %}<think></think>{% endif %}"
    "{{ m.content.split('</think>')[-1] }}</s>\n{% endfor %}"
)
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
GENERATION = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}"
)
CHAT = [
    ("system", "Be kind."),
    ("user", "assistant?"),
    ("assistant", "a"),
    ("user", "a ß 🙂"),
    ("assistant", "0"),
]

PLAIN = (
    "<system>Be kind.</s>\n<user>assistant?</s>\n<assistant>[a</s>]\n<user>a ß 🙂</s>\n<assistant>[0</s>]\n"
)
# template -> the conversation as it is rendered, with answers in brackets
TEMPLATES = {
    "prompt": (
        TURN + PROMPT,
        PLAIN,
    ),
    "no prompt": (
        TURN,
        PLAIN,
    ),
    "generation": (
        GENERATION,
        PLAIN,
    ),
    "last turn otherwise": (
        LAST + PROMPT,
        "<system>Be kind.</s>\n<user>assistant?</s>\n<assistant>[a</s>]\n<user>a ß 🙂</s>\n"
        "<assistant>[<think></think>0</s>]\n",
    ),
    "prompt that thinks": (
        LAST + PROMPT.replace("<assistant>", "<assistant><think>"),
        "<system>Be kind.</s>\n<user>assistant?</s>\n<assistant>[a</s>]\n<user>a ß 🙂</s>\n"
        "<assistant><think>[</think>0</s>]\n",
    ),
    "end of text in place of the last end": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if loop.last and not add_generation_prompt %}"
        "{{ eos_token }}{% else %}{{ bos_token }}{% endif %}{% endfor %}" + PROMPT,
        "<system>Be kind.<s><user>assistant?<s><assistant>[a<s>]<user>a ß 🙂<s><assistant>[0</s>]",
    ),
    "instruction": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "<s>(INST) assistant? (/INST) [a</s>](INST) a ß 🙂 (/INST) [0</s>]",
    ),
    "end at the end": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if not add_generation_prompt %}"
        "{{ eos_token }}{% else %}assistant: {% endif %}",
        "system: Be kind.\nuser: assistant?\nassistant: [a]\nuser: a ß 🙂\nassistant: [0\n</s>]",
    ),
}


def messages(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


def rows(path: Path, chats: list[Any]) -> Path:
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path


def in_brackets(text: str) -> tuple[str, list[bool]]:
    """A text without its brackets, and of each UTF-8 byte of it whether it is inside of them."""
    shown, inside = "", []
    for part in re.split(r"(\[[^\]]*\])", text):
        kept = part.strip("[]").replace("(", "[").replace(")", "]")
        shown += kept
        inside += [part.startswith("[")] * len(kept.encode())
    return shown, inside


def counted_bytes(tokenizer: Any, path: Path, **how: Any) -> tuple[str, list[bool]]:
    """A text of bytes as tokens with the marks of each, special tokens once for each of their bytes."""
    text, marks = open_text(str(path), tokenizer, **how), TokenMarks()
    assert text.marked is not None
    found = tokenise(tokenizer, marks.strings(text.marked(None)), 8, None, marks)
    plain = tokenise(tokenizer, text.pieces(None), 8, None)
    assert found.counted is not None
    assert found.ids.tolist() == plain.ids.tolist()
    shown = [tokenizer.decode([token]) for token in found.ids]
    sizes = [len(one) if one in ("<s>", "</s>") else 1 for one in shown]
    marked = [bool(mark) for mark, size in zip(found.counted, sizes, strict=True) for _ in range(size)]
    return tokenizer.decode(found.ids.tolist()), marked


@pytest.mark.parametrize("kind", TEMPLATES)
def test_answers_of_a_conversation(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, expected = TEMPLATES[kind]
    path = rows(tmp_path / "chat.jsonl", [{"messages": messages(CHAT)}] * 2)
    text = open_text(str(path), tokenizer)
    assert counted_bytes(tokenizer, path) == in_brackets(expected + "\n\n" + expected)
    assert text.notes == ()


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content }}: " + TURN + PROMPT,
        "{% for m in messages %}{{ m.content | length }} {% endfor %}" + TURN + PROMPT,
        "{% for m in messages %}<{{ m.role }} after {{ messages[loop.index0 - 1].content }}>{{ m.content }}"
        "{% endfor %}",
    ],
)
def test_a_template_that_rewrites_other_turns_counts_whole(template: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    path = rows(tmp_path / "chat.jsonl", [{"messages": messages([*CHAT, ("assistant", "More.")])}] * 3)
    assert all(counted_bytes(tokenizer, path)[1])
    text = open_text(str(path), tokenizer)
    assert draw_blocks(tokenizer, [text], blocks=4, block_size=8, seed=1).notes == ()
    drawn = draw_blocks(tokenizer, [text], blocks=4, block_size=8, seed=1, answers=True)
    (note,) = drawn.notes
    assert "3 rows of chat.jsonl" in note and "chat template" in note


def test_thinking_that_a_template_writes_anew_belongs_to_the_answer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think>"
        "{{ m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content }}</think>"
        "{% endif %}{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think></think>{% endif %}"
    )
    chat = [("user", "Why?"), ("assistant", "<think>Hm.</think>So."), ("user", "Oh."), ("assistant", "Yes.")]
    path = rows(tmp_path / "chat.jsonl", [{"messages": messages(chat)}])
    first = "<user>Why?</s><assistant><think>[Hm.</think>So.</s>]"
    expected = first + "<user>Oh.</s><assistant><think></think>[Yes.</s>]"
    assert counted_bytes(tokenizer, path) == in_brackets(expected)


def test_a_tokenizer_without_offsets_counts_whole() -> None:
    class Slow:
        is_fast, all_special_tokens = False, ("</s>",)

        def get_added_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(AnswersUnknown, match="tokenizer"):
        ChatAnswers(Slow()).spans(messages(CHAT), "text")
    marks = TokenMarks()
    assert list(marks.strings([MarkedText("text", ((1, 2),))])) == ["text"]
    assert marks.of_piece("text", 3, None).all()


def test_rows_of_every_form(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TURN + PROMPT
    forms = [
        {"messages": messages([("user", "Why?"), ("assistant", "So.")])},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"instruction": "Add.", "input": "1", "output": "3"},
        {"prompt": "Why?", "completion": "So."},
        {"messages": messages([("assistant", "I begin."), ("user", "Good.")])},
        {"messages": messages([("user", "half \ud83d"), ("assistant", "\ud83d of one")])},
        {"text": "All counts."},
        "This too.",
    ]
    expected = [
        "<user>Why?</s>\n<assistant>[So.</s>]\n",
        "<user>Why?</s>\n<assistant>[So.</s>]\n",
        "<user>Add.\n\n1</s>\n<assistant>[3</s>]\n",
        "<user>Why?</s>\n<assistant>[So.</s>]\n",
        "<assistant>[I begin.</s>]\n<user>Good.</s>\n",
        "<user>half \ufffd</s>\n<assistant>[\ufffd of one</s>]\n",
    ]
    shown = "\n\n".join(expected) + "[\n\nAll counts.][\n\nThis too.]"
    assert counted_bytes(tokenizer, rows(tmp_path / "rows.jsonl", forms)) == in_brackets(shown)


def test_chat_without_a_template_is_joined(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    path = rows(tmp_path / "chat.jsonl", [{"messages": messages(CHAT)}])
    assert counted_bytes(tokenizer, path) == in_brackets("Be kind.\nassistant?\n[a]\na ß 🙂\n[0]")


def merging_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges trained on `text`, which puts a token before and after a text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_marks_are_those_of_the_whole_text_in_one_go(
    license_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers anywhere, in pieces cut anywhere: a token counts if one of its characters does."""
    tokenizer = merging_tokenizer(license_text)
    text = license_text + "Über – 漢字 🙂." + license_text
    inside, texts = [False] * len(text), []
    for number, start in enumerate(range(0, len(text), 97)):
        row = text[start : start + 97]
        spans = ((3, 4), (20, 20 + number % 60)) if number % 3 else None
        texts.append(MarkedText(row, spans))
        for first, last in ((0, len(row)),) if spans is None else spans:
            inside[start + first : start + min(last, len(row))] = [True] * (min(last, len(row)) - first)
    texts[-1] = MarkedText(texts[-1].text)
    inside[len(text) // 97 * 97 :] = [True] * (len(text) - len(text) // 97 * 97)
    whole = tokenizer(text, return_offsets_mapping=True)
    expected = [any(inside[first:last]) for first, last in whole["offset_mapping"]]
    expected[0], expected[-1] = expected[1], expected[-2]
    monkeypatch.setattr(blocks_module, "PIECE", 700)
    monkeypatch.setattr(blocks_module, "AROUND", 80)
    marks = TokenMarks()
    found = tokenise(tokenizer, marks.strings(texts), 50, None, marks)
    assert found.ids.tolist() == whole["input_ids"]
    assert found.counted is not None and found.counted.tolist() == expected


def test_the_blocks_drawn_are_the_same_and_plain_text_counts_whole(tmp_path: Path, license_text: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TURN + PROMPT
    (tmp_path / "plain.txt").write_text(license_text)
    rows(tmp_path / "chat.jsonl", [{"messages": messages(CHAT)}] * 20)
    rows(tmp_path / "rows.jsonl", [{"text": license_text}, "one more"])

    def draw(*names: str, **how: Any) -> Any:
        texts = [open_text(str(tmp_path / name), tokenizer) for name in names]
        return draw_blocks(tokenizer, texts, blocks=8, block_size=32, seed=1, **how)

    names = ("plain.txt", "chat.jsonl", "rows.jsonl")
    without, marked = draw(*names), draw(*names, answers=True)
    assert without.counted is None
    assert torch.equal(without.ids, marked.ids) and without.as_json() == marked.as_json()
    assert draw("plain.txt", "rows.jsonl", answers=True).counted.all()
    counts = [part["blocks"] for part in marked.parts]
    one_after_another = marked.counted[in_turn(counts).argsort()]
    counted = [one.sum() for one in one_after_another.split(counts)]
    assert counted[0] == 3 * 32 and counted[2] == 2 * 32
    assert 0 < counted[1] < 32
