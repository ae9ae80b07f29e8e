"""The linear datamodelling score: do scores, added up, rank retrainings?

    LDS(query) = Spearman over subsets S of ( Σ_{n kept in S} score_n, f(θ_S) )

averaged over queries (Ilyas et al. 2022; Park et al. 2023).
"""

import numpy as np
import xarray as xr

from influence.truth.correlation import (
    RESAMPLES,
    Correlation,
    check_alike,
    correlate,
    ranked,
)


def lds(
    scores: xr.DataArray, truth: xr.Dataset, *, resamples: int = RESAMPLES
) -> Correlation:
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
    check_alike(scores, truth)
    values = truth.weight.values.astype(float) @ scores.values.astype(float).T
    return xr.DataArray(
        values, dims=("subset", "query"), coords={"query": truth["query"].values}
    )


def correlated(
    predicted: xr.DataArray, truth: xr.Dataset, *, resamples: int = RESAMPLES
) -> Correlation:
    """Returns how well some predictions, `(subset, query)`, rank retrainings."""
    measured = truth.measured.mean("seed").transpose("subset", "query")
    names = truth["query"].values
    return correlate(predicted.values, measured.values, names, ranked, resamples)


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
    found = ranked(np.stack(halves)[:, None])[0].mean()
    return float(np.sqrt(max(0.0, 2 * found / (1 + found))))
