"""Rows of a data set to text: which column holds it, and chat rows through the model's own chat template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from surgery.errors import CalibrationError, one_line
from surgery.text.answers import AnswersUnknown, ChatAnswers, Messages, Span
from surgery.text.marks import MarkedText

TEXT_COLUMNS = ("text", "content", "sentence", "document", "code")
CHAT_COLUMNS = ("messages", "conversations", "conversation", "chosen")
# Columns of one exchange: what was asked (with an optional addition), and the answer.
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
)
ADDITIONS = ("input", "context")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass
class RowReader:
    """Turns rows into texts; `skipped` counts rows without text, by reason.

    `whole` counts chat rows of which `marked` can't tell the answers from the rest, by reason. `column` is
    the column named by the user. `tokenizer` renders chat rows, where it has a chat template; without one the
    messages are joined by newlines.
    """

    name: str
    tokenizer: Any = None
    column: str | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)

    def texts(self, rows: Iterable[Any]) -> Iterator[str]:
        """The text of each row that has one. Raises CalibrationError for rows without a text column."""
        return (row.text for row in self._read(rows, answers=False))

    def marked(self, rows: Iterable[Any]) -> Iterator[MarkedText]:
        """The same texts, those of chat with the spans of the assistant's answers."""
        return self._read(rows, answers=True)

    def _read(self, rows: Iterable[Any], answers: bool) -> Iterator[MarkedText]:
        found = 0
        for row in rows:
            value = row if isinstance(row, str) else self._value(row)
            try:
                row_text = self._text(value, answers)
            except ValueError as error:
                self._skip(f"not what the chat template takes ({error})")
                continue
            if row_text is None or not row_text.text.strip():
                self._skip("empty")
                continue
            found += 1
            yield clean_marked(row_text)
        if not found:
            reasons = "; ".join(f"{count} rows {reason}" for reason, count in self.skipped.items())
            raise CalibrationError(
                "the data set has no row with text",
                where=self.name,
                found=reasons or "no rows",
                next_step="give another text, or name the column with --text-column",
            )

    def _skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def _value(self, row: Any) -> Any:
        """What holds the text of a row: the value of a column, or a list of chat messages."""
        if not isinstance(row, dict):
            return row
        if self.column is not None:
            if self.column not in row:
                raise self._no_column(row, self.column)
            return row[self.column]
        for name in (*TEXT_COLUMNS, *CHAT_COLUMNS):
            if name in row:
                return row[name]
        for ask, answer in PAIRS:
            if ask in row and answer in row:
                return self._exchange(row, ask, answer)
        raise self._no_column(row, ", ".join((*TEXT_COLUMNS, *CHAT_COLUMNS, *("+".join(p) for p in PAIRS))))

    def _no_column(self, row: dict[str, Any], expected: str) -> CalibrationError:
        return CalibrationError(
            "the data set has no such text column" if self.column else "the data set has no text column",
            where=self.name,
            expected=expected,
            found=", ".join(map(str, row)) or "no columns",
            next_step="name the column that holds the text with --text-column",
        )

    def _exchange(self, row: dict[str, Any], ask: str, answer: str) -> list[dict[str, Any]] | None:
        """The messages of a row with a question and an answer, each a string or messages already."""
        asked, answered = row[ask], row[answer]
        if asked is None or answered is None:
            return None
        more = [str(row[name]) for name in ADDITIONS if row.get(name)]
        before = asked if _is_chat(asked) else [{"role": "user", "content": "\n\n".join([str(asked), *more])}]
        after = answered if _is_chat(answered) else [{"role": "assistant", "content": str(answered)}]
        return [*before, *after]

    def _text(self, value: Any, answers: bool) -> MarkedText | None:
        if value is None:
            return None
        if isinstance(value, str):
            return MarkedText(value)
        if isinstance(value, dict):
            value = [value]
        if _is_chat(value):
            return self._chat([_message(message) for message in value], answers)
        if isinstance(value, (list, tuple)):
            return MarkedText("\n".join(str(part) for part in value if part is not None))
        return MarkedText(str(value))

    def _chat(self, messages: Messages, answers: bool) -> MarkedText:
        if not getattr(self.tokenizer, "chat_template", None):
            text = "\n".join(message["content"] for message in messages)
            return MarkedText(text, _joined_answers(messages) if answers else None)
        try:
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template may raise anything: roles in another order, no system role
            raise ValueError(one_line(error, 100)) from error
        try:
            return MarkedText(text, self._answers.spans(messages, text) if answers else None)
        except AnswersUnknown as error:
            self.whole[str(error)] = self.whole.get(str(error), 0) + 1
            return MarkedText(text)

    @cached_property
    def _answers(self) -> ChatAnswers:
        return ChatAnswers(self.tokenizer)


def _is_chat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, dict) for one in value)


def _joined_answers(messages: Messages) -> tuple[Span, ...]:
    """The spans of the assistant's messages in all of them, joined by single characters."""
    spans, start = [], 0
    for message in messages:
        end = start + len(message["content"])
        if message["role"] == "assistant":
            spans.append((start, end))
        start = end + 1
    return tuple(spans)


def _message(message: dict[str, Any]) -> dict[str, str]:
    """A message with the keys of transformers: `role` and `content`, a string."""
    role = str(message.get("role") or message.get("from") or "user")
    content = next((message[key] for key in ("content", "value", "text") if message.get(key) is not None), "")
    if isinstance(content, (list, tuple)):
        content = "\n".join(
            str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content
        )
    return {"role": ROLES.get(role, role), "content": str(content)}


def clean(text: str) -> str:
    """The text with halves of surrogate pairs replaced by U+FFFD; they can't be encoded."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def clean_marked(row: MarkedText) -> MarkedText:
    """A row with its text cleaned, and its spans where their characters are then."""
    text = clean(row.text)
    if row.answers is None or len(text) == len(row.text):
        return MarkedText(text, row.answers)
    places = [(len(clean(row.text[:start])), len(clean(row.text[:end]))) for start, end in row.answers]
    return MarkedText(text, tuple(places))
