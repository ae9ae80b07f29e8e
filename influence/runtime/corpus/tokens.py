"""Documents as token ids, with what leads from a token back to the text."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding

from influence.runtime.corpus.document import Content, Document, Place
from influence.runtime.corpus.plan import Plan
from influence.runtime.corpus.source import Source, located
from influence.runtime.corpus.tokenizer import ModelTokenizer

GROUP = 1 << 18
"""How many characters are turned into tokens at a time, by all processors."""


class Tokens(NamedTuple):
    """A document as token ids.

    Attributes:
      place: where it is.
      ids: its token ids, the separator the last of them.
      content: its text; or the ids without the separator, of a row that held ids.
      encoding: the text's, or None.
    """

    place: Place
    ids: np.ndarray
    content: str | np.ndarray
    encoding: Encoding | None

    def covered(self, count: int) -> int:
        """Returns how many characters, or ids, the first tokens stand for.

        A character of several tokens goes with the first of them, and what no token
        stands for with the token before it.
        """
        if self.encoding is None:
            return min(count, len(self.content))
        if count >= len(self.encoding):
            return len(self.content)
        while count and (span := self.encoding.token_to_chars(count - 1)) is None:
            count -= 1  # A special token stands for no text.
        return span[1] if count else 0


def text_of(content: Content, tokenizer: ModelTokenizer | None) -> str | np.ndarray:
    """Returns a document's text, a conversation rendered; token ids as they are.

    Raises:
      ValueError: if there is no template for a conversation, or it refuses it.
    """
    if not isinstance(content, list):
        return content
    if tokenizer is None:
        raise ValueError("is a conversation. Pass a tokenizer with a chat template.")
    return tokenizer.render(content)


def packable(
    content: Content, tokenizer: ModelTokenizer | None, plan: Plan
) -> str | np.ndarray:
    """Returns what `text_of` does, if its tokens would mean something.

    Raises:
      ValueError: if there is no tokenizer for a text, special tokens would be there
        twice, or a row has ids the tokenizer has not; and what `text_of` raises.
    """
    if isinstance(content, list) and plan.special_tokens:
        raise ValueError(
            "is a conversation: its template writes the special tokens, and "
            "`special_tokens` would put them there again. Leave that out."
        )
    text = text_of(content, tokenizer)
    if isinstance(text, str) and tokenizer is None:
        raise ValueError("is text, not token ids. Pass a tokenizer.")
    if isinstance(text, np.ndarray) and tokenizer and text.max() >= tokenizer.size:
        raise ValueError(
            f"has the token id {text.max()}, the tokenizer {tokenizer.size} ids. Is it "
            "the tokenizer the ids were made with?"
        )
    return text


def tokenised(
    source: Source,
    documents: Iterable[Document],
    tokenizer: ModelTokenizer | None,
    plan: Plan,
) -> Iterator[Tokens]:
    """Yields documents as tokens, as they come.

    Raises:
      ValueError: naming the row, if one is not `packable`.
    """
    for group in _groups(_texts(source, documents, tokenizer, plan)):
        texts = [x for _, x in group if isinstance(x, str)]
        encodings: Iterator[Encoding] = iter(())
        if texts and tokenizer is not None:
            encodings = iter(tokenizer.encode(texts, special=plan.special_tokens))
        for place, content in group:
            encoding = next(encodings) if isinstance(content, str) else None
            ids = np.asarray(content if encoding is None else encoding.ids, np.int64)
            if plan.separator is not None:
                ids = np.append(ids, plan.separator)
            yield Tokens(place, ids, content, encoding)


def _texts(
    source: Source,
    documents: Iterable[Document],
    tokenizer: ModelTokenizer | None,
    plan: Plan,
) -> Iterator[tuple[Place, str | np.ndarray]]:
    for place, content in documents:
        with located(source, place):
            text = packable(content, tokenizer, plan)
        yield place, text


def _groups(
    texts: Iterable[tuple[Place, str | np.ndarray]],
) -> Iterator[list[tuple[Place, str | np.ndarray]]]:
    """Yields texts together, until they have some length or one of them has."""
    group, length = [], 0
    for place, text in texts:
        group.append((place, text))
        length += len(text)
        if length >= GROUP:
            yield group
            group, length = [], 0
    if group:
        yield group
