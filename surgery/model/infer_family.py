"""Infer the FFNs of a family without a table entry, by building the model twice.

The model is built on the meta device, which is cheap: once from its config, and once with one width reduced.
The parameters whose shapes differ are those that the config key controls, along the axis that differs. This
proves that the key can be changed; nothing is guessed from names. (Names only distinguish gate from up.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from surgery.errors import UnsupportedModelError
from surgery.model.families import Family, FfnSite

WIDTH_WORDS = ("intermediate", "ffn", "n_inner", "mlp_dim", "feed_forward", "hidden_dim")
STEP = 8
Build = Callable[[Any], nn.Module]


def infer_family(config: Any, model: nn.Module, layers_path: str, build: Build, where: str) -> Family:
    """The family of a model on the meta device, inferred from how its shapes depend on its config.

    `build` makes a meta model from a config; `layers_path` is the path of the decoder layers. Raises
    UnsupportedModelError, with `where` as its location, when no width is found, or when a width controls
    parameters that surgeon can't prune.
    """
    sites: list[FfnSite] = []
    seen: set[str] = set()
    for key in _width_keys(config):
        twin_config = copy.deepcopy(config)
        text = twin_config.get_text_config()
        setattr(text, key, getattr(text, key) - STEP)
        try:
            twin = build(twin_config)
        except (ValueError, RuntimeError, TypeError, AttributeError):
            continue
        changed = _changed(model, twin, layers_path)
        if not changed or set(changed) <= seen:
            continue
        seen |= set(changed)
        sites += _sites(key, changed, model.get_submodule(layers_path), where)
    unique = tuple(dict.fromkeys(sites))
    if not unique:
        raise UnsupportedModelError(
            "no feed-forward width was found: no config key changes the layers' shapes as an FFN width does",
            where=where,
            expected="a config key such as intermediate_size",
            found=str(config.model_type),
            next_step="add an entry to surgery/model/families.py",
        )
    return Family(unique)


def _width_keys(config: Any) -> list[str]:
    text = config.get_text_config()
    names = [name for name in text.to_dict() if any(word in name for word in WIDTH_WORDS)]
    return [n for n in names if type(getattr(text, n, None)) is int and getattr(text, n) > STEP]


def _changed(model: nn.Module, twin: nn.Module, layers_path: str) -> dict[str, tuple[int, int]]:
    """Parameter path inside its layer -> (axis that differs, difference / STEP)."""
    other = twin.state_dict()
    found = {}
    for name, tensor in model.state_dict().items():
        smaller = other.get(name)
        if smaller is None or smaller.shape == tensor.shape or not name.startswith(layers_path + "."):
            continue
        inside = name[len(layers_path) + 1 :].partition(".")[2]
        axes = [a for a, (x, y) in enumerate(zip(tensor.shape, smaller.shape, strict=True)) if x != y]
        found[inside] = (axes[0], (tensor.shape[axes[0]] - smaller.shape[axes[0]]) // STEP)
    return found


def _sites(key: str, changed: dict[str, tuple[int, int]], layers: nn.Module, where: str) -> list[FfnSite]:
    """Group changed parameters into FFNs by their parent module."""
    by_parent: dict[str, dict[str, tuple[int, int]]] = {}
    for name, change in changed.items():
        path = name.removesuffix(".weight").removesuffix(".bias")
        by_parent.setdefault(path.rpartition(".")[0], {})[name] = change
    return [_site(key, parent, found, layers, where) for parent, found in by_parent.items()]


def _site(
    key: str, parent: str, changed: dict[str, tuple[int, int]], layers: nn.Module, where: str
) -> FfnSite:
    layer = next(layer for layer in layers.children() if _owns(layer, next(iter(changed))))
    module = layer.get_submodule(parent)
    stacked = hasattr(module, "is_concatenated") and hasattr(module, "is_transposed")
    matrices = {
        n: c for n, c in changed.items() if n.endswith(".weight") or (stacked and not n.endswith("_bias"))
    }
    if stacked:
        down_axis = 1 if module.is_transposed else 2
        in_projections = [n for n, (axis, _) in matrices.items() if axis != down_axis]
        downs = [n for n, (axis, _) in matrices.items() if axis == down_axis]
    else:
        transposed = {
            n: type(layer.get_submodule(n.removesuffix(".weight"))).__name__ == "Conv1D" for n in matrices
        }
        in_projections = [n for n, (axis, _) in matrices.items() if axis == int(transposed[n])]
        downs = [n for n, (axis, _) in matrices.items() if axis == 1 - int(transposed[n])]
        in_projections.sort(key=lambda n: "gate" not in n)
    two_dims = all(layer.get_parameter(n).dim() == (3 if stacked else 2) for n in matrices)
    if len(downs) != 1 or len(in_projections) not in (1, 2) or not two_dims:
        raise UnsupportedModelError(
            f"{key} controls parameters that are not an FFN of a known shape",
            where=where,
            expected="one or two input projections and one down projection",
            found=", ".join(changed),
            next_step="add an entry to surgery/model/families.py",
        )
    multiplier = changed[downs[0]][1]
    fused = len(in_projections) == 1 and changed[in_projections[0]][1] == 2 * multiplier
    kind = "experts" if stacked else "shared" if "shared" in parent else "dense"
    names = tuple(n.removesuffix(".weight") for n in in_projections)
    down = downs[0].removesuffix(".weight")
    return FfnSite(names, down, key, kind, fused, str(multiplier) if multiplier > 1 else None)


def _owns(layer: nn.Module, parameter: str) -> bool:
    try:
        layer.get_parameter(parameter)
    except AttributeError:
        return False
    return True
