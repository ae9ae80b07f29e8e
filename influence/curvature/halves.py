"""How sure a fit is: the same fit to either half of the data.

Curvature is an average over sequences and sampled labels, so it has an error, and so
has every score. Two halves give two independent scores, `s₁` and `s₂`, of which the
whole data's is nearly the mean; its standard error is then about `|s₁ - s₂| / 2`. One
pair says little of one score, so the root mean square over all training sequences of a
query is what is reported.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from influence.types import Batch, Batches


@dataclass(frozen=True)
class Half:
    """Every other batch of some batches.

    Attributes:
      batches: all of them.
      second: whether to begin with the second.
    """

    batches: Batches
    second: bool

    @property
    def ids(self) -> Sequence[str]:
        """Returns the names of the half's examples."""
        names, found, start = list(self.batches.ids), [], 0
        for i, batch in enumerate(self.batches):
            real = int(np.asarray(batch.real_B).sum())
            if i % 2 == self.second:
                found += names[start : start + real]
            start += real
        return found

    def __len__(self) -> int:
        """Returns the number of batches."""
        return len(range(int(self.second), len(self.batches), 2))

    def __iter__(self) -> Iterator[Batch]:
        """Walks every other batch."""
        return islice(iter(self.batches), int(self.second), None, 2)


def halves(batches: Batches) -> tuple[Half, Half]:
    """Returns two halves of the data, batch by batch, to fit a curvature to each.

    Raises:
      ValueError: if there is only one batch.

    Example:
      >>> from influence.curvature.halves import halves
      >>> first, second = halves(examples.batches(5))
      >>> len(first.ids), len(second.ids)
      (5, 5)
    """
    if len(batches) < 2:
        raise ValueError(
            "One batch can't be halved. Cut the data into smaller batches, an even "
            "number of them if you can."
        )
    return Half(batches, False), Half(batches, True)
