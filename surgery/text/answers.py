"""Which characters of a rendered conversation are the assistant's answers, for any chat template.

A template that says so itself, with `{% generation %}`, is taken at its word. Of another, beginnings of the
conversation are rendered: what is added from the prompt for an answer to the answered conversation is the
answer. Where the template writes the end of a conversation otherwise than its middle (thinking of earlier
turns is left out), or has no prompt for an answer, the conversation is rendered once more with another answer
in its place, and the answer is what differs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Span = tuple[int, int]  # from the first character to that after the last
Messages = list[dict[str, str]]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
NO_OFFSETS = "the tokenizer does not say which characters a token is made of"
NOT_STABLE = "the chat template writes a turn otherwise when another one changes"
NO_BEGINNINGS = "the chat template does not take the beginnings of their conversations"


class AnswersUnknown(Exception):
    """The answers in a conversation can't be told apart from the rest; the message says why."""


class ChatAnswers:
    """Finds answers in conversations that a tokenizer's chat template has rendered."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.marks = tokenizer.is_fast and bool(GENERATION.search(tokenizer.get_chat_template()))
        self.enders = tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""})

    def spans(self, messages: Messages, text: str) -> tuple[Span, ...]:
        """The answers in `text`, which the template made of `messages`, with the token that ends each turn.

        White space after that token belongs to the template. Raises AnswersUnknown.
        """
        if not self.tokenizer.is_fast:
            raise AnswersUnknown(NO_OFFSETS)
        marked = self._marked_by_template(messages, text) if self.marks else None
        if marked is not None:
            return tuple(self._ended(text, span) for span in marked)
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        found = [_turn(self._render, messages, place, text) for place in places]
        return tuple(self._ended(text, span) for span in found if span is not None)

    def _render(self, messages: Messages, prompt: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            )
        except Exception as error:  # a template may raise anything
            raise AnswersUnknown(NO_BEGINNINGS) from error

    def _marked_by_template(self, messages: Messages, text: str) -> list[Span] | None:
        """What is inside `{% generation %}`; None for a tokenizer that renders in a way of its own.

        The template itself gives characters; `return_assistant_tokens_mask` leaves out every answer after one
        that begins with a character which belongs to no token.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        (rendered,), (spans,) = render_jinja_template(
            conversations=[messages],
            chat_template=self.tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return [(start, end) for start, end in spans] if rendered == text else None

    def _ended(self, text: str, span: Span) -> Span:
        """A span up to the token that ends the turn: without white space after it, or with it added."""
        start, end = span
        kept = text[start:end].rstrip()
        if kept.endswith(self.enders):
            return start, start + len(kept)
        following = (ender for ender in self.enders if text.startswith(ender, end))
        return start, end + max(map(len, following), default=0)


def _turn(render: Callable[..., str], messages: Messages, place: int, text: str) -> Span | None:
    """The answer that message `place` is, in the text of all messages; None where it is left out of that."""
    before, prompt = "", ""
    if place:
        before, prompt = render(messages[:place]), render(messages[:place], prompt=True)
    answered = render(messages[: place + 1])
    prompted = prompt != before
    if prompted and answered.startswith(prompt) and text.startswith(answered):
        return len(prompt), len(answered)
    other = [dict(message) for message in messages]
    other[place]["content"] = probe = _unlike(messages[place]["content"])
    found = _difference(text, render(other), probe, before)
    if found is None:
        return None
    start, end = found
    if prompted and len(prompt) <= start and text.startswith(prompt):
        start = len(prompt)
    alone = _difference(answered, render(other[: place + 1]), probe, before)
    ending = "" if alone is None else answered[alone[1] :]
    return start, end + len(ending) * text.startswith(ending, end)


def _unlike(content: str) -> str:
    """A character with which an answer neither begins nor ends."""
    ends = {content.strip()[:1], content.strip()[-1:]}
    return next(character for character in "012" if character not in ends)


def _difference(text: str, other: str, probe: str, before: str) -> Span | None:
    """Where `text` has an answer for which `other` has the character `probe`; None where they are equal.

    What comes `before` the turn is known: after it, an answer may also have lost its thinking to a template
    that writes that anew. Raises AnswersUnknown where the two differ in more.
    """
    if text == other:
        return None
    start = _common(text, other)
    last = min(len(text), len(other)) - start
    after = min(last, _common(text[::-1], other[::-1]))
    changed = other[start : len(other) - after].strip()
    in_turn = text.startswith(before) and start >= len(before)
    if changed != probe and not (in_turn and changed.endswith(probe) and changed.count(probe) == 1):
        raise AnswersUnknown(NOT_STABLE)
    return start, len(text) - after


def _common(one: str, other: str) -> int:
    """Characters that two strings begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
