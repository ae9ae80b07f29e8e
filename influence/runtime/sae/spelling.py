"""Token ids as the pieces of text they stand for."""

from collections.abc import Iterable

from influence.runtime.corpus.tokenizer import ModelTokenizer

LETTERS = ("a", "e", "A", "1")
"""Tokens that others may be spelt behind, the first that there is."""


def spelt(tokenizer: ModelTokenizer | None, ids: Iterable[int]) -> list[str]:
    """Returns each token's text by itself, a space at its beginning kept.

    Some tokenizers drop a space that comes first, so tokens are spelt behind a letter.
    Half a character is shown as the mark for that; without a tokenizer, ids are.
    """
    if tokenizer is None:
        return [f"{x} " for x in ids]
    own = tokenizer.tokenizer

    def decoded(*tokens: int) -> str:
        return own.decode(list(tokens), skip_special_tokens=False)

    known = (own.token_to_id(x) for x in LETTERS)
    before = next((x for x in known if x is not None), None)
    if before is None:
        return [decoded(x) for x in ids]
    first = decoded(before)
    return [
        both[len(first) :] if both.startswith(first) else decoded(id_)
        for id_, both in ((x, decoded(before, x)) for x in ids)
    ]
