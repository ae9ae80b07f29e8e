"""Ground truth: what measurements are after training without some sequences.

A *protocol* says which sequences are left out and what else changes. Under the *same
seed* a retraining has the start, the batches and the denominators of the model that is
judged, only with some sequences' terms gone: deterministic, so that one percent can be
told from none. *Resampled*, half of the sequences are left out and several seeds are
averaged: what the data does to any model trained so, not to this one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jax import Array

from influence.attribution.measurements import Measurement, together
from influence.fold import Fold, Run, filled, run
from influence.model.train import Training

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class Protocol:
    """Which retrainings measurements are judged by.

    Attributes:
      name: in words.
      subsets: how many sets of sequences are left out.
      drop: which share of the sequences each set is.
      seeds: that every set is trained with.
      draw: the seed the sets are drawn by.

    Raises:
      ValueError: if nothing or everything would be left out, or there are not two sets.

    Example:
      >>> from influence.truth.retraining import same_seed
      >>> print(same_seed(subsets=3, drop=0.2).weights(10).sum(1))
      [8. 8. 8.]
    """

    name: str
    subsets: int
    drop: float
    seeds: tuple[int, ...]
    draw: int = 0

    def __post_init__(self) -> None:
        """Raises if nothing could be learned from the retrainings."""
        if not 0 < self.drop < 1:
            raise ValueError(
                f"A share between 0 and 1 of the sequences can be left out, not "
                f"{self.drop}."
            )
        if self.subsets < 2 or not self.seeds:
            raise ValueError(
                f"{self.subsets} subsets with {len(self.seeds)} seeds rank nothing. "
                "Take two subsets at least, and one seed."
            )

    def weights(self, n: int) -> np.ndarray:
        """Returns the weights of `n` sequences in every subset, `[M, N]`: 0 or 1."""
        rng, dropped = np.random.default_rng(self.draw), max(1, round(self.drop * n))
        weights = np.ones((self.subsets, n), np.float32)
        for row in weights:
            row[rng.choice(n, dropped, replace=False)] = 0
        return weights


def same_seed(
    subsets: int = 100, drop: float = 0.01, *, seed: int = 0, draw: int = 0
) -> Protocol:
    """Returns the deterministic protocol: nothing changes but what is left out."""
    return Protocol("same seed", subsets, drop, (seed,), draw)


def resampled(
    subsets: int = 100, drop: float = 0.5, *, repeats: int = 5, draw: int = 0
) -> Protocol:
    """Returns the protocol that averages over seeds, none of them the model's own 0."""
    return Protocol("resampled", subsets, drop, tuple(range(1, repeats + 1)), draw)


class Group(NamedTuple):
    """Retrainings that are done side by side.

    Attributes:
      weights_KxN: of each.
      seeds_K: of each.
    """

    weights_KxN: np.ndarray
    seeds_K: tuple[int, ...]


@dataclass(frozen=True)
class Groups:
    """All retrainings of a protocol, subset by subset, seed by seed, in groups."""

    protocol: Protocol
    sequences: int
    size: int

    def __len__(self) -> int:
        """Returns the number of groups."""
        return -(-self.protocol.subsets * len(self.protocol.seeds) // self.size)

    def __iter__(self) -> Iterator[Group]:
        """Walks the groups."""
        seeds = self.protocol.seeds
        weights = np.repeat(self.protocol.weights(self.sequences), len(seeds), axis=0)
        yield from grouped(weights, seeds * self.protocol.subsets, self.size)


def grouped(
    weights_MxN: np.ndarray, seeds_M: Sequence[int], size: int
) -> Iterator[Group]:
    """Yields retrainings in groups of a size."""
    for at in range(0, len(weights_MxN), size):
        part = slice(at, at + size)
        yield Group(weights_MxN[part], tuple(seeds_M[part]))


def retrain(
    training: Training,
    protocol: Protocol,
    measurements: Mapping[str, Measurement],
    *,
    at_once: int = 1,
    run: Run = run,
) -> "xr.Dataset":
    """Retrains without each subset, and measures.

    Args:
      training: how the model came to be.
      protocol: what is left out.
      measurements: by name.
      at_once: how many trainings side by side.
      run: carries out the pass over all retrainings; one that saves as it goes can be
        stopped.

    Returns:
      `measured`, `(subset, seed, query)`, in the measurements' unit, and `weight`,
      `(subset, train)`; the protocol in `attrs`.

    Example:
      >>> from influence.truth.retraining import retrain, same_seed
      >>> training = train.Training(task, recipe, examples, lambda seed: start)
      >>> truth = retrain(training, same_seed(3, drop=0.2), measurements)
      >>> dict(truth.measured.sizes)
      {'subset': 3, 'seed': 1, 'query': 1}
    """
    groups = Groups(protocol, len(training.examples), at_once)
    found = run(fold(training, protocol, measurements, at_once), groups)
    return labelled(protocol, training, list(measurements), found)


def fold(
    training: Training,
    protocol: Protocol,
    measurements: Mapping[str, Measurement],
    at_once: int,
) -> Fold:
    """Returns the pass over `Groups` that retrains and measures, `[retrainings, Q]`."""
    retrainings = protocol.subsets * len(protocol.seeds)
    return measuring(training, measurements, retrainings, at_once)


def measuring(
    training: Training,
    measurements: Mapping[str, Measurement],
    retrainings: int,
    at_once: int,
) -> Fold:
    """Returns the pass over groups of retrainings that measures, `[retrainings, Q]`."""
    values = jax.jit(jax.vmap(together(measurements.values())))

    def measured(group: Group) -> Array:
        return values(training.many(group.weights_KxN, group.seeds_K, at_once))

    return filled("retraining", measured, (retrainings, len(measurements)))


def labelled(
    protocol: Protocol, training: Training, names: list[str], found: np.ndarray
) -> "xr.Dataset":
    """Returns what retrainings measured, with the protocol."""
    import xarray as xr  # takes as long to import as all of the package

    shape = (protocol.subsets, len(protocol.seeds), len(names))
    n = len(training.examples)
    return xr.Dataset(
        {
            "measured": (("subset", "seed", "query"), found.reshape(shape)),
            "weight": (("subset", "train"), protocol.weights(n)),
        },
        coords={
            "seed": list(protocol.seeds),
            "query": names,
            "train": list(training.examples.ids),
        },
        attrs={
            "protocol": protocol.name,
            "drop": protocol.drop,
            "draw": protocol.draw,
        },
    )
