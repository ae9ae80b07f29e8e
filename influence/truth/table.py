"""The table of methods: how well the scores of each predict retraining."""

from collections.abc import Mapping
from typing import NamedTuple

import xarray as xr

from influence.truth.lds import lds

REFERENCE = "cg"
"""The method others are compared with; the first one if it is not judged."""


class Row(NamedTuple):
    """A method under a protocol.

    Attributes:
      method: its name.
      needs: what of the training it looks at.
      protocol: what retraining changes.
      lds: the linear datamodelling score, with its 95 % interval.
      low: see `lds`.
      high: see `lds`.
      difference: from that of the reference, on the same bootstrap samples.
      difference_low: see `difference`.
      difference_high: see `difference`.
      seconds: that the scores took.
      megabytes: of memory at most meanwhile; None where the system does not tell.
    """

    method: str
    needs: str
    protocol: str
    lds: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    seconds: float
    megabytes: float | None


def rows(
    scores: Mapping[str, xr.DataArray], needs: Mapping[str, str], truth: xr.Dataset
) -> list[Row]:
    """Returns the rows of some methods, the best first.

    Args:
      scores: of each method, `(query, train)`, with what they cost in `attrs`:
        `seconds` and, if known, `megabytes`.
      needs: what each method needs.
      truth: as `retrain` returns it.

    Raises:
      ValueError: if scores and truth are of different queries or sequences.
    """
    judged = {name: lds(x, truth) for name, x in scores.items()}
    reference = judged.get(REFERENCE) or next(iter(judged.values()))
    found = [
        Row(
            name,
            needs[name],
            truth.attrs["protocol"],
            *x.interval,
            *(x - reference),
            scores[name].attrs["seconds"],
            scores[name].attrs.get("megabytes"),
        )
        for name, x in judged.items()
    ]
    return sorted(found, key=lambda x: -x.lds)
