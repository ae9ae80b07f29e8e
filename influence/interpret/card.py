"""What is known of each feature of a dictionary, in records anybody can write down."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite


@dataclass(frozen=True)
class Example:
    """A stretch of a training sequence, and how far a feature is on in it.

    Attributes:
      id: of the sequence.
      first: position in it of the first token shown.
      tokens: their texts.
      activations: the feature's, at each.
    """

    id: str
    first: int
    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises if an activation is missing or not finite."""
        if len(self.tokens) != len(self.activations) or not self.tokens:
            raise ValueError(
                f"An example from {self.id!r} has {len(self.tokens)} tokens and "
                f"{len(self.activations)} activations. Give one of each, and one at "
                "least."
            )
        _check_finite(f"An example from {self.id!r}", self.activations)

    @property
    def peak(self) -> int:
        """Returns which of the tokens the feature is on the most at."""
        return self.activations.index(max(self.activations))


@dataclass(frozen=True)
class Band:
    """Examples of one strength.

    Attributes:
      name: what a reader calls it: "top", or the quantiles it lies between.
      examples: of it.
    """

    name: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Cause:
    """A training sequence that influenced a feature.

    Attributes:
      id: of the sequence.
      score: change of the feature's pre-activation per added copy.
      text: the sequence's.
    """

    id: str
    score: float
    text: str


@dataclass(frozen=True)
class Card:
    """What is known of one feature.

    Attributes:
      index: its place in the dictionary.
      density: the share of tokens at which it is on.
      maximum: its largest activation; 0 if it was never on.
      counts: a histogram of its activations where it is on: tokens in each bin.
      edges: of the bins, one more than they are; none if there are no bins.
      bands: examples of it by strength, the strongest first; none if it was never on.
      promoted: output tokens it raises the most, with their logits.
      suppressed: output tokens it lowers the most, with their logits.
      nearest: other features, with the cosine of their decoder directions to its own.
      causes: training sequences that influenced it the most, of either sign; `None` if
        that was not computed.
    """

    index: int
    density: float
    maximum: float
    counts: tuple[int, ...]
    edges: tuple[float, ...]
    bands: tuple[Band, ...]
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    nearest: tuple[tuple[int, float], ...]
    causes: tuple[Cause, ...] | None

    def __post_init__(self) -> None:
        """Raises if a number is not finite, or the bins do not fit their edges."""
        if len(self.edges) != len(self.counts) + bool(self.counts):
            raise ValueError(
                f"Feature {self.index} has {len(self.counts)} bins and "
                f"{len(self.edges)} edges. Give one edge more than there are bins."
            )
        pairs = (*self.promoted, *self.suppressed, *self.nearest)
        scores = [x.score for x in self.causes or ()]
        _check_finite(
            f"Feature {self.index}",
            (self.density, self.maximum, *self.edges, *(x for _, x in pairs), *scores),
        )

    @property
    def dead(self) -> bool:
        """Returns whether it was never on."""
        return not self.density > 0

    @property
    def fires(self) -> tuple[str, ...]:
        """Returns the tokens its examples peak at, each once, the strongest first."""
        examples = (x for band in self.bands for x in band.examples)
        return tuple(dict.fromkeys(x.tokens[x.peak] for x in examples))


@dataclass(frozen=True)
class Album:
    """The cards of a dictionary.

    Attributes:
      facts: about the dictionary and how it was made, `(what, value)`.
      site: the value in the model that the dictionary is of.
      model: its name.
      cards: of some or all features, in the order of their places.
    """

    facts: Sequence[tuple[str, str]]
    site: str
    model: str
    cards: Sequence[Card]

    def __post_init__(self) -> None:
        """Raises if two cards are of one feature, or they are out of order."""
        for before, after in pairwise(self.cards):
            if before.index >= after.index:
                raise ValueError(
                    f"The card of feature {after.index} comes after that of "
                    f"{before.index}. Sort the cards, one of each feature."
                )


def _check_finite(of: str, numbers: Iterable[float]) -> None:
    """Raises for a number that no page and no JSON can show."""
    for number in numbers:
        if not isfinite(number):
            raise ValueError(
                f"{of} has the number {number}. Find where it was computed: no "
                "activation, logit or score may be infinite or undefined."
            )
