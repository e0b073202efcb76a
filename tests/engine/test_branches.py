"""Many conditions in one pass equal each by itself, and the whole model changed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import opened
from torch.nn import functional
from transformers import AutoModelForCausalLM

from surgery.engine.branches import run_branches
from surgery.engine.layer_edits import Drop, Edits, Remove, Scale, edit_key
from surgery.engine.loss import next_token_loss
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream

IDS = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(5))
ROW = Remove("dense", 9, None)
COLUMN = Remove("dense", None, 4)
CONDITIONS: list[Edits] = [
    {1: [ROW]},
    {1: [ROW], 3: [COLUMN]},
    {},
    {1: [Remove("dense", 9, None)], 3: [Remove("dense", None, 4)]},
    {1: [COLUMN], 3: [COLUMN]},
    {3: [Remove("dense", 2, 5, mean=True)]},
    {1: [Remove("dense", None, 4, mean=True)]},
    {1: [Remove("dense", 9, None, mean=True)]},
    {4: [Scale("dense", torch.tensor([1, 2]), torch.tensor([3, 4]), 0.5), Drop("dense", torch.tensor([7]))]},
]


def measured(folder: Path, conditions: list[Edits]) -> tuple[list[torch.Tensor], list[TokenStream]]:
    model = StreamedModel(opened(folder))
    with torch.no_grad():
        dense = TokenStream(model, IDS, micro_batch=2)
        run = run_branches(model, dense, conditions, "device")
        return [next_token_loss(stream) for stream in run.streams()], run.streams()


def test_together_as_one_by_one_and_shared_where_equal(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny("llama")
    together, streams = measured(folder, CONDITIONS)
    for condition, losses in zip(CONDITIONS, together, strict=True):
        torch.testing.assert_close(losses, measured(folder, [condition])[0][0], atol=1e-6, rtol=1e-9)
    assert streams[1] is streams[3] and len(set(streams)) == len(CONDITIONS) - 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_mean_is_that_of_the_dense_model(family: str, save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny(family)
    row, column = 9, 4
    edits: list[Edits] = [
        {1: [Remove("dense", *place, mean=True)]} for place in ((row, column), (row, None), (None, column))
    ]
    losses, _ = measured(folder, edits)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    down = model.transformer.h[1].mlp.c_proj if family == "gpt2" else model.model.layers[1].mlp.down_proj
    weight = down.weight.data.T if family == "gpt2" else down.weight.data
    seen: list[torch.Tensor] = []
    handle = down.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        model(IDS, use_cache=False)
        handle.remove()
        mean_u = seen[0].flatten(0, 1).mean(0)
        for i, rows, columns in (
            (0, slice(row, row + 1), slice(column, column + 1)),
            (1, slice(row, row + 1), slice(None)),
            (2, slice(None), slice(column, column + 1)),
        ):
            held = weight.clone()
            offset = torch.zeros(len(weight))
            offset[rows] = weight[rows, columns] @ mean_u[columns]
            weight[rows, columns] = 0

            def add(_: Any, __: Any, output: torch.Tensor, offset: torch.Tensor = offset) -> torch.Tensor:
                return output + offset

            handle = down.register_forward_hook(add)
            logits = model(IDS, use_cache=False).logits[:, :-1]
            handle.remove()
            weight.copy_(held)
            expected = functional.cross_entropy(logits.transpose(1, 2), IDS[:, 1:], reduction="none").sum(1)
            torch.testing.assert_close(losses[i].float(), expected, rtol=1e-4, atol=1e-4)


def test_equal_edits_have_equal_keys() -> None:
    one, same, other = (Drop("dense", torch.tensor(channels)) for channels in ([1, 2], [1, 2], [1, 3]))
    assert edit_key(one) == edit_key(same) != edit_key(other)
    assert edit_key(Remove("dense", 1, None)) != edit_key(Remove("dense", 1, None, mean=True))
