"""Scores divided by what makes some sequences score high whatever is asked.

Every transformation says what it did in the scores' `attrs`, and raises if what it is
handed was not made with the same curvature and damping. Sums of normalised scores
predict nothing; their rankings are for reading.
"""

import numpy as np
import xarray as xr

from influence.attribution.scores import check_alike


def relatif(scores: xr.DataArray, own: xr.DataArray) -> xr.DataArray:
    """Returns scores divided by the root of each sequence's influence on itself.

    `ℓ`-RelatIF (Barshan et al. 2020): the most influence for a bounded
    change of the model's predictions, so that outliers no longer top every ranking.

    Args:
      scores: `(query, train)`.
      own: `(train, layer)` or `(train,)`, as `self_influence` returns it.

    Raises:
      ValueError: if the two were made with different curvatures or dampings, or a
        sequence has no influence on itself.

    Example:
      >>> from influence.attribution.normalise import relatif
      >>> from influence.attribution.self_influence import self_influence
      >>> own = self_influence(task, params, curvature, batches)
      >>> relatif(scores.total, own).attrs["unit"]
      'nats per root of own influence'
    """
    check_alike([scores, own])
    divided = scores / np.sqrt(_positive(own))
    return _about(divided, scores, "ℓ-RelatIF", "nats per root of own influence")


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
    norms = np.sqrt(_positive(own) * scores["self"] / scores.attrs["n_train"])
    return _about(scores / norms, scores, "unit norm", "cosine")


def _positive(own: xr.DataArray) -> xr.DataArray:
    total = own.sum("layer") if "layer" in own.dims else own
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
