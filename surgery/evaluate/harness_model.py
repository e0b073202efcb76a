"""SurgeonLM: the streamed engine as a model of lm-eval (EleutherAI's lm-evaluation-harness).

lm-eval finds models by name only after their module was imported. Two ways to use this one:

    python -m surgery.evaluate.harness_model --model surgeon --model_args pretrained=org/name --tasks arc_easy

    import surgery.evaluate.harness_model
    lm_eval.simple_evaluate(model="surgeon", model_args={"pretrained": "org/name"}, tasks=["arc_easy"])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from surgery.budget.pass_cost import PassCost
from surgery.checkpoint.transformers_model import load_tokenizer, text_config
from surgery.engine.open_model import Model, open_model
from surgery.errors import UsageError
from surgery.evaluate.continuations import Request, Score, score_continuations, scoring_cost
from surgery.progress import Progress, no_progress

LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")  # of a config, as lm-eval's `hf` reads them
NO_LENGTH = 2048  # context length where neither config nor tokenizer states one, as lm-eval's `hf`
UNBOUNDED = 1 << 40  # tokenizers without a limit state 1e30


@register_model("surgeon")
class SurgeonLM(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods by the streamed engine: one decoder layer in memory, many requests through it together.

    Tokens, truncation and prefix are those of lm-eval's `hf`, so results are too, up to rounding: logits are
    compared in float32 here, and in the compute dtype there. What `surgeon` opens can be evaluated: folders,
    FP8 folders, GGUF files and Hub ids. `generate_until` raises UsageError.
    """

    def __init__(
        self,
        pretrained: str | Model,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        memory: str | int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str | None = None,  # noqa: ARG002
        max_batch_size: int | None = None,  # noqa: ARG002
        progress: Progress[Any] = no_progress,
    ) -> None:
        """Open a model. `device`, `dtype` and `memory` are those of `open_model`.

        `memory` decides how many requests share a pass; `batch_size` and `max_batch_size`, which lm-eval
        passes on, have no effect. Raises what `open_model` raises.
        """
        super().__init__()
        if isinstance(pretrained, str):
            # lm-eval's own default is cuda:0, on machines without a GPU too.
            absent = (device or "cuda").startswith("cuda") and not torch.cuda.is_available()
            pretrained = open_model(
                pretrained,
                revision=revision,
                device="auto" if absent or device is None else device,
                dtype=dtype,
                memory=memory,
                trust_remote_code=trust_remote_code,
            )
        self.opened = pretrained
        self.tokenizer = load_tokenizer(pretrained.checkpoint)
        self.add_bos_token = add_bos_token
        self.custom_prefix_token_id = prefix_token_id
        self.max_length = max_length or context_length(pretrained, self.tokenizer)
        self.progress = progress
        self._device = pretrained.run.device

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by: the beginning of text, else the end of text."""
        begin = self.tokenizer.bos_token_id if self.custom_prefix_token_id is None else None
        found = self.custom_prefix_token_id if begin is None else begin
        return int(self.tokenizer.eos_token_id if found is None else found)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the tokenizer's template writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a string; special tokens are added once."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            special = False
        options = {} if special is None else {"add_special_tokens": special}
        return [int(token) for token in self.tokenizer.encode(string, **options)]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """(ln P(continuation | context) in nats, whether it is greedy) of each request."""
        tokens = [Request(tuple(context), tuple(rest)) for _, context, rest in requests]
        scores = self.score(tokens, no_progress if disable_tqdm else self.progress)
        answers = [(score.nats, score.greedy) for score in scores]
        for (text, _context, _continuation), answer in zip(requests, answers, strict=True):
            if text is not None:  # a window of a longer text
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def score(self, requests: list[Request], progress: Progress[Any]) -> list[Score]:
        """Score requests of token ids."""
        return score_continuations(self.opened, requests, max_length=self.max_length, progress=progress)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """ln P(text) in nats, in windows of the context length that predict every token once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners = []
        for number, (text,) in enumerate(request.args for request in requests):
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (nats, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """Refused: generating text would read the whole model once a token."""
        raise no_generation({str(request.task_name) for request in requests})

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results about the model."""
        checkpoint = self.opened.checkpoint
        return {
            "model_num_parameters": checkpoint.parameters,
            "model_dtype": self.opened.run.dtype_name,
            "model_revision": checkpoint.revision,
        }


class CostLM(SurgeonLM):
    """Adds up what a run would take in `costs`, and scores every request 0."""

    def __init__(self, opened: Model) -> None:
        super().__init__(opened)
        self.costs: list[PassCost] = []

    def score(self, requests: list[Request], progress: Progress[Any]) -> list[Score]:  # noqa: ARG002
        """Add the cost of scoring requests."""
        self.costs.append(scoring_cost(self.opened, requests, max_length=self.max_length))
        return [Score(0.0, False)] * len(requests)


def context_length(opened: Model, tokenizer: Any) -> int:
    """The longest input in tokens: by the config, else by the tokenizer, else NO_LENGTH."""
    config = text_config(opened.checkpoint.config)
    stated = next((config[name] for name in LENGTHS if config.get(name) is not None), None)
    limit = tokenizer.model_max_length
    return int(stated or (limit if limit < UNBOUNDED else NO_LENGTH))


def no_generation(tasks: set[str]) -> UsageError:
    """The refusal of tasks that generate text."""
    return UsageError(
        "tasks that generate text are not run by the streamed engine",
        found=", ".join(sorted(tasks)),
        expected="tasks of log-likelihoods, as multiple choice",
        next_step="run them in memory: lm-eval --model hf --model_args pretrained=MODEL",
    )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
