"""The linear datamodelling score: do scores, added up, rank retrainings?

    LDS(query) = Spearman over subsets S of ( Σ_{n kept in S} score_n, f(θ_S) )

averaged over queries (Ilyas et al. 2022; Park et al. 2023). Subsets are a sample, so
every score comes with a bootstrap interval over them; methods are compared on the same
resamples, for most of what varies between subsets is common to all methods.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xarray as xr
from scipy import stats

RESAMPLES = 2000
"""How many bootstrap samples of the subsets an interval is made from."""


class Interval(NamedTuple):
    """A mean over queries, and where 95 % of bootstrap samples have it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Returns the value and its interval."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class LDS:
    """How well some scores predict retrainings.

    Attributes:
      each: `(query,)`, the rank correlation over all subsets.
      samples: of the mean over queries, one for each bootstrap sample of the subsets.
    """

    each: xr.DataArray
    samples: np.ndarray

    @property
    def interval(self) -> Interval:
        """Returns the mean over queries with its 95 % interval."""
        return _interval(float(self.each.mean()), self.samples)

    def __sub__(self, other: "LDS") -> Interval:
        """Returns the difference of the means, on the same bootstrap samples.

        Raises:
          ValueError: if the two are of different queries or samples.
        """
        self._check(other)
        value = float((self.each - other.each).mean())
        return _interval(value, self.samples - other.samples)

    def __truediv__(self, other: "LDS") -> Interval:
        """Returns the ratio of the means, on the same bootstrap samples.

        Raises:
          ValueError: if the two are of different queries or samples.
        """
        self._check(other)
        value = float(self.each.mean() / other.each.mean())
        return _interval(value, self.samples / other.samples)

    def _check(self, other: "LDS") -> None:
        if len(self.samples) != len(other.samples) or not np.array_equal(
            self.each["query"], other.each["query"]
        ):
            raise ValueError(
                f"Scores of {self.each.sizes['query']} queries and {len(self.samples)} "
                f"samples can't be compared with those of {other.each.sizes['query']} "
                f"and {len(other.samples)}: judge both on the same retrainings."
            )


def lds(scores: xr.DataArray, truth: xr.Dataset, *, resamples: int = RESAMPLES) -> LDS:
    """Returns how well scores predict retrainings.

    Args:
      scores: `(query, train)`, in any unit; positive raises the measurement.
      truth: as `retrain` returns it; seeds are averaged over.
      resamples: how many bootstrap samples of the subsets.

    Raises:
      ValueError: if scores and truth are of different queries or sequences.

    Example:
      >>> from influence.truth.lds import lds
      >>> from influence.truth.retraining import retrain, same_seed
      >>> training = train.Training(task, recipe, examples, lambda seed: start)
      >>> truth = retrain(training, same_seed(20, drop=0.2), measurements)
      >>> lds(scores.total, truth).interval.value > 0.5
      True
    """
    return correlated(predicted(scores, truth), truth, resamples=resamples)


def predicted(scores: xr.DataArray, truth: xr.Dataset) -> xr.DataArray:
    """Returns `(subset, query)`: the sum of scores over the sequences that are kept.

    Raises:
      ValueError: if scores and truth are of different queries or sequences.
    """
    for axis in ("query", "train"):
        if not np.array_equal(scores[axis].values, truth[axis].values):
            raise ValueError(
                f"Scores and retrainings have different names along {axis!r}: "
                f"{scores.sizes[axis]} and {truth.sizes[axis]} of them. Judge scores "
                "of all training sequences and of the queries that were measured."
            )
    values = truth.weight.values.astype(float) @ scores.values.astype(float).T
    return xr.DataArray(
        values, dims=("subset", "query"), coords={"query": truth["query"].values}
    )


def correlated(
    predicted: xr.DataArray, truth: xr.Dataset, *, resamples: int = RESAMPLES
) -> LDS:
    """Returns how well some predictions, `(subset, query)`, rank retrainings."""
    measured = truth.measured.mean("seed").values.astype(float)
    pair = np.stack([predicted.values, measured])
    each = xr.DataArray(
        _spearman(pair[:, None])[0],
        dims="query",
        coords={"query": truth["query"].values},
    )
    # The same samples for everything judged on as many subsets.
    rng, m = np.random.default_rng(0), len(measured)
    samples = [
        _spearman(pair[:, rng.integers(m, size=(min(100, resamples - at), m))]).mean(1)
        for at in range(0, resamples, 100)
    ]
    return LDS(each, np.concatenate(samples))


def ceiling(truth: xr.Dataset) -> float:
    """Returns the truth's own reliability: what noise leaves for any score to reach.

    The rank correlation of the means over either half of the seeds, corrected to all
    of them (Spearman–Brown); its root bounds an LDS in expectation. Of retrainings with
    one seed, which are deterministic, one.
    """
    seeds = truth.sizes["seed"]
    if seeds == 1:
        return 1.0
    halves = [
        truth.measured.isel(seed=slice(i, None, 2)).mean("seed").values.astype(float)
        for i in range(2)
    ]
    found = _spearman(np.stack(halves)[:, None])[0].mean()
    return float(np.sqrt(max(0.0, 2 * found / (1 + found))))


def _spearman(pair: np.ndarray) -> np.ndarray:
    """Returns rank correlations along the subsets, `[2, S, M, Q] -> [S, Q]`."""
    ranks = stats.rankdata(pair, axis=2)
    ranks -= ranks.mean(2, keepdims=True)
    norms = np.sqrt((ranks**2).sum(2)).prod(0)
    products = (ranks[0] * ranks[1]).sum(1)
    # Scores that are all alike rank nothing.
    return np.where(norms > 0, products / np.where(norms > 0, norms, 1), 0)


def _interval(value: float, samples: np.ndarray) -> Interval:
    low, high = np.quantile(samples, [0.025, 0.975])
    return Interval(value, float(low), float(high))
