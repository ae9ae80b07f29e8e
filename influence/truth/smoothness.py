"""Whether training is a smooth function of its data: can derivatives predict it?

    Σ_j d_j sign(θ(h) - θ(0))_j sign(θ(2h) - θ(h))_j,   d = |θ(2h) - θ(0)| / |…|₁

the *metasmoothness* of training in a random direction of its weights (Engstrom et al.
2025): one if every parameter goes on as it began, zero if what it does next is chance.
Influence of any kind means something where it is near one.
"""

import jax
import numpy as np

from influence.model.train import Training


def metasmoothness(
    training: Training, seed: int, *, step: float = 0.05, directions: int = 3
) -> float:
    """Returns the mean metasmoothness over some directions.

    Trains three times for each direction.

    Args:
      training: how the model came to be.
      seed: of the training.
      step: `h`, by how much a sequence's weight changes, in standard deviations of a
        normal distribution.
      directions: how many.

    Example:
      >>> from influence.truth.smoothness import metasmoothness
      >>> training = train.Training(task, recipe, examples, lambda seed: start)
      >>> metasmoothness(training, 0, directions=1) > 0.8
      True
    """
    n, rng = len(training.examples), np.random.default_rng(0)
    found = []
    for _ in range(directions):
        v_N = rng.normal(size=n)
        weights = np.stack([np.ones(n) + k * step * v_N for k in range(3)])
        stacked = training.many(weights, [seed] * 3)
        leaves = [np.asarray(x, float) for x in jax.tree.leaves(stacked)]
        at = np.concatenate([x.reshape(3, -1) for x in leaves], axis=1)
        share = np.abs(at[2] - at[0])
        along = np.sign(at[1] - at[0]) * np.sign(at[2] - at[1])
        found.append((share / share.sum() * along).sum())
    return float(np.mean(found))
