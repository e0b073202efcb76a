"""The tokenizer of a GGUF file, saved as transformers' tokenizer.json."""

from __future__ import annotations

from pathlib import Path

from surgery.checkpoint.gguf_file import GgufFile
from surgery.checkpoint.quiet_transformers import quiet_transformers
from surgery.errors import CheckpointError

# values of tokenizer.ggml.pre for which llama.cpp sets digits apart before GPT-2's pattern splits the rest;
# transformers applies the pattern alone, which joins the spaces before a digit in another way
DIGITS_APART = ("codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder")


def save_tokenizer(file: GgufFile, model_type: str, folder: Path) -> None:
    """Write the tokenizer in the file's metadata to `folder`. Raises CheckpointError where there is none.

    Its class is the one that AutoTokenizer takes for the model type. AutoTokenizer itself would parse the
    file another three times, which takes longer than all else.
    """
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    digits_apart = file.metadata.get("tokenizer.ggml.pre") in DIGITS_APART
    config_class = CONFIG_MAPPING["llama" if file.architecture == "llama" else model_type]
    try:
        with quiet_transformers():
            tokenizer_class = TOKENIZER_MAPPING.get(config_class, None)
            if tokenizer_class is None or digits_apart:  # a class of its own has a pattern of its own
                tokenizer_class = PreTrainedTokenizerFast
            tokenizer = tokenizer_class.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
            if digits_apart:
                tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Digits(individual_digits=True),
                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                    ]
                )
            tokenizer.save_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise CheckpointError(
            "the tokenizer in this GGUF file can't be read",
            where=file.path.name,
            found=" ".join(str(error).split())[:200],
        ) from error
