"""The pictures of a pruned model's card, as matplotlib renders them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from helpers.tiny_models import CALIBRATION


@pytest.mark.draws
def test_a_prune_draws_both_pictures(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    """Wide enough to read, in the colours of several series, and the same in every run."""
    save_tiny("llama")
    for out in ("one", "two"):
        surgeon("prune", "tiny", *CALIBRATION, "--sparsity", "0.5", "--multiple-of", "4", "--out", out)
    for name in ("cut.png", "lp_concentration.png"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
        picture = matplotlib.image.imread(Path("one", name))
        assert picture.shape[1] > 500
        coloured = picture[..., :3].reshape(-1, 3)
        assert (coloured.max(1) - coloured.min(1) > 0.3).sum() > 200
