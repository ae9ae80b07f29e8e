"""One document of a corpus: what it says, and the place that leads back to it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Message = Mapping[str, Any]
"""One turn of a conversation: its `role`, its `content`, and what a template reads."""

Content = str | list[Message] | np.ndarray
"""A document as text, as a conversation, or as token ids."""

KINDS = {str: "text", list: "messages", np.ndarray: "token ids"}
"""What the contents are called, by type."""


class Place(NamedTuple):
    """Where a document is, for those who read on from it or look it up again.

    Attributes:
      row: its number in the corpus, from 0.
      file: the number of the file it is in, in their order.
      at: where in the file: a byte, or a row.
    """

    row: int
    file: int
    at: int


BEGINNING = Place(0, 0, 0)


class Document(NamedTuple):
    """A document and where it is."""

    place: Place
    content: Content


def said(content: str | np.ndarray, start: int, stop: int) -> bytes:
    """Returns what a document says from one character, or token id, to another."""
    if isinstance(content, str):
        return content[start:stop].encode("utf-8")
    return content[start:stop].astype("<u4").tobytes()


def content(value: Any) -> Content | None:
    """Returns what a column holds in one row, or None if that is nothing.

    Raises:
      ValueError: if it is no text, conversation or list of token ids; what it is.
    """
    if value is None or (isinstance(value, Sequence | np.ndarray) and not len(value)):
        return None
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list) and isinstance(value[0], Mapping):
        return _messages(value)
    if isinstance(value, list | np.ndarray):
        return _tokens(value)
    raise ValueError(
        f"is of type {type(value).__name__}. It has to be text, a list of token ids, "
        "or a list of messages with role and content."
    )


def _text(value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"has half a character, {value[error.start]!r} at {error.start}: an escape "
            "that was cut in two. Repair it, or leave the row out."
        ) from error
    return value


def _messages(value: list[Any]) -> list[Message]:
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(
                f"has a message {i} without role and content: {message!r:.80}. Every "
                "message has both."
            )
    return value


def _tokens(value: list[Any] | np.ndarray) -> np.ndarray:
    # Of lists of unequal length there is no array of numbers.
    lists = isinstance(value, list) and any(isinstance(x, list) for x in value)
    tokens = np.asarray([] if lists else value)
    if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
        raise ValueError(
            f"is a list that begins {value[:3]!r:.80}. A list has to be token ids, "
            "whole numbers, or messages with role and content."
        )
    if tokens.min() < 0 or tokens.max() >= 2**32:
        wrong = int(((tokens < 0) | (tokens >= 2**32)).argmax())
        raise ValueError(
            f"has {tokens[wrong]} at {wrong}. Token ids are from 0 to {2**32 - 1}."
        )
    return tokens
