"""Table of the kinds of cut, by the name that `--cuts` has. Does not import torch.

To add a kind, write a function `onto(meta_model, cut, part)` that adds its groups, edits, config and files to
a cut made so far (`groups.add_kind` does that for a class with the methods of `CutKind`), and an entry here.
Another package adds one through the entry point group "surgeon.cuts".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.registry import Registry, import_object

if TYPE_CHECKING:
    from surgery.cut.groups import Cut
    from surgery.model.meta_model import MetaModel
    from surgery.plan.kind_plan import KindPlan

    Onto = Callable[[MetaModel, Cut, KindPlan], Cut]
    Check = Callable[[MetaModel], None]


@dataclass(frozen=True)
class Kind:
    """One kind of cut.

    label: what goes, as tables and cards say it.
    onto: adds a KindPlan to a cut made so far. A function, or "module:function", imported when first used.
        None for FFN channels, which are the plan's own.
    check: raises UnsupportedModelError, from config and headers, for a model that the kind can't be cut from.
    stock: whether transformers' own classes load the result.
    """

    label: str
    onto: str | Onto | None = None
    check: str | Check | None = None
    stock: bool = True

    def add(self, meta_model: MetaModel, cut: Cut, part: KindPlan) -> Cut:
        """`cut` with `part` of this kind."""
        onto: Any = import_object(self.onto)
        result: Cut = onto(meta_model, cut, part)
        return result

    def check_model(self, meta_model: MetaModel) -> None:
        """Raise UnsupportedModelError for a model that this kind can't be cut from."""
        if self.check is not None:
            check: Any = import_object(self.check)
            check(meta_model)


KINDS: Registry[Kind] = Registry(
    "kind of cut",
    "surgeon.cuts",
    Kind,
    {
        "ffn": Kind("FFN channels"),
        "kv": Kind("key/value heads", "surgery.cut.kv_heads:onto", "surgery.cut.kv_heads:check_kv"),
        "attention": Kind(
            "whole attentions",
            "surgery.cut.sublayers:ATTENTIONS.onto",
            "surgery.cut.sublayers:ATTENTIONS.check_model",
            stock=False,
        ),
        "whole-ffn": Kind(
            "whole FFNs",
            "surgery.cut.sublayers:WHOLE_FFNS.onto",
            "surgery.cut.sublayers:WHOLE_FFNS.check_model",
            stock=False,
        ),
        "layers": Kind("whole layers", "surgery.cut.layers:onto", "surgery.cut.layers:check_layers"),
        "experts": Kind("routed experts", "surgery.cut.experts:onto", "surgery.cut.experts:check_experts"),
        "vocab": Kind(
            "rows of the vocabulary", "surgery.cut.vocabulary:onto", "surgery.cut.vocabulary:check_vocabulary"
        ),
    },
)
