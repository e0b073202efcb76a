"""Which files of a checkpoint are its weights, which are carried into a result, and which are left behind.

transformers decides which weights count: `transformers_weights` of the config, then model.safetensors, then
the shards of model.safetensors.index.json. Other files that look like weights belong to other frameworks, to
adapters or to the training; they would hold the unpruned model, so no result carries them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TEXT_LARGE = 256 << 20  # bytes: no text file of a tokenizer is larger
NAMELESS_LARGE = 1 << 20  # bytes: LICENSE, NOTICE and the like are smaller

# What a model folder holds beside weights: text, tokenizers, templates, code, pictures.
CARRIED_ENDINGS = {
    *(".json", ".jsonl", ".txt", ".md", ".rst", ".yaml", ".yml", ".toml", ".jinja", ".py", ".csv", ".tsv"),
    *(".model", ".vocab", ".spm", ".bpe", ".tiktoken", ".pdf", ".html", ".sh", ".ipynb", ".cu", ".cpp", ".h"),
    *(".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"),
}
# Configs that describe weights of another format, by the beginning of these weights' names.
SIDECARS = {
    "consolidated": {"params.json"},
    "params_shard": {"ndarray-cache.json", "tensor-cache.json", "mlc-chat-config.json"},
    "optimizer": {"trainer_state.json", "trainer_log.jsonl", "zero_to_fp32.py", "latest"},
    "training_args": {"trainer_state.json", "trainer_log.jsonl"},
}


def left_behind(sizes: Mapping[str, int], weights: Iterable[str] = ()) -> list[str]:
    """Names of the files that no result carries, sorted.

    `sizes` is file name -> bytes, `weights` the model's own weight files and their weight map. Left behind
    are files of a kind that a model folder has no use for besides weights (any ending but those of text,
    tokenizers, code and pictures, or too large for these), every file of a folder that holds such a file,
    and the config that describes them.
    """
    own = set(weights)
    foreign = {file for file, size in sizes.items() if file not in own and not is_carried(file, size)}
    folders = {_top(file) for file in foreign} - {_top(file) for file in own} - {""}
    stems = {file.partition(".")[0] for file in foreign if not _top(file)}
    sidecars = {name for stem in stems for name in _sidecars(stem)}
    return sorted(
        file
        for file in sizes
        if file not in own and (file in foreign or _top(file) in folders or file in sidecars)
    )


def is_carried(file: str, size: int) -> bool:
    """Whether a file of `size` bytes is of a kind that belongs to a model beside its weights."""
    if file.endswith(".index.json"):  # the weight map of other weights
        return False
    suffixes = PurePosixPath(file).suffixes
    known = any(suffix.lower() in CARRIED_ENDINGS for suffix in suffixes)
    return size <= (TEXT_LARGE if known else NAMELESS_LARGE) and (known or not suffixes)


def _top(file: str) -> str:
    """The first folder of a path; empty for a file beside config.json."""
    return file.partition("/")[0] if "/" in file else ""


def _sidecars(stem: str) -> set[str]:
    """Names of configs that describe weights whose file name begins with `stem`."""
    found = {f"{stem.removesuffix('_model')}_config.json"} if stem.endswith("_model") else set()
    return found.union(*(names for start, names in SIDECARS.items() if stem.startswith(start)))
