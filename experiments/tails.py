"""The tail of a distribution as a power law, and whether it is one.

    p(x) = (α - 1) / x_min · (x / x_min)^-α,   x ≥ x_min

By maximum likelihood, and by the distance between the two distribution functions that
samples of the law itself have (Clauset, Shalizi & Newman 2009, sections 3 and 4). Where
the tail begins is given, not fitted: at the least of the values one passes.
"""

from typing import NamedTuple

import numpy as np


class PowerLaw(NamedTuple):
    """A power law fitted to a tail.

    Attributes:
      exponent: `α`.
      error: its standard error.
      distance: Kolmogorov and Smirnov's, of the tail from the law.
      plausible: how often a sample of the law, fitted anew, is as far from its own; a
        law is ruled out where this is 0.1 or less.
    """

    exponent: float
    error: float
    distance: float
    plausible: float


def power_law(tail: np.ndarray, rng: np.random.Generator, draws: int = 500) -> PowerLaw:
    """Returns the power law of some values, all of them positive.

    Args:
      tail: the values, from where the tail begins; that is the least of them, which
        therefore says nothing about the exponent.
      rng: draws the samples.
      draws: how many.
    """
    logs = np.sort(np.log(tail / tail.min()))[1:]
    found = float(exponent(logs))
    # Of a power law, the logarithm is exponential.
    samples = np.sort(rng.exponential(1 / (found - 1), (draws, len(logs))), axis=1)
    far = float(distance(logs, np.array(found)))
    return PowerLaw(
        found,
        (found - 1) / np.sqrt(len(logs)),
        far,
        float((distance(samples, exponent(samples)) >= far).mean()),
    )


def exponent(logs: np.ndarray) -> np.ndarray:
    """Returns `1 + n / Σ log(x / x_min)`, of the logarithms, along the last axis."""
    return 1 + 1 / logs.mean(-1)


def distance(logs: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Returns how far the distribution of sorted logarithms is from the law's.

    The largest difference, on either side of every step of the empirical one.
    """
    law = -np.expm1(-(exponent[..., None] - 1) * logs)
    n = logs.shape[-1]
    after, before = np.arange(1, n + 1) / n, np.arange(n) / n
    return np.maximum(after - law, law - before).max(-1)


def top_share(values: np.ndarray, share: float) -> float:
    """Returns how much of the sum of positive values its largest have.

    Args:
      values: of any sign; the negative ones count among how many there are.
      share: which share of all values are the largest.
    """
    most = np.sort(values)[::-1][: max(1, round(share * len(values)))]
    positive = values[values > 0].sum()
    return float(most[most > 0].sum() / positive) if positive > 0 else float("nan")
