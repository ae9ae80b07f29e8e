"""How well predictions agree with what was measured, query by query.

What was measured is a sample, of subsets or of sequences, so every correlation comes
with a bootstrap interval; methods are compared on the same resamples, for most of what
varies in a sample is common to all methods.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xarray as xr
from scipy import stats

RESAMPLES = 2000
"""How many bootstrap samples an interval is made from."""

AT_ONCE = 100
"""How many of them are in memory together."""


class Interval(NamedTuple):
    """A mean over queries, and where 95 % of bootstrap samples have it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Returns the value and its interval."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Correlation:
    """How well some predictions agree with what was measured.

    Attributes:
      each: `(query,)`, the correlation over everything that was measured.
      samples: of the mean over queries, one for each bootstrap sample of what was
        measured.
    """

    each: xr.DataArray
    samples: np.ndarray

    @property
    def interval(self) -> Interval:
        """Returns the mean over queries with its 95 % interval."""
        return _interval(float(self.each.mean()), self.samples)

    def __sub__(self, other: "Correlation") -> Interval:
        """Returns the difference of the means, on the same bootstrap samples.

        Raises:
          ValueError: if the two are of different queries or samples.
        """
        self._check(other)
        value = float((self.each - other.each).mean())
        return _interval(value, self.samples - other.samples)

    def __truediv__(self, other: "Correlation") -> Interval:
        """Returns the ratio of the means, on the same bootstrap samples.

        Raises:
          ValueError: if the two are of different queries or samples.
        """
        self._check(other)
        value = float(self.each.mean() / other.each.mean())
        return _interval(value, self.samples / other.samples)

    def _check(self, other: "Correlation") -> None:
        if len(self.samples) != len(other.samples) or not np.array_equal(
            self.each["query"], other.each["query"]
        ):
            raise ValueError(
                f"Scores of {self.each.sizes['query']} queries and {len(self.samples)} "
                f"samples can't be compared with those of {other.each.sizes['query']} "
                f"and {len(other.samples)}: judge both on the same truth."
            )


def pearson(
    predicted: xr.DataArray, measured: xr.DataArray, *, resamples: int = RESAMPLES
) -> Correlation:
    """Returns the correlation of two arrays `(query, train)` along `train`.

    Of a query with one number for all sequences it is 0.

    Raises:
      ValueError: if the two are of different queries or sequences, or not finite.

    Example:
      >>> from influence.truth.correlation import pearson
      >>> round(pearson(scores.total, 2 * scores.total).interval.value, 6)
      1.0
    """
    check_alike(predicted, measured)
    x, y = (x.transpose("train", "query").values for x in (predicted, measured))
    return correlate(x, y, measured["query"].values, linear, resamples)


def check_alike(predicted: xr.DataArray, measured: xr.DataArray | xr.Dataset) -> None:
    """Raises unless both are of the same queries and sequences.

    Raises:
      ValueError: if not.
    """
    for axis in ("query", "train"):
        if not np.array_equal(predicted[axis].values, measured[axis].values):
            raise ValueError(
                f"What is to be compared has different names along {axis!r}: "
                f"{predicted.sizes[axis]} and {measured.sizes[axis]} of them. Give "
                "both for the same queries and training sequences, in one order."
            )


def correlate(
    predicted_MxQ: np.ndarray,
    measured_MxQ: np.ndarray,
    names: np.ndarray,
    kind: Callable[[np.ndarray], np.ndarray],
    resamples: int = RESAMPLES,
) -> Correlation:
    """Returns the correlations of queries, with bootstrap samples of their mean.

    Args:
      predicted_MxQ: by what was measured, and query.
      measured_MxQ: the same.
      names: of the queries.
      kind: `[2, S, M, Q] -> [S, Q]`, a correlation along `M`; 0 where either is all
        alike, which tells nothing.
      resamples: how many bootstrap samples.

    Raises:
      ValueError: if what is predicted or measured is not finite, naming the query.
    """
    both = {"predicted": predicted_MxQ, "measured": measured_MxQ}
    for what, values_MxQ in both.items():
        bad_Q = (~np.isfinite(values_MxQ)).sum(0)
        if bad_Q.any():
            worst = int(bad_Q.argmax())
            raise ValueError(
                f"Of query {str(names[worst])!r}, {bad_Q[worst]} of "
                f"{len(values_MxQ)} numbers that were {what} are not finite, and tell "
                "nothing of the others. Leave out what they are of."
            )
    pair = np.stack([predicted_MxQ, measured_MxQ]).astype(float)
    each = xr.DataArray(kind(pair[:, None])[0], {"query": names}, ["query"])
    # The same samples for everything judged on as much.
    rng, m = np.random.default_rng(0), len(predicted_MxQ)
    samples = [
        kind(pair[:, rng.integers(m, size=(min(AT_ONCE, resamples - at), m))]).mean(1)
        for at in range(0, resamples, AT_ONCE)
    ]
    return Correlation(each, np.concatenate(samples))


def linear(pair: np.ndarray) -> np.ndarray:
    """Returns Pearson's correlations along `M`, `[2, S, M, Q] -> [S, Q]`."""
    return _cosines(pair - pair.mean(2, keepdims=True))


def ranked(pair: np.ndarray) -> np.ndarray:
    """Returns Spearman's rank correlations along `M`, `[2, S, M, Q] -> [S, Q]`."""
    return linear(stats.rankdata(pair, axis=2))


def _cosines(centred: np.ndarray) -> np.ndarray:
    norms = np.sqrt((centred**2).sum(2)).prod(0)
    found = (centred[0] * centred[1]).sum(1)
    # What is all alike tells nothing.
    return np.where(norms > 0, found / np.where(norms > 0, norms, 1), 0)


def _interval(value: float, samples: np.ndarray) -> Interval:
    low, high = np.quantile(samples, [0.025, 0.975])
    return Interval(value, float(low), float(high))
