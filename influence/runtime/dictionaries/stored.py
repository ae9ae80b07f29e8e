"""A dictionary, and what is known of where it belongs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np

from influence.interpret.dictionary import Dictionary


@dataclass(frozen=True)
class About:
    """What is known of a dictionary beside its numbers.

    Attributes:
      site: the address of what it reads, such as `resid.2`.
      writes: the address of what a transcoder stands in for; None of an autoencoder.
      model: name or place of the model.
      model_digest: a SHA-256 by which we know the model; None in others' dictionaries.
      kind: of the training, such as `batchtopk`; what is stored may be another.
      context: how many tokens the sequences had that it was trained on.
      facts: all else that was said of it, as JSON has it; and `sparsity`, an array of
        how often features are on, decimal logarithms, if it came along.
    """

    site: str
    writes: str | None = None
    model: str = ""
    model_digest: str | None = None
    kind: str = ""
    context: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """A dictionary as it is kept.

    Attributes:
      dictionary: the numbers.
      about: where they belong.
    """

    dictionary: Dictionary
    about: About

    def check_fits(
        self, *, reads: int, writes: int | None = None, digest: str | None = None
    ) -> None:
        """Raises unless it is of a model.

        Args:
          reads: how many numbers the model's site holds at a position.
          writes: how many that has which it stands in for; `reads` if left out.
          digest: the model's, compared if both are known.

        Raises:
          ValueError: saying what differs.
        """
        about, written = self.about, reads if writes is None else writes
        sides = (
            ("reads", about.site, self.dictionary.reads, reads),
            ("writes", about.writes or about.site, self.dictionary.writes, written),
        )
        for verb, site, own, found in sides:
            if own != found:
                raise ValueError(
                    f"The dictionary {verb} {own} numbers at {site}, where the model "
                    f"has {found}. Give the model that it is of"
                    f"{f', {about.model}' if about.model else ''}, or another "
                    "dictionary."
                )
        if None not in (digest, about.model_digest) and digest != about.model_digest:
            raise ValueError(
                f"The dictionary was trained on {about.model}, a model of the digest "
                f"{str(about.model_digest)[:12]}…, and this model has "
                f"{str(digest)[:12]}…. Give the weights and the type it was trained "
                "on, or train a dictionary for these."
            )


def plain(x: Any) -> Any:
    """Returns a fact as JSON has it; a number that is not finite is null."""
    if isinstance(x, Mapping):
        return {str(k): plain(y) for k, y in x.items()}
    if isinstance(x, list | tuple):
        return [plain(y) for y in x]
    if isinstance(x, np.generic | np.ndarray):
        return plain(x.tolist())
    if x is None or isinstance(x, str | bool | int):
        return x
    if isinstance(x, float):
        return x if isfinite(x) else None
    raise ValueError(
        f"A fact is {x!r}, a {type(x).__name__}, which JSON has no word for. Give "
        "numbers, text, lists and mappings of them."
    )
