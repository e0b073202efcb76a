"""Small tokenizers of every kind that a cut of the vocabulary knows, trained on text that is in the repo."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers.tiny_models import ROOT

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]
BYTES = [f"<0x{number:02X}>" for number in range(256)]
TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant:{% endif %}"
)


def byte_level(vocabulary: int, *, ignore_merges: bool = False) -> Tokenizer:
    """Byte-level BPE, as GPT-2's; with `ignore_merges` as Llama 3's."""
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([text()], trainer)
    return made


def with_fallback(vocabulary: int) -> Tokenizer:
    """BPE of characters with a fallback to bytes, as Llama 2's and Gemma's."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(BYTES), special_tokens=SPECIAL, show_progress=False
    )
    made.train_from_iterator([text()], trainer)
    learned = json.loads(made.to_str())["model"]
    tokens = [*SPECIAL, *BYTES, *list(learned["vocab"])[len(SPECIAL) :]]
    model = models.BPE(
        {token: number for number, token in enumerate(tokens)},
        [tuple(pair) for pair in learned["merges"]],
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    return _finished(model, made)


def unigram(vocabulary: int) -> Tokenizer:
    """Unigram with a fallback to bytes."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary - len(BYTES), special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([text()], trainer)
    learned = [tuple(entry) for entry in json.loads(made.to_str())["model"]["vocab"]]
    pieces = [*learned[: len(SPECIAL)], *((token, 0.0) for token in BYTES), *learned[len(SPECIAL) :]]
    return _finished(models.Unigram(pieces, unk_id=0, byte_fallback=True), made)


def _finished(model: Any, trained: Tokenizer) -> Tokenizer:
    made = Tokenizer(model)
    made.normalizer, made.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(SPECIAL)
    return made


MADE = {
    "byte-level": byte_level,
    "ignore_merges": lambda size: byte_level(size, ignore_merges=True),
    "byte fallback": with_fallback,
    "unigram": unigram,
}


def fast_tokenizer(kind: str, vocabulary: int, bos: bool = True) -> PreTrainedTokenizerFast:
    """One of MADE for transformers, with special tokens, a post-processor and a chat template."""
    made = MADE[kind](vocabulary)
    if bos:
        made.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
                ),
            ]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.chat_template = TEMPLATE
    return fast


def text() -> str:
    """Eleven kilobytes of English."""
    return (ROOT / "LICENSE").read_text()
