"""What of a corpus a scan looks at, and what it keeps: words and what they mean."""

from typing import NamedTuple

import numpy as np
import xarray as xr

from influence.runtime.run.job import GB

LARGEST = 4 * GB
"""How many bytes of scores by layer are kept if nothing is said."""


class Keep(NamedTuple):
    """What of the scores is kept.

    Attributes:
      layers: whether by layer, or only totals.
      top: of how many sequences of either sign a query; None for all.
    """

    layers: bool
    top: int | None = None


def keep_of(said: str | None, size: int) -> Keep:
    """Returns what is kept: as somebody says, or as there is room for.

    Args:
      said: `layers`, `totals` or `top:N`; None if nothing is.
      size: bytes of the scores by layer.

    Raises:
      ValueError: if the words mean nothing.
    """
    if said is None:
        return Keep(layers=size <= LARGEST)
    if said in ("layers", "totals"):
        return Keep(layers=said == "layers")
    word, _, count = said.partition(":")
    if word != "top" or not count.isdecimal() or int(count) < 1:
        raise ValueError(
            f"--keep {said} means nothing. Say `layers`, `totals` or `top:N`."
        )
    return Keep(layers=True, top=int(count))


def candidates_of(said: str | None) -> int | None:
    """Returns how many candidates a query has; None for all sequences.

    Raises:
      ValueError: if the words mean nothing.
    """
    if said is None:
        return None
    word, _, count = said.partition(":")
    if word != "bm25" or not count.isdecimal() or int(count) < 1:
        raise ValueError(f"--candidates {said} means nothing. Say `bm25:N`, N > 0.")
    return int(count)


def extremes(score: xr.DataArray, each: int) -> set[str]:
    """Returns the names of every query's highest and lowest sequences."""
    values = score.transpose("query", "train").values
    # What is not a number comes last in either order.
    ends = [np.argsort(x, axis=1, kind="stable")[:, :each] for x in (values, -values)]
    places = np.concatenate(ends, axis=1)
    kept = places[~np.isnan(np.take_along_axis(values, places, axis=1))]
    return {str(x) for x in score["train"].values[np.unique(kept)]}
