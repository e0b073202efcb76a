"""Tokens a second of a checkpoint folder in transformers: reading a prompt, and decoding after it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.checkpoint.quiet_transformers import quiet_transformers
from surgery.engine.open_model import Model
from surgery.engine.resume import Journal
from surgery.engine.run_options import RunOptions
from surgery.errors import one_line
from surgery.progress import Progress, no_progress

PROMPT, NEW_TOKENS = 256, 32
REPEATS = 3  # in a round, of which the median counts
ROUNDS = 3  # of all points in turn, so that a machine that slows down slows all of them


@dataclass(frozen=True)
class Speed:
    """Tokens a second, medians over rounds: `prefill` of PROMPT tokens, `decode` of NEW_TOKENS one by one.

    `slowest` and `fastest` are the range of `decode` over rounds.
    """

    prefill: float
    decode: float
    slowest: float
    fastest: float

    @classmethod
    def of(cls, rounds: list[tuple[float, float]]) -> Speed:
        """From (prefill, decode) of every round."""
        prefill, decode = zip(*rounds, strict=True)
        return cls(statistics.median(prefill), statistics.median(decode), min(decode), max(decode))


def measure_speeds(
    folders: Mapping[str, Path | None],
    model: Model,
    journal: Journal,
    progress: Progress[Any] = no_progress,
) -> dict[str, Speed | str]:
    """Tokens a second of every folder by its slug, in ROUNDS rounds of all in turn; or why there are none.

    `model` is the dense one, which says how to run and how large a folder's model can be at most. A measured
    round is not measured again.
    """
    rounds: dict[str, list[tuple[float, float]]] = {slug: [] for slug in folders}
    missing: dict[str, str] = {}
    jobs = [(number, slug) for number in range(ROUNDS) for slug in folders]
    for number, slug in progress(jobs, "speed", len(jobs)):
        if slug in missing:
            continue
        step, name = f"speed-{slug} {number}", f"speed-{slug}-{number}"
        if step not in journal:
            journal.save(name, _one_round(folders[slug], model))
            journal.mark(step)
        fields = journal.load(name)[0]
        if "why" in fields:
            missing[slug] = fields["why"]
        else:
            rounds[slug].append((fields["prefill"], fields["decode"]))
    return {slug: missing.get(slug) or Speed.of(found) for slug, found in rounds.items()}


def _one_round(folder: Path | None, model: Model) -> dict[str, Any]:
    """Tokens a second of a folder, or why they can't be measured."""
    run = model.run
    if folder is None:
        return {"why": "the weights are not in a folder that transformers loads as it is"}
    if run.device.type == "cpu" and model.checkpoint.parameters * run.dtype.itemsize > run.memory:
        return {"why": "the whole model exceeds --memory"}
    try:
        prefill, decode = measure_once(folder, run)
    except Exception as error:  # noqa: BLE001 (transformers and its packages raise anything)
        return {"why": f"transformers can't run it: {one_line(error)}"}
    return {"prefill": prefill, "decode": decode}


@torch.no_grad()
def measure_once(folder: Path, run: RunOptions) -> tuple[float, float]:
    """(Prefill, decode) in tokens a second of the whole model in memory, one sequence: medians of REPEATS.

    Packed folders are run as transformers runs them. Raises what transformers raises.
    """
    from transformers import AutoModelForCausalLM

    import surgery.loading  # noqa: F401  (so that per-layer widths load)

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=run.dtype).to(run.device).eval()
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, PROMPT), generator=generator).to(run.device)
    model(ids[:, :8])
    found = [timed(model, ids, run.device) for _ in range(REPEATS)]
    prefill, decode = (statistics.median(times) for times in zip(*found, strict=True))
    return PROMPT / prefill, NEW_TOKENS / decode


def timed(
    model: Any, ids: torch.Tensor, device: torch.device, new_tokens: int = NEW_TOKENS
) -> tuple[float, float]:
    """Seconds of reading `ids` [1, T], and of `new_tokens` one by one after them."""
    start = _now(device)
    output = model(ids, use_cache=True)
    read = _now(device)
    for _ in range(new_tokens):
        last = output.logits[:, -1:].argmax(-1)
        output = model(last, past_key_values=output.past_key_values, use_cache=True)
    return read - start, _now(device) - read


def _now(device: torch.device) -> float:
    """Seconds, after everything that was started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
