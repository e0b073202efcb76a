"""Tasks made from a text at hand, which need no network: one with four options, and one on last words.

Items are made of words, not tokens, so that every model is asked the same. The same text and seed give the
same items.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from surgery import defaults
from surgery.errors import CalibrationError
from surgery.text import Text

CONTINUATION, CLOZE = "surgeon_continuation", "surgeon_cloze"
TEXT_TASKS = (CONTINUATION, CLOZE)
ITEMS = 200  # of each task
CONTEXT_WORDS, CONTINUATION_WORDS = 32, 6
OPTIONS = 4
NEIGHBOURS = 12  # passages on either side that wrong options are drawn from: about the same subject
MOST_CHARACTERS = 1 << 23  # of a text that are read
PARAGRAPHS = re.compile(r"\n\s*\n")
WORD = re.compile(r"\S+")
LAST_WORD = re.compile(r"([^\W\d_]{4,})[.!?]")  # four letters or more, and the end of a sentence


@dataclass(frozen=True)
class Passage:
    """Words that follow each other in a text: `context`, and its `continuation` with the space before it."""

    context: str
    continuation: str


def text_task(name: str, text: Text, *, items: int = ITEMS, seed: int = defaults.SEED) -> Any:
    """A task of TEXT_TASKS on a text, as a task of lm-eval.

    `surgeon_continuation` asks which of OPTIONS continuations of CONTINUATION_WORDS words follows a context
    of CONTEXT_WORDS words; the wrong ones follow other passages nearby. `surgeon_cloze` asks for the last
    word of a sentence after up to CONTEXT_WORDS words: right if it is the likeliest, token by token. Both
    have at most `items` items. Raises CalibrationError for a text that gives fewer than OPTIONS.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    source = text.start(MOST_CHARACTERS)
    rows = (
        continuation_items(source, items, seed) if name == CONTINUATION else cloze_items(source, items, seed)
    )
    if len(rows) < OPTIONS:
        raise CalibrationError(
            f"the text has too few passages for {name}",
            where=text.name,
            expected=f"{OPTIONS} or more of {CONTEXT_WORDS + CONTINUATION_WORDS} words",
            found=str(len(rows)),
            next_step="give a longer --task-text",
        )
    common = {"task": name, "test_split": "test", "doc_to_text": "context", "num_fewshot": 0}
    chosen: dict[str, Any] = {
        "output_type": "loglikelihood",
        "doc_to_target": "word",
        "metric_list": [_mean_of("acc")],
    }
    if name == CONTINUATION:
        chosen = {
            "output_type": "multiple_choice",
            "doc_to_target": "answer",
            "doc_to_choice": "options",
            "target_delimiter": "",
            "metric_list": [_mean_of("acc"), _mean_of("acc_norm")],
        }
    made = Dataset.from_list(rows)
    return ConfigurableTask(config={**common, **chosen, "custom_dataset": lambda **_: {"test": made}})


def _mean_of(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def continuation_items(text: str, count: int, seed: int) -> list[dict[str, Any]]:
    """At most `count` items, spread over the text: context, OPTIONS options, and which answers it."""
    draw = random.Random(seed)
    found = passages(text)
    items = []
    for place in _spread(len(found), count, draw):
        passage = found[place]
        near = found[max(0, place - NEIGHBOURS) : place] + found[place + 1 : place + 1 + NEIGHBOURS]
        space = passage.continuation[: len(passage.continuation) - len(passage.continuation.lstrip())]
        # The space is the same before all options: else it would give the answer away.
        others = sorted({space + other.continuation.lstrip() for other in near} - {passage.continuation})
        if len(others) < OPTIONS - 1:
            continue
        options = draw.sample(others, OPTIONS - 1)
        answer = draw.randrange(OPTIONS)
        options.insert(answer, passage.continuation)
        items.append({"context": passage.context, "options": options, "answer": answer})
    return items


def cloze_items(text: str, count: int, seed: int) -> list[dict[str, Any]]:
    """At most `count` items, spread over the text: context, and a space and the last word of its sentence."""
    found = []
    for paragraph in PARAGRAPHS.split(text):
        spans = [match.span() for match in WORD.finditer(paragraph)]
        for place in range(CONTEXT_WORDS // 2, len(spans)):
            begin, end = spans[place]
            word = LAST_WORD.fullmatch(paragraph[begin:end])
            if word is not None:
                start = spans[max(0, place - CONTEXT_WORDS)][0]
                found.append({"context": paragraph[start:begin].rstrip(), "word": f" {word[1]}"})
    return [found[place] for place in _spread(len(found), count, random.Random(seed))]


def passages(text: str) -> list[Passage]:
    """Passages of CONTEXT_WORDS and CONTINUATION_WORDS words, none across a blank line, in order."""
    length = CONTEXT_WORDS + CONTINUATION_WORDS
    found = []
    for paragraph in PARAGRAPHS.split(text):
        spans = [match.span() for match in WORD.finditer(paragraph)]
        for first in range(0, len(spans) - length + 1, length):
            start, middle = spans[first][0], spans[first + CONTEXT_WORDS - 1][1]
            found.append(Passage(paragraph[start:middle], paragraph[middle : spans[first + length - 1][1]]))
    return found


def _spread(available: int, count: int, draw: random.Random) -> list[int]:
    """`count` of `available` places in order, drawn at random; all where there are fewer."""
    return sorted(draw.sample(range(available), min(count, available)))
