"""Scores that say what they are."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

PER_COPY = "per added copy"
UNIT = f"nats {PER_COPY}"
SIGN = "positive: adding the sequence raises the measurement; removing it lowers it"

SAME = ("layers", "solver", "damping", "curvature", "curvature_sequences", "n_train")
"""What must be the same of scores that are combined."""


class Ranked(NamedTuple):
    """One training sequence in a ranking."""

    id: str
    score: float


@dataclass(frozen=True)
class Ranking:
    """The sequences one query ranks highest, or lowest."""

    query: str
    unit: str
    ranked: tuple[Ranked, ...]

    def __iter__(self) -> Iterator[Ranked]:
        """Walks the sequences, the most extreme first."""
        return iter(self.ranked)

    def __str__(self) -> str:
        """Returns a table."""
        lines = [f"  {x.score:+.4g}  {x.id}" for x in self.ranked]
        return "\n".join([f"{self.query} ({self.unit})", *lines])


class Rankings(tuple[Ranking, ...]):
    """A ranking for each query."""

    def __str__(self) -> str:
        """Returns a table a query."""
        return "\n\n".join(str(x) for x in self)


@dataclass(frozen=True)
class Scores:
    """The influence of every training sequence on every query, through every layer.

    Attributes:
      layers: `(query, train, layer)`. What they are travels in `attrs`: unit, sign, how
        many training sequences (`n_train`), damping, curvature.

    Example:
      >>> scores.layers.attrs["unit"], scores.layers.attrs["n_train"]
      ('nats per added copy', 10)
      >>> by_layer = scores.layers.sel(query="3 after 1, 2", train="up")
      >>> by_layer.idxmax("layer").item()
      'block.mlp.down'
    """

    layers: "xr.DataArray"

    @property
    def total(self) -> "xr.DataArray":
        """Returns `(query, train)`: the sum over layers.

        Of a sequence whose gradient is not finite in a layer it is not either.

        Example:
          >>> scores.total.dims
          ('query', 'train')
          >>> scores.total.idxmax("train").item()
          'up'
        """
        return summed(self.layers).rename("score")

    def top(self, k: int) -> Rankings:
        """Returns each query's `k` most positive sequences, the highest first.

        Example:
          >>> (ranking,) = scores.top(1)
          >>> ranking.query, [ranked.id for ranked in ranking]
          ('3 after 1, 2', ['up'])
        """
        return rankings(self.total, k)

    def bottom(self, k: int) -> Rankings:
        """Returns each query's `k` most negative sequences, the lowest first.

        Example:
          >>> (ranking,) = scores.bottom(1)
          >>> [(ranked.id, ranked.score < 0) for ranked in ranking]
          [('e', True)]
        """
        return rankings(self.total, k, lowest=True)


def summed(scores: "xr.DataArray") -> "xr.DataArray":
    """Returns scores, added up over layers if they are by layer.

    What is not a number makes none of a sum: xarray itself would leave it out.
    """
    if "layer" not in scores.dims:
        return scores
    return scores.sum("layer", skipna=False, keep_attrs=True)


def rankings(total: "xr.DataArray", k: int, *, lowest: bool = False) -> Rankings:
    """Returns each query's `k` most extreme sequences, the most extreme first.

    A sequence whose score is not a number is in no ranking.

    Args:
      total: `(query, train)`.
      k: how many.
      lowest: whether the most negative rather than the most positive.
    """
    values = total.values if lowest else -total.values
    order = np.argsort(values, axis=1, kind="stable")[:, :k]
    ids = total["train"].values
    return Rankings(
        Ranking(
            str(name),
            total.attrs["unit"],
            tuple(
                Ranked(str(ids[i]), float(row[i]))
                for i in places
                if not np.isnan(row[i])
            ),
        )
        for name, row, places in zip(
            total["query"].values, total.values, order, strict=True
        )
    )


def standard_error(first: "xr.DataArray", second: "xr.DataArray") -> "xr.DataArray":
    """Returns each query's standard error, from scores with either half's curvature.

    The root mean square over training sequences of half the difference: of scores with
    the whole data's curvature, by how much they would differ had other sequences and
    other labels been drawn. Of the curvature alone: a model trained anew is another
    matter (`influence.truth`).

    Args:
      first: `(query, train, …)`, with the curvature of one half (`halves`).
      second: the same with the other half's.

    Raises:
      ValueError: if they differ in more than the sequences the curvature is fitted to.

    Example:
      >>> from influence.attribution.scores import standard_error
      >>> from influence.curvature.halves import halves
      >>> def total(half):
      ...     fitted = influence.fit(task, params, half, layers="block.*")
      ...     asked = influence.query(fitted, params, measurements)
      ...     return influence.scan(task, params, asked, batches).total
      >>> standard_error(*map(total, halves(examples.batches(5)))).dims
      ('query',)
    """
    check_alike(
        [first, second],
        ("layers", "solver", "damping", "curvature", "n_train", "unit"),
    )
    for axis in ("query", "train"):
        if not np.array_equal(first[axis].values, second[axis].values):
            raise ValueError(f"The two scores have different names along {axis!r}.")
    found = ((((first - second) / 2) ** 2).mean("train")) ** 0.5
    found.attrs = {**first.attrs, "of": "one standard error, from split halves"}
    return found.rename("standard_error")


def check_alike(scores: "Sequence[xr.DataArray]", keys: Sequence[str] = SAME) -> None:
    """Raises if scores can't be combined: they would not be in the same units.

    Raises:
      ValueError: naming what differs, with the values.

    Example:
      >>> from influence.attribution.scores import check_alike
      >>> weakly = influence.Eigenbasis(influence.Relative(0.01))
      >>> other = influence.query(curvature, params, measurements, solver=weakly)
      >>> total = influence.scan(task, params, other, batches).total
      >>> check_alike([scores.total, total])
      Traceback (most recent call last):
      ValueError: Scores made with different damping can't be combined: ...
    """
    for key in keys:
        found = {str(x.attrs.get(key)) for x in scores}
        if len(found) > 1:
            raise ValueError(
                f"Scores made with different {key} can't be combined: "
                f"{' and '.join(sorted(found))}. Compute them with the same."
            )


def told(n_train: int, about: Iterable[tuple[str, str | int]]) -> dict[str, Any]:
    """Returns what scores say of themselves: unit, sign, `n_train`, and the rest.

    In nats per added copy, unless another unit is among the rest.
    """
    return {"unit": UNIT, "sign": SIGN, "n_train": n_train, **dict(about)}


def labelled(
    values: np.ndarray,
    dims: Mapping[str, Sequence[Any]],
    n_train: int,
    about: Iterable[tuple[str, str | int]],
    facts: Iterable[tuple[str, Sequence[float]]] = (),
) -> "xr.DataArray":
    """Returns scores with their names, unit and sign.

    Args:
      values: `-∇fᵀ (G + damping)⁻¹ ∇L`, not yet divided by the number of sequences.
      dims: of each axis, its name and labels.
      n_train: the number of training sequences; one copy more is `1/n_train` of weight.
      about: what else there is to say.
      facts: what there is to say of each query.
    """
    import xarray as xr  # takes as long to import as all of the package

    attrs = told(n_train, about)
    coords = {**dims, **{name: ("query", list(x)) for name, x in facts}}
    return xr.DataArray(
        values / n_train, dims=list(dims), coords=coords, name="score", attrs=attrs
    )
