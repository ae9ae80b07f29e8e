"""Choosing a damping by agreement with what is known exactly on a few queries."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy import stats

from influence.linalg.damping import Damping


@dataclass(frozen=True)
class Selected:
    """The damping that agrees best.

    Attributes:
      damping: that one.
      agreement: of every damping tried, the mean rank correlation over queries.
    """

    damping: Damping
    agreement: Mapping[Damping, float]

    def __str__(self) -> str:
        """Returns a table of what was tried."""
        lines = [
            f"  {value:.3f}  {damping}{'  *' if damping == self.damping else ''}"
            for damping, value in self.agreement.items()
        ]
        return "\n".join(["agreement  damping", *lines])


def select_damping(
    dampings: Sequence[Damping],
    scored: Callable[[Damping], xr.DataArray],
    exact: xr.DataArray,
) -> Selected:
    """Chooses the damping whose scores rank sequences most as exact influence does.

    Args:
      dampings: to choose from.
      scored: `damping -> scores`, `(query, train)`.
      exact: `(query, train)` of the same queries and sequences: metagradients, or
        proximal Bregman responses. A few queries do.

    Raises:
      ValueError: if there are no dampings, or scores are of other sequences.

    Example:
      >>> from influence.attribution.metagradients import metagradients
      >>> from influence.truth.selection import select_damping
      >>> smooth = train.Recipe(100, 5, 0.03, train.AdamW(root=1e-8))
      >>> training = train.Training(task, smooth, examples, lambda seed: start)
      >>> def scored(damping):
      ...     solver = influence.Eigenbasis(damping)
      ...     asked = influence.query(curvature, params, measurements, solver=solver)
      ...     return influence.scan(task, params, asked, batches).total
      >>> exact = metagradients(training, 0, measurements)
      >>> dampings = [influence.Relative(x) for x in (0.01, 0.1, 1.0)]
      >>> select_damping(dampings, scored, exact).damping in dampings
      True
    """
    if not dampings:
        raise ValueError("There are no dampings to choose from: name at least one.")
    agreement = {x: _agreement(scored(x), exact) for x in dampings}
    return Selected(max(agreement, key=lambda x: agreement[x]), agreement)


def _agreement(scores: xr.DataArray, exact: xr.DataArray) -> float:
    for axis in ("query", "train"):
        if not np.array_equal(scores[axis].values, exact[axis].values):
            raise ValueError(
                f"Scores and exact influence have different names along {axis!r}. "
                "Compute both for the same queries and sequences."
            )
    pairs = zip(scores.values, exact.values, strict=True)
    return float(np.mean([_spearman(x, y) for x, y in pairs]))


def _spearman(x_N: np.ndarray, y_N: np.ndarray) -> float:
    return float(np.corrcoef(stats.rankdata(x_N), stats.rankdata(y_N))[0, 1])
