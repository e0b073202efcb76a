"""The final norm of every family: scaling its weights against scaling what the output head gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.model_families import CONFIGS
from helpers.tiny_models import opened
from torch import nn
from transformers import AutoModelForCausalLM

from surgery.engine.final_norm import find_final_norm
from surgery.engine.streamed_model import StreamedModel

# Their norm has no parameters.
WITHOUT = {"olmo", "nanochat"}
SCALE = 0.75


@pytest.mark.parametrize("variant", CONFIGS)
def test_logits_are_those_of_a_scaled_input_of_the_head(variant: str, save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny(variant)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in whole.parameters():  # norms of random models are ones, and biases zeros
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    whole.save_pretrained(folder)
    model = StreamedModel(opened(folder))
    hidden = torch.randn(5, model.model.config.get_text_config().hidden_size)
    with torch.no_grad(), model.other_weights():
        norm = find_final_norm(model, hidden)
        if variant in WITHOUT:
            assert norm is None
            return
        assert norm is not None
        plain = model.logits(hidden)
        head = model.model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        hook = head.register_forward_pre_hook(lambda _, args: (args[0] * SCALE,))
        expected = model.logits(hidden)
        hook.remove()
        with norm.scaled(SCALE):
            found = model.logits(hidden)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model.logits(hidden), plain)  # and nothing is left changed
        assert not torch.allclose(found, plain)
        for name in norm.stored:
            tensor = model.checkpoint.read(name)
            assert norm.tensor(name, tensor, SCALE).dtype == tensor.dtype
