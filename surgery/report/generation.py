"""The section with text that the dense and the pruned model generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.errors import ReportError, one_line
from surgery.report.document import Fact, Section

PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time,")


def sample_section(
    dense: str, revision: str | None, folder: Path, prompts: list[str], tokens: int
) -> Section:
    """Greedy continuations by a `dense` model (folder, or Hub id at a revision) and its pruned `folder`."""
    texts = [
        ("dense", continuations(dense, revision, prompts, tokens)),
        ("pruned", continuations(str(folder), None, prompts, tokens)),
    ]
    quotes: list[dict[str, Any]] = [
        {"prompt": prompt, "texts": [[name, own[place]] for name, own in texts]}
        for place, prompt in enumerate(prompts)
    ]
    return Section(
        "samples",
        "Generated text",
        "Both models continue each prompt by greedy decoding. A few sentences are an impression, not a "
        "measurement.",
        facts=[Fact("tokens at most", tokens, "count")],
        quotes=quotes,
    )


def continuations(model: str, revision: str | None, prompts: list[str], tokens: int) -> list[str]:
    """The text that a checkpoint adds to each prompt: at most `tokens` tokens, by greedy decoding.

    The whole model is loaded into memory. Raises ReportError when it can't be loaded.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer

    import surgery.loading  # noqa: F401  # registers the classes of models whose layers differ in width
    from surgery.checkpoint.quiet_transformers import quiet_transformers
    from surgery.checkpoint.transformers_model import auto_class

    try:
        with quiet_transformers():
            how = {"revision": revision, "trust_remote_code": False}  # else transformers asks on the terminal
            tokenizer = AutoTokenizer.from_pretrained(model, **how)
            kind = auto_class(AutoConfig.from_pretrained(model, **how))
            loaded = kind.from_pretrained(model, dtype="auto", **how).eval()
    except (OSError, ValueError) as error:
        raise ReportError(
            "the model can't be loaded",
            where=model,
            found=one_line(error),
            next_step="name a model folder or a Hub id",
        ) from error
    written = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad(), quiet_transformers():
            output = loaded.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        new = output[0, inputs["input_ids"].shape[1] :]
        written.append(str(tokenizer.decode(new, skip_special_tokens=True)))
    return written
