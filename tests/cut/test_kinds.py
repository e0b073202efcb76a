"""Other kinds of cut through the same groups and edits: heads of an attention, and whole layers.

What is written here is all that a kind needs; writer, verification and masking are the ones that FFN channels
use.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cuts import IDS, write
from helpers.tiny_models import opened
from transformers import AutoModelForCausalLM

from surgery.cut.groups import Cut, Group, Kept, make_cut
from surgery.cut.slice_edits import mask_members, slice_edits
from surgery.cut.tensors import Take, TensorEdit
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.errors import CheckpointError, PlanError
from surgery.model.meta_model import MetaModel
from surgery.model.slices import Slice
from surgery.pruning.verify import last_logits, verify_pruned


class HeadGroups:
    """Key/value heads with the query heads that share them, of every layer of a Llama."""

    def groups(self, meta_model: MetaModel) -> list[Group]:
        config = meta_model.config
        size, shared = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        wide = config.head_dim * shared
        output = Slice("self_attn.o_proj.weight", 1, wide)
        slices = (
            Slice("self_attn.q_proj.weight", 0, wide),
            Slice("self_attn.k_proj.weight", 0, config.head_dim),
            Slice("self_attn.v_proj.weight", 0, config.head_dim),
            output,
        )
        return [Group(n, "kv_heads", size, slices, (output,)) for n in range(len(meta_model.layers))]

    def edits(self, meta_model: MetaModel, kept: Kept) -> dict[str, TensorEdit]:
        return slice_edits(meta_model, self.groups(meta_model), kept)

    def config(self, config: dict[str, Any], kept: Kept) -> dict[str, Any]:
        (left,) = {len(members) for members in kept.values()}
        shared = config["num_attention_heads"] // config["num_key_value_heads"]
        return {**config, "num_key_value_heads": left, "num_attention_heads": left * shared}


class WholeLayers:
    """Decoder layers: tensors of a removed layer are not written, those of later layers are renumbered."""

    def groups(self, meta_model: MetaModel) -> list[Group]:
        found = []
        for number, layer in enumerate(meta_model.layers):
            outputs = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            read = tuple(Slice(name, 1, layer.get_parameter(name).shape[1]) for name in outputs)
            found.append(Group(number, "layer", 1, (), read))
        return found

    def edits(self, meta_model: MetaModel, kept: Kept) -> dict[str, TensorEdit]:
        stays = [number for number in range(len(meta_model.layers)) if len(kept[number, "layer"])]
        edits = {}
        for number, stored_parameters in enumerate(meta_model.layer_parameters):
            for name in (stored for one in stored_parameters for stored in one.stored):
                after = f".{stays.index(number)}." if number in stays else None
                edits[name] = TensorEdit(after and name.replace(f".{number}.", after))
        return edits

    def config(self, config: dict[str, Any], kept: Kept) -> dict[str, Any]:
        return {**copy.deepcopy(config), "num_hidden_layers": sum(len(one) for one in kept.values())}


def masked_logits(source: Path, cut: Cut) -> torch.Tensor:
    """Logits of the source with the removed members masked, streamed."""
    model = StreamedModel(opened(source), mask_members(cut.groups, cut.kept))
    stream = TokenStream(model, IDS, micro_batch=1)
    for number, layer in model.stream_layers(range(len(model.layers))):
        stream.forward(number, layer)
    with model.other_weights():
        return last_logits(model, stream)


def chosen(kind: Any, meta_model: MetaModel, heads: tuple[int, int] = (0, 2)) -> Kept:
    """Two of the four heads of every layer, other ones in odd layers; all layers but the third."""
    return {
        group.key: torch.tensor(heads) + group.layer % 2
        if group.size > 1
        else torch.arange(group.size)[: group.layer != 2]
        for group in kind.groups(meta_model)
    }


@pytest.mark.parametrize("kind", [HeadGroups(), WholeLayers()], ids=["heads", "layers"])
def test_a_second_kind_needs_groups_edits_and_config(
    kind: Any, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source = save_tiny("llama", num_attention_heads=8, num_key_value_heads=4)
    meta_model = opened(source).meta_model
    cut = make_cut(kind, meta_model, chosen(kind, meta_model))
    write(source, cut, tmp_path / "cut")
    expected = masked_logits(source, cut)
    measured, _ = verify_pruned(opened(tmp_path / "cut"), expected, IDS)
    assert measured["relative_difference"] < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits[0], expected, atol=1e-4)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape[1] == IDS.shape[1] + 3
    assert model.num_parameters() < AutoModelForCausalLM.from_pretrained(source).num_parameters()


def test_verification_refuses_other_heads(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    source, kind = save_tiny("llama", num_attention_heads=8, num_key_value_heads=4), HeadGroups()
    meta_model = opened(source).meta_model
    expected = masked_logits(source, make_cut(kind, meta_model, chosen(kind, meta_model)))
    write(source, make_cut(kind, meta_model, chosen(kind, meta_model, (0, 1))), tmp_path / "cut")
    with pytest.raises(CheckpointError, match="does not compute"):
        verify_pruned(opened(tmp_path / "cut"), expected, IDS)


def test_a_member_that_is_not_there_is_refused(save_tiny: Callable[..., Path]) -> None:
    meta_model = opened(save_tiny("llama")).meta_model
    kept = {group.key: torch.tensor([0, group.size]) for group in HeadGroups().groups(meta_model)}
    with pytest.raises(PlanError, match="another width"):
        make_cut(HeadGroups(), meta_model, kept)


@pytest.mark.parametrize("interleaved", [False, True])
def test_indices_of_slices(interleaved: bool) -> None:
    members, parts, block = 5, 2, 3
    shape = (members, parts, block) if interleaved else (parts, members, block)
    axis = torch.arange(members * parts * block).view(shape)
    kept = torch.tensor([0, 3])
    part = Slice("w", 0, block, parts, interleaved)
    assert part.length(members) == axis.numel()
    assert torch.equal(
        part.indices(kept, members), axis.index_select(0 if interleaved else 1, kept).flatten()
    )
    padded = part.indices(torch.tensor([0, 3, -1]), members)
    assert padded.numel() == 3 * parts * block and int((padded == -1).sum()) == parts * block
    tensor = torch.randn(axis.numel(), 2)
    edited = TensorEdit("w", (Take(0, padded),)).apply(tensor)
    assert torch.equal(edited[padded >= 0], tensor[padded[padded >= 0]]) and not edited[padded < 0].any()
