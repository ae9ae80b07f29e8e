"""Is a ranking true? Take the sequences away, train again, and look.

A score says how much a measurement rises per added copy of a sequence, so removing a
set of sequences should change it by minus the sum of their scores. Here the sequences
are removed for real: weight zero, same start, same batches in the same order, same
denominators. Beside them as many random ones of the others, and as many that share the
query's words. For one query, more and more of them, sequences or single labels: a
curve.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import xarray as xr
from scipy import stats

from influence.attribution.measurements import Measurement, measure
from influence.fold import Run, run
from influence.model.train import Training
from influence.truth.correlation import check_alike
from influence.truth.retraining import grouped, measuring
from influence.types import Params

Train = Callable[[str, np.ndarray], Params]
"""`(name, weights_N) -> params`: trains with weights, under a name for who watches."""


class Removal(NamedTuple):
    """What removing a set of sequences did.

    Attributes:
      places: which sequences were removed.
      changes: of each query's measurement, by retraining, in the measurement's unit.
    """

    places: np.ndarray
    changes: np.ndarray


class Check(NamedTuple):
    """Predicted and measured changes of each query's measurement.

    Attributes:
      queries: their names.
      predicted: minus the sum of scores over the union of every query's top sequences.
      top: measured, that union removed.
      random: measured, as many random sequences of the others removed.
      bm25: measured, as many sequences removed that BM25 ranks highest.
    """

    queries: tuple[str, ...]
    predicted: np.ndarray
    top: Removal
    random: Removal
    bm25: Removal

    @property
    def same_sign(self) -> int:
        """Returns for how many queries prediction and measurement have one sign."""
        return int((np.sign(self.predicted) == np.sign(self.top.changes)).sum())

    @property
    def rank_correlation(self) -> float:
        """Returns Spearman's correlation of prediction and measurement over queries."""
        ranks = [stats.rankdata(x) for x in (self.predicted, self.top.changes)]
        return float(np.corrcoef(*ranks)[0, 1])

    @property
    def deviations(self) -> float:
        """Returns the median query's fall in standard deviations of random changes."""
        return float(-np.median(self.top.changes) / self.random.changes.std(ddof=1))


def check(
    train: Train,
    measurements: Mapping[str, Measurement],
    params: Params,
    scores: xr.DataArray,
    lexical: xr.DataArray,
    *,
    share: float = 0.01,
    seed: int = 0,
) -> Check:
    """Removes the top sequences of all queries together, and two sets to compare with.

    Trains three times.

    Args:
      train: trains with weights, as `params` was trained with all of them one.
      measurements: by name.
      params: the trained parameters.
      scores: `(query, train)`, in the measurements' unit per added copy.
      lexical: `(query, train)`, the lexical baseline's scores.
      share: which part of the sequences counts as a query's top.
      seed: of the random sequences.

    Raises:
      ValueError: if the three are of different queries or sequences, or fewer
        sequences would be left than are removed.

    Example:
      >>> from influence.truth.removal import check
      >>> words = influence.bm25({"3 after 1, 2": [1, 2, 3]}, tokens, ids)
      >>> found = check(trained, measurements, params, scores.total, words, share=0.1)
      >>> [ids[place] for place in found.top.places], found.same_sign
      (['up'], 1)
    """
    check_alike(scores, lexical)
    if list(measurements) != scores["query"].values.tolist():
        raise ValueError(
            f"Scores are of the queries {scores['query'].values.tolist()}, and what is "
            f"measured is {list(measurements)}. Give both in one order."
        )
    n = scores.sizes["train"]
    each = max(1, round(share * n))
    top = np.unique(np.argsort(-scores.values, axis=1, kind="stable")[:, :each])
    if 2 * len(top) > n:
        raise ValueError(
            f"The top {each} of {len(measurements)} queries together are {len(top)} of "
            f"{n} sequences: fewer would be left. Remove a smaller share than "
            f"{share:g}, or ask about fewer queries."
        )
    before = np.array([measure(f, params) for f in measurements.values()])
    words = np.fromiter(islice(by_rank(lexical), len(top)), int)
    others = np.setdiff1d(np.arange(n), top)
    chance = np.random.default_rng(seed).choice(others, len(top), replace=False)

    def without(name: str, places: np.ndarray) -> Removal:
        weights = np.ones(n, np.float32)
        weights[places] = 0
        retrained = train(name, weights)
        after = np.array([measure(f, retrained) for f in measurements.values()])
        return Removal(places, after - before)

    return Check(
        queries=tuple(measurements),
        predicted=-scores.values[:, top].sum(1),
        top=without("without the top sequences", top),
        random=without("without random sequences", chance),
        bm25=without("without BM25's sequences", words),
    )


