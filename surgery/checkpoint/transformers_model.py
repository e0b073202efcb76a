"""transformers objects of a checkpoint: config, meta-device model, tokenizer; and the loading check."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Collection
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.overrides import TorchFunctionMode

from surgery.checkpoint.quiet_transformers import quiet_transformers
from surgery.checkpoint.reader import Checkpoint
from surgery.errors import CalibrationError, CheckpointError, UnsupportedModelError, one_line

TOKENIZERS: WeakKeyDictionary[Checkpoint, Any] = WeakKeyDictionary()  # loaded for an open checkpoint


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own tokenizer, loaded once. Raises CalibrationError when it has none that loads.

    Code that comes with it runs only when the checkpoint was opened with `trust_remote_code`.
    """
    if checkpoint not in TOKENIZERS:
        TOKENIZERS[checkpoint] = _load_tokenizer(checkpoint)
    return TOKENIZERS[checkpoint]


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    trusted = checkpoint.trust_remote_code
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.source.path), trust_remote_code=trusted)
            tokenizer("a")
            return tokenizer
    except Exception as error:  # tokenizers raises plain Exceptions
        own_code = "trust_remote_code" in str(error) and not trusted
        raise CalibrationError(
            "the checkpoint's tokenizer needs code of its own"
            if own_code
            else "the checkpoint's tokenizer can't be loaded",
            where=checkpoint.name,
            found="" if own_code else one_line(error),
            next_step="give --trust-remote-code if you trust this code"
            if own_code
            else _missing_package(error) or "put a tokenizer.json that loads beside config.json",
        ) from error


def _missing_package(error: Exception) -> str:
    """What to install, where an error says that a package is missing."""
    for package in ("sentencepiece", "protobuf", "tiktoken"):
        if package in str(error).lower() and ("pip install" in str(error) or isinstance(error, ImportError)):
            return f"pip install {package}"
    return ""


# Keys that say how to run a model, not what it is: a kernel that is named there may be missing here.
RUN_KEYS = (
    "_attn_implementation",
    "attn_implementation",
    "_experts_implementation",
    "experts_implementation",
)
MOST_POSITIONS = 1 << 26  # some families make tables of this length on construction


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the language model; a multimodal config nests it."""
    for key in ("text_config", "llm_config", "language_config"):
        nested = config.get(key)
        if isinstance(nested, dict):
            return nested
    return config


def build_config(config: dict[str, Any], where: str) -> Any:
    """The transformers config object of a config.json. Raises UnsupportedModelError if it can't be built."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = str(config.get("model_type"))
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
            plain = {key: value for key, value in config.items() if key not in RUN_KEYS}
            built = config_class.from_dict(config_class._decode_special_floats(copy.deepcopy(plain)))
        except Exception as error:
            raise _cannot_build(error, where) from error
    positions = getattr(built.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > MOST_POSITIONS:
        raise UnsupportedModelError(
            "the config has an impossible context length",
            where=where,
            expected=f"max_position_embeddings up to {MOST_POSITIONS:,}",
            found=str(positions),
        )
    for part in (built, built.get_text_config()):
        stated = getattr(part, "dtype", None)
        if stated is not None and not (isinstance(stated, torch.dtype) and stated.is_floating_point):
            raise UnsupportedModelError(
                "the config states a dtype that a model can't have",
                where=where,
                expected="dtype as float32, bfloat16 or float16",
                found=str(stated),
            )
    return built


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
            with init_empty_weights(include_buffers=False), _NothingDrawn():
                model = auto_class(config).from_config(config, dtype=dtype)
        except Exception as error:
            raise _cannot_build(error, where) from error
    return model.eval().requires_grad_(False)


class _NothingDrawn(TorchFunctionMode):
    """Weights on the meta device are not initialised at random in it: that takes longer than the rest."""

    RANDOM = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_")

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.__name__ in self.RANDOM:  # of torch.nn.init and of Tensor
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if tensor.is_meta:
                return tensor
        return function(*args, **kwargs)


def _cannot_build(error: Exception, where: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "transformers can't build a causal language model from this config",
        where=where,
        found=one_line(error),
        next_step="compare config.json with the one its publisher has",
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
    built = build_config(config, folder.name)
    automatic = auto_class(built)
    try:
        # progress bars of transformers, and of compressed-tensors, which has no switch
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            _, info = automatic.from_pretrained(
                str(folder),
                config=built,
                device_map="meta",
                output_loading_info=True,
                dtype="auto",
                attn_implementation="eager",  # of any, the names and shapes are the same
                trust_remote_code=False,
            )
    except Exception as error:
        raise CheckpointError(
            "the checkpoint does not load", where=folder.name, found=one_line(error)
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = set(info.get(kind) or ()) - (set(beside) if kind == "unexpected_keys" else set())
        if found:
            raise CheckpointError(
                f"the checkpoint does not load cleanly: {kind}",
                where=folder.name,
                found=str(sorted(found, key=str)[:3]),
            )
