"""How alike the scores of two methods are."""

import numpy as np
import xarray as xr
from scipy import stats

Scores = xr.DataArray | np.ndarray
"""`(query, train)`."""


def compared(found: Scores, expected: Scores) -> dict[str, float]:
    """Returns how alike scores are: of all pairs, and ranked query by query."""
    x, y = (np.asarray(z, float) for z in (found, expected))
    each = [_ranked(a, b) for a, b in zip(x, y, strict=True)]
    return {
        "pearson": _correlation(x, y),
        "spearman": _ranked(x, y),
        "spearman, mean of queries": float(np.mean(each)),
        "spearman, worst query": float(np.min(each)),
        "slope": float((x * y).sum() / (y * y).sum()),
        "relative error": float(np.linalg.norm(x - y) / np.linalg.norm(y)),
    }


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x.ravel(), y.ravel())[0, 1])


def _ranked(x: np.ndarray, y: np.ndarray) -> float:
    return _correlation(*(stats.rankdata(z) for z in (x, y)))
