"""What a model says next without its super weights: stop words, if the paper is right (The Super Weight, section 3.3)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from surgery.ablation import Edit
from surgery.checkpoint import Checkpoint
from surgery.devices import micro_batch
from surgery.errors import CalibrationError
from surgery.indexing import RunOptions
from surgery.stream import StreamedModel
from surgery.tokens import TokenStream

SENTENCE = re.compile(r"[A-Z][^.!?\n]{20,200}[.!?]")
TOP = 20
EXAMPLE = "Summer is hot. Winter is"


@dataclass(frozen=True)
class StopWords:
    """Mean next-token probabilities over `prompts`, with super weights and without.

    `tokens`: [(text, probability, probability without)], the likeliest in either case; `mass` and `mass_without` the
    summed probability of the function words that are one token (`qualified` of `listed`); `example` the same for one prompt.
    """

    prompts: int
    listed: int
    qualified: int
    mass: float
    mass_without: float
    tokens: list[tuple[str, float, float]]
    example: list[tuple[str, float, float]]


def function_words() -> list[str]:
    """English function words and marks, one a line in `data/function_words.txt`."""
    text = resources.files("surgery").joinpath("data/function_words.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line]


def prompts_of(text: str, count: int) -> list[str]:
    """The first `count` sentences of a text without their last word. Raises CalibrationError where there is none."""
    found = [match.group().rsplit(" ", 1)[0] for match in SENTENCE.finditer(text)][:count]
    if not found:
        raise CalibrationError(
            "the text has no sentences to take the last word from", next_step="give another --text"
        )
    return found


@torch.no_grad()
def stop_words(
    checkpoint: Checkpoint,
    tokenizer: Any,
    prompts: list[str],
    removed: dict[int, list[Edit]],
    options: RunOptions,
) -> StopWords:
    """Run prompts whole and with `removed` taken out; each prompt is run at its own length, nothing is padded."""
    model = StreamedModel(checkpoint, options.device, options.dtype, memory=options.memory)
    groups: dict[int, list[list[int]]] = {}
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        groups.setdefault(len(ids), []).append(ids)
    groups = {length: rows for length, rows in groups.items() if length > 1}
    example = tokenizer(EXAMPLE)["input_ids"]
    streams = []
    for rows in (*groups.values(), [example]):
        ids = torch.tensor(rows)
        whole = TokenStream(model, ids, micro_batch=micro_batch(ids.shape[1], options.device))
        streams.append((whole, whole.fork(len(ids), 0)))
    for number, layer in model.walk(range(len(model.layers))):
        for whole, _ in streams:
            whole.forward(number, layer)
        for edit in removed.get(number, []):
            edit.apply(model.ffns(number), layer)
        for _, without in streams:
            without.forward(number, layer)
    with model.outside():
        shares = [[_next(model, stream) for stream in pair] for pair in streams]
    count = sum(len(rows) for rows in groups.values())
    before, after = (torch.stack([pair[i].sum(0) for pair in shares[:-1]]).sum(0) / count for i in range(2))
    forms = {
        word: [tokenizer(form, add_special_tokens=False)["input_ids"] for form in (f" {word}", word)]
        for word in function_words()
    }
    single = {word: [form[0] for form in found if len(form) == 1] for word, found in forms.items()}
    chosen = sorted({token for found in single.values() for token in found})
    return StopWords(
        count,
        len(single),
        sum(bool(found) for found in single.values()),
        float(before[chosen].sum()),
        float(after[chosen].sum()),
        _top(tokenizer, before, after),
        _top(tokenizer, shares[-1][0][0], shares[-1][1][0]),
    )


def _next(model: StreamedModel, stream: TokenStream) -> torch.Tensor:
    """Probabilities of the next token after each block, [N, V] on the CPU."""
    last = torch.cat([stream.store.get(0, part, model.device)[:, -1] for part in stream.slices])
    return model.logits(last).float().softmax(-1).cpu()


def _top(tokenizer: Any, whole: torch.Tensor, without: torch.Tensor) -> list[tuple[str, float, float]]:
    """The TOP likeliest tokens of either distribution [V], by their larger probability."""
    chosen = {*whole.topk(TOP).indices.tolist(), *without.topk(TOP).indices.tolist()}
    rows = [(tokenizer.decode([i]), float(whole[i]), float(without[i])) for i in chosen]
    return sorted(rows, key=lambda row: -max(row[1], row[2]))[:TOP]
