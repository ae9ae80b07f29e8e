"""Is the model that is judged the one that retraining makes?

Retrained with everything it should be the model itself. Where the recipe is not quite
the one it was trained by, what is retrained is another model, which the scores are not
of. How far off it is matters beside what leaving sequences out changes.
"""

from typing import NamedTuple

import numpy as np
import xarray as xr


class Likeness(NamedTuple):
    """How far a model is from its retrained baseline, of each query.

    Attributes:
      off: by how much their measurements differ.
      spread: the standard deviation of the measurement over the subsets left out.
    """

    off: np.ndarray
    spread: np.ndarray

    @property
    def alike(self) -> bool:
        """Returns whether the baseline is nearer than the retrainings are spread."""
        return bool(np.median(self.off) <= np.median(self.spread))


def likeness(own_Q: np.ndarray, baseline_Q: np.ndarray, truth: xr.Dataset) -> Likeness:
    """Returns how far a model is from what retraining with everything ends in.

    Args:
      own_Q: what the model measures.
      baseline_Q: what a retraining with all weights one measures.
      truth: as `retrain` returns it.

    Example:
      >>> from influence.truth.likeness import likeness
      >>> from influence.truth.retraining import retrain, same_seed
      >>> training = train.Training(task, recipe, examples, lambda seed: start)
      >>> truth = retrain(training, same_seed(5, drop=0.2), measurements)
      >>> own = np.array([f(params) for f in measurements.values()])
      >>> likeness(own, own, truth).alike, likeness(own, own + 9, truth).alike
      (True, False)
    """
    spread_Q = truth.measured.mean("seed").std("subset", ddof=1).values
    return Likeness(np.abs(own_Q - baseline_Q), spread_Q)
