"""transformers objects of a checkpoint: config, meta-device model, tokenizer; and the loading check."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from surgery.checkpoint.reader import Checkpoint
from surgery.errors import CalibrationError, CheckpointError, UnsupportedModelError


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own tokenizer. Raises CalibrationError when it has none that loads."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(str(checkpoint.source.path))
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise CalibrationError(
            "the checkpoint's tokenizer can't be loaded",
            where=checkpoint.name,
            found=str(error).splitlines()[0],
            next_step="put tokenizer.json beside config.json",
        ) from error


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the language model; a multimodal config nests it."""
    for key in ("text_config", "llm_config", "language_config"):
        nested = config.get(key)
        if isinstance(nested, dict):
            return nested
    return config


CONFIG_ERRORS = (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' log messages and warnings within the block."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def build_config(config: dict[str, Any], where: str) -> Any:
    """The transformers config object of a config.json. Raises UnsupportedModelError if it can't be built."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = config["model_type"]
    try:
        config_class = CONFIG_MAPPING[family]
    except KeyError as error:
        raise UnsupportedModelError(
            "the installed transformers does not know this model type",
            where=where,
            found=family,
            next_step="upgrade transformers",
        ) from error
    if text_config(config).get("per_layer_config"):
        import surgery.loading  # noqa: F401  (registers per-layer widths with transformers)
    with quiet_transformers():
        try:
            return config_class.from_dict(config_class._decode_special_floats(copy.deepcopy(config)))
        except CONFIG_ERRORS as error:
            raise _cannot_build(error, where) from error


def auto_class(config: Any) -> Any:
    """The Auto class for a config: AutoModelForCausalLM or AutoModelForImageTextToText.

    Where both support the config, the checkpoint's `architectures` decides.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    known = [
        automatic
        for automatic in (AutoModelForCausalLM, AutoModelForImageTextToText)
        if type(config) in automatic._model_mapping
    ]
    for automatic in known:
        if automatic._model_mapping[type(config)].__name__ in (config.architectures or []):
            return automatic
    return known[0] if known else AutoModelForCausalLM


def build_model(config: Any, dtype: torch.dtype, where: str) -> Any:
    """A model with parameters on the meta device and real buffers. Raises UnsupportedModelError."""
    from accelerate import init_empty_weights

    with quiet_transformers():
        try:
            with init_empty_weights(include_buffers=False):
                model = auto_class(config).from_config(config, dtype=dtype)
        except CONFIG_ERRORS as error:
            raise _cannot_build(error, where) from error
    return model.eval().requires_grad_(False)


def _cannot_build(error: Exception, where: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "transformers can't build a causal language model from this config",
        where=where,
        found=" ".join(str(error).split())[:200] or type(error).__name__,
    )


def check_loads(folder: Path, beside: Collection[str] = ()) -> None:
    """Raise CheckpointError unless transformers loads `folder` without missing or unexpected tensors.

    `beside` are names of tensors that are not part of the model, which transformers may report. The
    checkpoint is loaded onto the meta device: transformers checks names and shapes, and no weight is read.
    """
    source = Checkpoint.open(folder)
    check_keys(folder, source.config, beside)


def check_keys(folder: Path, config: dict[str, Any], beside: Collection[str] = ()) -> None:
    """`check_loads` with a given config; `folder` may also hold packed weights. Raises CheckpointError."""
    from transformers.utils import logging

    automatic = auto_class(build_config(config, folder.name))
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet_transformers():
            _, info = automatic.from_pretrained(
                str(folder), device_map="meta", output_loading_info=True, dtype="auto"
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError) as error:
        raise CheckpointError(
            "the checkpoint does not load", where=folder.name, found=str(error).splitlines()[0]
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = set(info.get(kind) or ()) - (set(beside) if kind == "unexpected_keys" else set())
        if found:
            raise CheckpointError(
                f"the checkpoint does not load cleanly: {kind}",
                where=folder.name,
                found=str(sorted(found, key=str)[:3]),
            )
