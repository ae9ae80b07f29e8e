"""Does a ranking find what one knows to be there?

Planted passages, sequences with a keyword, labels that were flipped: wherever the
sequences one looks for are known, a ranking is judged by how many of them come first.
"""

import numpy as np
import xarray as xr

from influence.attribution.scores import summed


def recall(scores: xr.DataArray, wanted_N: np.ndarray, k: int) -> xr.DataArray:
    """Returns `(query,)`: the share of the wanted sequences among each query's top `k`.

    Of at most `k` wanted ones, so that one is the best there can be.

    Args:
      scores: `(query, train)`.
      wanted_N: which sequences are looked for.
      k: how many are looked at.

    Raises:
      ValueError: if none is wanted, or `k` is not 1 to the number of sequences.

    Example:
      >>> from influence.truth.detection import recall
      >>> going_up = np.array([name.startswith("up") for name in ids])
      >>> recall(scores.total, going_up, k=2).item()
      0.5
    """
    found = hits(scores, wanted_N, k)
    if not wanted_N.any():
        raise ValueError("No sequence is wanted, so none can be found. Mark some.")
    return found / min(k, int(wanted_N.sum()))


def hits(scores: xr.DataArray, wanted_N: np.ndarray, k: int) -> xr.DataArray:
    """Returns `(query,)`: how many of each query's top `k` sequences are wanted.

    Args:
      scores: `(query, train)`.
      wanted_N: which sequences are looked for, those with a keyword say.
      k: how many are looked at.

    Raises:
      ValueError: if `k` is not between 1 and the number of sequences.

    Example:
      >>> from influence.truth.detection import hits
      >>> has_one = np.array([1 in sequence for sequence in tokens])
      >>> hits(scores.total, has_one, k=3).item()
      3
    """
    if not 1 <= k <= len(wanted_N):
        raise ValueError(
            f"The top {k} of {len(wanted_N)} sequences can't be looked at. Ask for "
            f"1 to {len(wanted_N)}."
        )
    order = np.argsort(-scores.values, axis=1, kind="stable")[:, :k]
    return xr.DataArray(
        np.asarray(wanted_N)[order].sum(1),
        dims="query",
        coords={"query": scores["query"].values},
    )


def detected(own: xr.DataArray, wanted_N: np.ndarray) -> xr.DataArray:
    """Returns `(checked,)`: the share of the wanted among the first so many sequences.

    For mislabelled examples: looked at in the order of their self-influence, after how
    many are so many of them found (Koh & Liang 2017).

    Args:
      own: `(train,)` or `(train, layer)`, as `self_influence` returns it; or anything
        else that is large where a label is suspect.
      wanted_N: which sequences are mislabelled.

    Raises:
      ValueError: if none is.

    Example:
      >>> from influence.attribution.self_influence import self_influence
      >>> from influence.truth.detection import detected
      >>> own = self_influence(task, params, curvature, batches)
      >>> curve = detected(own, np.array([name == "pi" for name in ids]))
      >>> curve.sel(checked=1).item()
      1.0
    """
    if not wanted_N.any():
        raise ValueError("No sequence is wanted, so none can be found. Mark some.")
    total = summed(own)
    order = np.argsort(-total.values, kind="stable")
    return xr.DataArray(
        np.cumsum(np.asarray(wanted_N)[order]) / wanted_N.sum(),
        dims="checked",
        coords={"checked": np.arange(1, len(order) + 1)},
    )