def curve(
    training: Training,
    seed: int,
    measurement: Measurement,
    scores: xr.DataArray,
    counts: Sequence[int],
    *,
    lexical: xr.DataArray | None = None,
    draw: int = 0,
    at_once: int = 1,
    run: Run = run,
) -> xr.Dataset:
    """Removes more and more of what one query's scores rank first, and measures.

    And of random others, and of what BM25 ranks first. What is removed are sequences,
    or single labels: a sequence whose label is removed is read as it was, and the token
    not predicted any more. Trains once with everything, and once for each count and
    ranking.

    Args:
      training: how the model came to be.
      seed: of the training.
      measurement: the query.
      scores: of the query, in its unit per added copy: `(train,)`, or of every label,
        `(train, token)`, as `output_token_scores` shares them out.
      counts: how many are removed, ascending.
      lexical: the lexical baseline's, as the scores are.
      draw: the seed random ones are drawn by.
      at_once: how many trainings side by side.
      run: carries out the pass over all retrainings.

    Returns:
      `predicted`, minus the sum of scores, and `measured`, `(ranking, count)`: changes
      of the measurement; with the names of what is `removed`, `(ranking, rank)`, of a
      label with its `position`.

    Raises:
      ValueError: if fewer would be left than are removed, or scores are of others than
        the training's sequences or labels.

    Example:
      >>> from influence.truth.removal import curve
      >>> training = train.Training(task, recipe, examples, lambda seed: start)
      >>> ((name, asked),) = measurements.items()
      >>> words = influence.bm25({name: [1, 2, 3]}, tokens, ids).sel(query=name)
      >>> own = scores.total.sel(query=name)
      >>> found = curve(training, 0, asked, own, [1, 2], lexical=words)
      >>> found.removed.sel(ranking="top").values.tolist()[0]
      'up'
      >>> float(found.measured.sel(ranking="top", count=1)) < 0
      True
    """
    counted = _counted(training, scores)
    values = scores.values.ravel()
    orders = _orders(values, counted, counts[-1], draw)
    if lexical is not None:
        _counted(training, lexical)
        orders["bm25"] = _first(lexical.values.ravel(), counted, counts[-1])
    sets = [(), *(x[:count] for x in orders.values() for count in counts)]
    weights = np.ones((len(sets), *scores.shape), np.float32)
    for row, places in zip(weights.reshape(len(sets), -1), sets, strict=True):
        row[np.asarray(places, int)] = 0
    groups = list(grouped(weights, (seed,) * len(sets), at_once))
    asked = {"query": measurement}
    before, *after = run(measuring(training, asked, len(sets), at_once), groups)[:, 0]
    order_RxK = np.stack([*orders.values()])
    totals_RxK = np.cumsum(values[order_RxK], axis=1)
    shape = (len(orders), len(counts))
    which_RxK, *where_RxK = np.unravel_index(order_RxK, scores.shape)
    found = xr.Dataset(
        {
            "predicted": (("ranking", "count"), -totals_RxK[:, np.array(counts) - 1]),
            "measured": (("ranking", "count"), np.reshape(after, shape) - before),
        },
        coords={
            "ranking": list(orders),
            "count": list(counts),
            "removed": (("ranking", "rank"), scores["train"].values[which_RxK]),
        },
    )
    for position_RxK in where_RxK:
        found = found.assign_coords(position=(("ranking", "rank"), position_RxK))
    return found


def _counted(training: Training, scores: xr.DataArray) -> np.ndarray:
    """Returns which of what was scored the training counts, flat.

    Raises:
      ValueError: if it was not the training's sequences or labels.
    """
    labels = np.asarray(training.task.counts(training.data))
    counted = labels if scores.ndim == 2 else np.ones(len(labels), bool)
    if scores.shape != counted.shape:
        raise ValueError(
            f"The scores are of {scores.shape}, and the training has {counted.shape} "
            f"{'labels' if scores.ndim == 2 else 'sequences'}. Score all of them."
        )
    return counted.ravel()


def _orders(
    scores_N: np.ndarray, counted_N: np.ndarray, most: int, draw: int
) -> dict[str, np.ndarray]:
    """Returns the places that are removed, in their order, by ranking."""
    n = int(counted_N.sum())
    if 2 * most > n:
        raise ValueError(
            f"{most} of {n} can't be removed and compared with as many others. Remove "
            f"{n // 2} at most."
        )
    top = _first(scores_N, counted_N, most)
    others = np.setdiff1d(np.flatnonzero(counted_N), top)
    random = np.random.default_rng(draw).choice(others, most, replace=False)
    return {"top": top, "random": random}


def _first(scores_N: np.ndarray, counted_N: np.ndarray, most: int) -> np.ndarray:
    """Returns the highest of what is counted."""
    places = np.flatnonzero(counted_N)
    return places[np.argsort(-scores_N[places], kind="stable")[:most]]


def by_rank(scores: xr.DataArray) -> Iterator[int]:
    """Yields every sequence once: all queries' first, all their second, and so on."""
    order = np.argsort(-scores.values, axis=1, kind="stable")
    yield from dict.fromkeys(int(i) for i in order.T.ravel())
