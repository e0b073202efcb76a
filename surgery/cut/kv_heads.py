"""Groups of key/value heads with the query heads that share them, as many in every layer.

Fewer heads of the same width: the config states `head_dim`, so that it does not follow from their number.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from surgery.checkpoint.transformers_model import build_config, text_config
from surgery.cut.groups import Cut, Group, Kept, add_kind
from surgery.cut.planned_model import check_planned
from surgery.cut.slice_edits import slice_edits
from surgery.cut.tensors import TensorEdit
from surgery.errors import CheckpointError, PlanError, UnsupportedModelError
from surgery.model.ffn import is_conv1d
from surgery.model.meta_model import MetaModel
from surgery.model.slices import Slice
from surgery.model.sublayers import SublayerSite, attention_site
from surgery.plan.kind_plan import KV_HEADS, KindPlan, kv_plan

# Biases on scores that depend on the number of heads; values of one head computed from another's.
BY_HEAD_COUNT = ("alibi", "kv_lora_rank", "multi_query")


class KvHeads:
    """The key/value heads of every layer that has an attention, one group of members a layer."""

    def groups(self, meta_model: MetaModel) -> list[Group]:
        """One group for each attention. Raises UnsupportedModelError for projections that are not known."""
        config = meta_model.config.get_text_config()
        found = []
        for number, layer in enumerate(meta_model.layers):
            site = attention_site(layer)
            if site is not None:
                heads, shared, width = _heads(config)
                slices = _slices(
                    layer, site, heads, shared, width, f"layer {number} of {meta_model.checkpoint.name}"
                )
                consumers = (slices[-1],)
                found.append(Group(number, KV_HEADS, heads, tuple(slices), consumers))
        return found

    def edits(self, meta_model: MetaModel, kept: Kept) -> dict[str, TensorEdit]:
        """Rows of queries, keys and values with their biases; columns of the output projection."""
        return slice_edits(meta_model, self.groups(meta_model), kept)

    def config(self, config: dict[str, Any], kept: Kept) -> dict[str, Any]:
        """config.json with fewer heads, and the width of one."""
        config = copy.deepcopy(config)
        text = text_config(config)
        built = build_config(config, "config.json").get_text_config()
        _, shared, width = _heads(built)
        left = max(len(members) for (_, name), members in kept.items() if name == KV_HEADS)
        names = type(built).attribute_map
        for key, value in (("num_attention_heads", left * shared), ("num_key_value_heads", left)):
            own = names.get(key, key)
            if own in text or key == "num_attention_heads" or shared > 1 or hasattr(built, own):
                text[own] = value
        text[names.get("head_dim", "head_dim")] = width
        return config


def onto(meta_model: MetaModel, cut: Cut, part: KindPlan) -> Cut:
    """`cut` without the heads that `part` removes."""
    return add_kind(cut, KvHeads(), meta_model, part.kept)


def check_kv(meta_model: MetaModel) -> None:
    """Raise UnsupportedModelError for a model whose heads can't be fewer: one, of a width that follows from
    their number, or with projections that are not known.
    """
    possible_heads(meta_model)


def possible_heads(meta_model: MetaModel) -> list[int]:
    """Numbers of key/value heads that a cut may leave, the most first: those that the config can say.

    Llama's config, for one, wants a number of query heads that divides hidden_size. Raises
    UnsupportedModelError where there is none.
    """
    config, where = meta_model.config.get_text_config(), meta_model.checkpoint.name
    for key in BY_HEAD_COUNT:
        if getattr(config, key, None):
            raise _refused(where, f"{key}: {getattr(config, key)}")
    groups = KvHeads().groups(meta_model)
    if not groups or groups[0].size < 2:
        raise _refused(where, "one key/value head" if groups else "no attention")
    found: list[int] = []
    refusal = ""
    for heads in range(groups[0].size - 1, 0, -1):
        try:
            _try_heads(meta_model, groups, heads, build=not found)
            found.append(heads)
        except (UnsupportedModelError, CheckpointError) as error:
            refusal = error.found or str(error)
    if not found:
        raise _refused(where, refusal)
    return found


def _try_heads(meta_model: MetaModel, groups: list[Group], heads: int, build: bool) -> None:
    """Raise unless the config can say so many heads and, with `build`, the model of it has the shapes that
    the cut writes.
    """
    checkpoint = meta_model.checkpoint
    part = kv_plan({group.key: range(heads) for group in groups})
    build_config(KvHeads().config(checkpoint.config, part.kept), checkpoint.name)
    if build:
        check_planned(meta_model, onto(meta_model, Cut((), {}, {}, checkpoint.config), part))


def check_heads_kept(meta_model: MetaModel, kept: int) -> None:
    """Raise PlanError unless a model can be left with `kept` key/value heads; and what `check_kv` raises."""
    possible = possible_heads(meta_model)
    if kept not in possible:
        raise PlanError(
            "the model can't have so many key/value heads",
            where="--kv-heads",
            expected=", ".join(map(str, reversed(possible))),
            found=str(kept),
        )


def _refused(where: str, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "key/value heads can't go: the config can't say what the others are",
        where=where,
        expected="several heads, and head_dim in the config",
        found=found,
        next_step="leave kv out of --cuts",
    )


def _heads(config: Any) -> tuple[int, int, int]:
    """Key/value heads, query heads that share one, and the width of a head."""
    queries = int(config.num_attention_heads)
    heads = int(getattr(config, "num_key_value_heads", None) or queries)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // queries)
    return heads, queries // heads, width


def _slices(
    layer: nn.Module, site: SublayerSite, heads: int, shared: int, width: int, where: str
) -> list[Slice]:
    """The heads' parts of every parameter of an attention, the output projection's columns last.

    Raises UnsupportedModelError for a parameter that the heads' part of is not known.
    """
    module = layer.get_submodule(site.module)
    by_head = {"q_proj": shared * width, "k_proj": width, "v_proj": width, "sinks": shared}
    found: list[Slice] = []
    for name, parameter in module.named_parameters():
        path = f"{site.module}.{name}"
        own, _, leaf = name.rpartition(".")
        own = own or leaf
        if path.startswith(f"{site.output}."):
            continue
        if own in by_head and parameter.shape[0] == heads * by_head[own]:
            found.append(Slice(path, 0, by_head[own]))
        elif own == "qkv_proj" and parameter.shape[0] == heads * (shared + 2) * width:
            found.append(Slice(path, 0, blocks=(shared * width, width, width)))
        elif own in ("q_norm", "k_norm") and tuple(parameter.shape) == (width,):
            continue  # of each head by itself
        else:
            raise _refused(where, f"{path} {list(parameter.shape)}")
    output = layer.get_submodule(site.output)
    if is_conv1d(output) or output.get_parameter("weight").shape[1] != heads * shared * width:
        raise _refused(where, f"{site.output} {list(output.get_parameter('weight').shape)}")
    return [*found, Slice(f"{site.output}.weight", 1, shared * width)]
