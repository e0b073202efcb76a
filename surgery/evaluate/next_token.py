"""Next-token probabilities with and without super weights.

The Super Weight, section 3.3, claims that stop words become more likely without them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from surgery.engine.open_model import Model
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.errors import CalibrationError
from surgery.evaluate.ablation import Edit
from surgery.evaluate.residual_trace import prompt_cost

SENTENCE = re.compile(r"[A-Z][^.!?\n]{20,200}[.!?]")
TOP = 20
EXAMPLE = "Summer is hot. Winter is"


@dataclass(frozen=True)
class StopWords:
    """Mean next-token probabilities over `prompts` prompts, with and without super weights.

    `tokens` are the likeliest of either: [(text, probability, probability without)]; `example` the same for
    the one prompt EXAMPLE. `mass` and `mass_without` are the summed probabilities of the function words that
    are a single token (`qualified` of `listed`).
    """

    prompts: int
    listed: int
    qualified: int
    mass: float
    mass_without: float
    tokens: list[tuple[str, float, float]]
    example: list[tuple[str, float, float]]


def function_words() -> list[str]:
    """English function words and punctuation marks, from `data/function_words.txt` (one per line)."""
    text = resources.files("surgery").joinpath("data/function_words.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line]


def prompts_of(text: str, count: int) -> list[str]:
    """The first `count` sentences of a text, each without its last word. Raises CalibrationError for none."""
    found = [match.group().rsplit(" ", 1)[0] for match in SENTENCE.finditer(text)][:count]
    if not found:
        raise CalibrationError(
            "the text has no sentences to take the last word from", next_step="give another --text"
        )
    return found


@torch.no_grad()
def stop_words(
    opened: Model,
    tokenizer: Any,
    prompts: list[str],
    removed: dict[int, list[Edit]],
) -> StopWords:
    """Run prompts through the model with and without the edits `removed`. Prompts are not padded.

    Prompts of one token are left out. Raises CalibrationError when no prompt is left, MemoryBudgetError.
    """
    groups: dict[int, list[list[int]]] = {}
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        groups.setdefault(len(ids), []).append(ids)
    groups = {length: rows for length, rows in groups.items() if length > 1}
    if not groups:
        raise CalibrationError("every prompt is a single token", next_step="give another --text")
    example = tokenizer(EXAMPLE)["input_ids"]
    batches = [*groups.values(), [example]]
    cost = prompt_cost(opened, [ids for rows in batches for ids in rows], max(map(len, batches)))
    model, place = StreamedModel(opened), cost.hidden_on
    streams = []
    for rows in batches:
        ids = torch.tensor(rows)
        step = cost.blocks_together(ids.shape[1])
        dense = TokenStream(model, ids, micro_batch=step, place=place)
        streams.append((dense, dense.fork(len(ids), 0, place)))
    for number, layer in model.stream_layers(range(len(model.layers))):
        for dense, _ in streams:
            dense.forward(number, layer)
        for edit in removed.get(number, []):
            edit.apply(model.ffns(number), layer)
        for _, without in streams:
            without.forward(number, layer)
    with model.other_weights():
        probabilities = [[_next(model, stream) for stream in pair] for pair in streams]
    count = sum(len(rows) for rows in groups.values())
    before, after = (
        torch.stack([pair[i].sum(0) for pair in probabilities[:-1]]).sum(0) / count for i in range(2)
    )
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
        _top(tokenizer, probabilities[-1][0][0], probabilities[-1][1][0]),
    )


def _next(model: StreamedModel, stream: TokenStream) -> torch.Tensor:
    """Probabilities of the next token after each block, [N, V] on the CPU."""
    last = torch.cat([stream.store.get(0, part, model.device)[:, -1] for part in stream.slices])
    return model.logits(last).float().softmax(-1).cpu()


def _top(tokenizer: Any, dense: torch.Tensor, without: torch.Tensor) -> list[tuple[str, float, float]]:
    """The TOP likeliest tokens of either distribution [V], sorted by their larger probability."""
    chosen = {*dense.topk(TOP).indices.tolist(), *without.topk(TOP).indices.tolist()}
    rows = [(tokenizer.decode([i]), float(dense[i]), float(without[i])) for i in chosen]
    return sorted(rows, key=lambda row: -max(row[1], row[2]))[:TOP]
