"""How documents become sequences of tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple


class Cut(NamedTuple):
    """Some tokens of a document that stay together.

    Attributes:
      start: the first of them.
      stop: the one behind the last.
      begins: whether they begin a sequence, or go on with the one before.
    """

    start: int
    stop: int
    begins: bool


Cuts = Callable[[int, int, int], Iterator[Cut]]
"""`(context, reached, length)`: where to cut a document of some length, `reached`
tokens having been written before it."""


def joined(context: int, reached: int, length: int) -> Iterator[Cut]:
    """Cuts one stream of all documents into sequences of `context` tokens.

    Documents go on in the next sequence; only the last sequence may be shorter.
    """
    start = 0
    while start < length:
        filled = (reached + start) % context
        stop = min(start + context - filled, length)
        yield Cut(start, stop, filled == 0)
        start = stop


def apart(context: int, reached: int, length: int) -> Iterator[Cut]:
    """Cuts every document by itself, into sequences of at most `context` tokens.

    One token that would be left over at its end is left out: alone it predicts nothing.
    """
    del reached
    for start in range(0, length, context):
        stop = min(start + context, length)
        if stop - start > 1:
            yield Cut(start, stop, True)


@dataclass(frozen=True)
class Plan:
    """How a corpus is packed.

    Attributes:
      context: the longest sequence, in tokens.
      separator: the id that ends every document, or None for nothing. It is the last
        token of its document: a label that counts, as when a model learns where texts
        end.
      cuts: `joined` or `apart`.
      special_tokens: whether the tokenizer puts its own around every text.
      skip_empty: whether rows without text are passed over; an error otherwise.
      chunk: after how many tokens, at the end of a document, what was packed is
        committed. A run that was stopped goes on from there.

    Raises:
      ValueError: if nothing could be predicted, or nothing would be committed.
    """

    context: int
    separator: int | None
    cuts: Cuts = joined
    special_tokens: bool = False
    skip_empty: bool = False
    chunk: int = 1 << 22

    def __post_init__(self) -> None:
        """Raises for sequences and chunks there can't be."""
        if self.context < 2:
            raise ValueError(
                f"A sequence of at most {self.context} tokens predicts nothing. Take "
                "the model's context."
            )
        if self.separator is not None and not 0 <= self.separator < 2**32:
            raise ValueError(
                f"The separator is a token id from 0 on, or None; not {self.separator}."
            )
        if self.chunk < 1:
            raise ValueError(f"A chunk has at least one token, not {self.chunk}.")

    @property
    def about(self) -> dict[str, Any]:
        """Returns the plan as a manifest has it."""
        return {**vars(self), "cuts": self.cuts.__name__}
