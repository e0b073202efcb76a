"""A resident layer without its masked channels, in every family, against the same layer with the masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.masking import IDS
from helpers.model_families import CONFIGS
from helpers.tiny_models import opened

from surgery.cut.ffn_channels import ffn_group
from surgery.cut.slice_edits import mask_members, without_members
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream

AS_THEY_ARE = ("gpt2", "phi3", "gpt_oss")  # Conv1D, gate and up in one matrix, stacked experts


@pytest.mark.parametrize("variant", CONFIGS)
def test_a_layer_puts_out_what_it_does_with_masks(variant: str, save_tiny: Callable[..., Path]) -> None:
    model = StreamedModel(opened(save_tiny(variant)))
    masked = TokenStream(model, IDS, micro_batch=2)
    narrow = masked.fork(len(IDS), 0)
    narrowed = []
    with torch.no_grad():
        for number, layer in model.stream_layers(range(len(model.layers))):
            ffn = model.ffns(number)[0]
            group, kept = ffn_group(number, ffn), torch.arange(0, ffn.width, 3)
            mask_members([group], {group.key: kept})(number, layer)
            before = {name: tensor.clone() for name, tensor in layer.named_parameters()}
            with without_members(layer, group, kept):
                narrowed.append(ffn.down_weight().shape[1] == len(kept))
                narrow.forward(number, layer)
            for name, tensor in layer.named_parameters():
                assert torch.equal(tensor, before[name])
            masked.forward(number, layer)
            torch.testing.assert_close(
                narrow.store.get(0, slice(0, 3), model.device), masked.store.get(0, slice(0, 3), model.device)
            )
    if variant in ("llama", *AS_THEY_ARE):
        assert all(narrowed) == (variant == "llama")
