"""The corpus without what a ranking names, or with more or less of it.

For retraining elsewhere: rows go in as they are (an id and whatever else) and come out
fewer, or with a `weight`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import xarray as xr

Row = Mapping[str, Any]
"""One training sequence: its `id`, and whatever else belongs to it."""


def without(rows: Iterable[Row], scores: xr.DataArray, *, each: int) -> Iterator[Row]:
    """Returns the rows but for the `each` highest-scoring of every query.

    Args:
      rows: the corpus, in any order.
      scores: `(query, train)` or `(train,)`.
      each: how many a query.

    Raises:
      ValueError: if a row has no score.

    Example:
      >>> from influence.attribution.corpus import without
      >>> rows = [{"id": name, "tokens": texts[name]} for name in ids]
      >>> [row["id"] for row in without(rows, scores.total, each=7)]
      ['threes', 'pi', 'e']
    """
    named = _top(scores, each)
    return (row for row in _known(rows, scores) if row["id"] not in named)


def reweighted(
    rows: Iterable[Row], scores: xr.DataArray, *, weight: float, share: float = 0.01
) -> Iterator[Row]:
    """Returns all rows with a `weight`, that of the highest-scoring share changed.

    Args:
      rows: the corpus, in any order.
      scores: `(query, train)` or `(train,)`.
      weight: of the share that scores highest for any query; others have one.
      share: which part of the corpus counts as a query's highest.

    Raises:
      ValueError: if a row has no score.

    Example:
      >>> from influence.attribution.corpus import reweighted
      >>> rows = [{"id": name, "tokens": texts[name]} for name in ids]
      >>> more = reweighted(rows, scores.total, weight=2.0, share=0.1)
      >>> [row["id"] for row in more if row["weight"] == 2.0]
      ['up']
    """
    named = _top(scores, max(1, round(share * scores.sizes["train"])))
    return (
        {**row, "weight": weight if row["id"] in named else 1.0}
        for row in _known(rows, scores)
    )


def _top(scores: xr.DataArray, each: int) -> set[str]:
    values = np.atleast_2d(scores.values)
    places = np.argsort(-values, axis=1, kind="stable")[:, :each]
    return set(scores["train"].values[places.ravel()].tolist())


def _known(rows: Iterable[Row], scores: xr.DataArray) -> list[Row]:
    rows, ids = list(rows), set(scores["train"].values.tolist())
    for row in rows:
        if row["id"] not in ids:
            raise ValueError(
                f"There is no score for {row['id']!r}. Scan the corpus that is written."
            )
    return rows
