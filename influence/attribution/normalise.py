"""Scores divided by what makes some sequences score high whatever is asked.

Every transformation says what it did in the scores' `attrs`, and raises if what it is
handed was not made with the same curvature and damping. Sums of normalised scores
predict nothing; their rankings are for reading.
"""

import numpy as np
import xarray as xr

from influence.attribution.scores import PER_COPY, check_alike, summed


def relatif(scores: xr.DataArray, own: xr.DataArray) -> xr.DataArray:
    """Returns scores divided by the root of each sequence's influence on itself.

    `ℓ`-RelatIF (Barshan et al. 2020): the most influence for a bounded
    change of the model's predictions, so that outliers no longer top every ranking.

    Args:
      scores: `(query, train)`.
      own: `(train, layer)` or `(train,)`, as `self_influence` returns it.

    Raises:
      ValueError: if the two were made with different curvatures or dampings, or there
        is no influence of a sequence on itself, or it is zero.

    Example:
      >>> from influence.attribution.normalise import relatif
      >>> from influence.attribution.self_influence import self_influence
      >>> own = self_influence(task, params, curvature, batches)
      >>> relatif(scores.total, own).attrs["unit"]
      'nats per root of own influence'
    """
    check_alike([scores, own])
    divided = scores / np.sqrt(_positive(own, scores))
    unit = scores.attrs["unit"].replace(PER_COPY, "per root of own influence")
    return _about(divided, scores, "ℓ-RelatIF", unit)


def unit(scores: xr.DataArray, own: xr.DataArray) -> xr.DataArray:
    """Returns cosines: both gradients of length one under the inverse curvature.

    Args:
      scores: `(query, train)`, with each query's own product `self` among its
        coordinates, as `scan` returns it.
      own: `(train, layer)` or `(train,)`, as `self_influence` returns it.

    Raises:
      ValueError: as `relatif` does.

    Example:
      >>> from influence.attribution.normalise import unit
      >>> from influence.attribution.self_influence import self_influence
      >>> own = self_influence(task, params, curvature, batches)
      >>> bool((abs(unit(scores.total, own)) <= 1).all())
      True
    """
    check_alike([scores, own])
    total = _positive(own, scores)
    norms = np.sqrt(total * scores["self"] / scores.attrs["n_train"])
    return _about(scores / norms, scores, "unit norm", "cosine")


def _positive(own: xr.DataArray, scores: xr.DataArray) -> xr.DataArray:
    """Returns the influence of the scored sequences on themselves."""
    missing = np.setdiff1d(scores["train"].values, own["train"].values)
    if len(missing):
        raise ValueError(
            f"There is no influence on itself of {len(missing)} of "
            f"{scores.sizes['train']} sequences, as {str(missing[0])!r}. Compute "
            "`self_influence` of all that are scored."
        )
    total = summed(own).sel(train=scores["train"].values)
    if not (total > 0).all():
        worst = str(total["train"].values[int(np.argmin(total.values))])
        raise ValueError(
            f"Sequence {worst!r} has no influence on itself, so nothing can be divided "
            "by it. Leave it out."
        )
    return total


def _about(
    found: xr.DataArray, scores: xr.DataArray, what: str, unit: str
) -> xr.DataArray:
    found.attrs = {**scores.attrs, "unit": unit, "normalisation": what}
    return found.rename(scores.name)
