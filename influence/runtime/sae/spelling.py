"""Token ids as the pieces of text they stand for."""

from collections.abc import Iterable, Sequence
from functools import lru_cache

from influence.runtime.corpus.tokenizer import ModelTokenizer


def spelt(tokenizer: ModelTokenizer | None, ids: Iterable[int]) -> list[str]:
    """Returns each token's text by itself, a space at its beginning kept.

    Half a character is shown as the mark for that; without a tokenizer, ids are.
    """
    if tokenizer is None:
        return [f"{x} " for x in ids]
    speller = _Speller(tokenizer)
    return [speller(int(x)) for x in ids]


class _Speller:
    """Spells tokens behind another: some tokenizers drop a space that comes first."""

    def __init__(self, tokenizer: ModelTokenizer):
        self.decode = lru_cache(None)(
            lambda ids: tokenizer.tokenizer.decode(list(ids), skip_special_tokens=False)
        )
        self.before = _letter(tokenizer)

    def __call__(self, id_: int) -> str:
        if self.before is None:
            return self.decode((id_,))
        first, both = self.decode((self.before,)), self.decode((self.before, id_))
        return both[len(first) :] if both.startswith(first) else self.decode((id_,))


def _letter(tokenizer: ModelTokenizer) -> int | None:
    """Returns the id of a plain letter, if there is one."""
    known: Sequence[int | None] = [
        tokenizer.tokenizer.token_to_id(x) for x in ("a", "e", "A", "1")
    ]
    return next((x for x in known if x is not None), None)
