"""A run's packed corpora: what one is, what packing it needs, samples of it."""

from dataclasses import dataclass

import numpy as np
from rich.console import Console

from influence.runtime.corpus.pack import Totals
from influence.runtime.corpus.packed import Packed
from influence.runtime.corpus.source import Source
from influence.runtime.models import Model


@dataclass(frozen=True)
class Corpus:
    """Sequences, and where they are from.

    Attributes:
      packed: the sequences.
      source: the documents.
      digest: a SHA-256 of the documents and of how they were packed.
    """

    packed: Packed
    source: Source
    digest: str


class Watch:
    """Shows how far packing is, more and more seldom the longer it takes."""

    def __init__(self, console: Console):
        self.console, self.said = console, 0

    def __call__(self, totals: Totals) -> None:
        """Shows the totals, now and then."""
        if totals.documents >= 2 * self.said + 1000:
            self.said = totals.documents
            self.console.print(
                f"packed {totals.documents:,} documents, {totals.sequences:,} "
                "sequences so far"
            )


def separator(word: str, model: Model) -> int | None:
    """Returns the token that ends a document."""
    if word == "none" or model.tokenizer is None and word == "eos":
        return None
    if word == "eos":
        assert model.tokenizer is not None
        return model.tokenizer.separator
    if not word.isdecimal() or int(word) >= model.vocabulary:
        raise ValueError(
            f"The separator {word!r} is none of the model's {model.vocabulary} token "
            "ids. Give `eos`, `none` or an id."
        )
    return int(word)


def sample(packed: Packed, count: int, seed: int) -> Packed:
    """Returns some sequences of a corpus, drawn by a seed, in the corpus's order."""
    if count >= len(packed):
        return packed
    drawn = np.random.default_rng(seed).choice(len(packed), count, replace=False)
    return packed.take(np.sort(drawn))
