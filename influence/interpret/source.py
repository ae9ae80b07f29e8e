"""Where values come from: a model's sites, at the positions of sequences that count."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.fold import Fold
from influence.linalg.contract import wide
from influence.model.sites import Address, read
from influence.model.task import LanguageModel
from influence.types import Batch, Batches, Params

OUTLIER = 10.0
"""A value longer than so many times the median is left out: attention sinks, mostly."""


class Values(Protocol):
    """Where values come from: a model, or what it computed before."""

    @property
    def params(self) -> Params:
        """The model's parameters."""
        ...

    def values(self, sites: Sequence[Address], params: Params, batch: Batch) -> Any:
        """Returns values at sites, `[rows, D]` each, and which rows count."""
        ...


@dataclass(frozen=True)
class Source:
    """A model that is run for its values.

    Attributes:
      task: the language model.
      params: its parameters.
      special: token ids at which nothing is read.
    """

    task: LanguageModel
    params: Params
    special: tuple[int, ...] = ()

    def values(self, sites: Sequence[Address], params: Params, batch: Batch) -> Any:
        """Returns values at sites, `[B T, D]` each, and which rows count.

        A position counts if a label can be reached from it and it is not special.
        """
        found = read(self.task.outputs, sites)(params, batch.inputs)
        keep = self.task.counted(batch.inputs) & jnp.asarray(batch.real_B)[:, None]
        tokens = batch.inputs["tokens"]
        for id_ in self.special:
            keep = keep & (tokens != id_)
        rows = {
            k: x.reshape(-1, x.shape[-1]).astype(wide(x.dtype))
            for k, x in found.items()
        }
        return rows, keep.reshape(-1)


@dataclass(frozen=True)
class Given:
    """Values that were computed before, as `Chunks` hands them out; no model is run."""

    @property
    def params(self) -> Params:
        """Returns none: there is no model."""
        return None

    def values(self, sites: Sequence[Address], params: Params, batch: Batch) -> Any:
        """Returns a batch's values at sites, `[B, D]` each, and which rows count.

        Raises:
          ValueError: if a site's are not among them.
        """
        del params
        missing = [str(x) for x in sites if str(x) not in batch.inputs]
        if missing:
            raise ValueError(
                f"There are no values of {', '.join(missing)}, only of "
                f"{', '.join(batch.inputs)}. Compute them as well, or leave it out."
            )
        rows = {x: jnp.asarray(batch.inputs[str(x)]) for x in sites}
        return rows, jnp.asarray(batch.real_B)


@dataclass(frozen=True)
class Chunks:
    """Values in arrays, in the order they are in and again and again: `Given`'s.

    Arrays may be files that are mapped: a batch is read as it is needed. Only what is
    poured into the buffer together is shuffled, so mix them before, or give much.

    Attributes:
      arrays: values by site, `[N, D]` each, row by row of the same positions.
      size: how many rows make a batch.
      batches: how many batches in all.

    Raises:
      ValueError: if arrays are of different lengths, or shorter than a batch.
    """

    arrays: Mapping[Address, np.ndarray]
    size: int
    batches: int

    def __post_init__(self) -> None:
        """Raises if arrays do not fit together."""
        lengths = {str(k): len(x) for k, x in self.arrays.items()}
        if len(set(lengths.values())) != 1 or min(lengths.values()) < self.size:
            raise ValueError(
                f"Arrays of {lengths} rows make no batches of {self.size}: give arrays "
                "of one length, a batch at least."
            )

    def __len__(self) -> int:
        """Returns the number of batches."""
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        """Walks the batches; rows that fill none at the end are left out."""
        whole = len(next(iter(self.arrays.values()))) // self.size
        keys, real = np.zeros((self.size, 2), np.uint32), np.ones(self.size, bool)
        for i in range(self.batches):
            start = i % whole * self.size
            rows = {
                str(k): np.asarray(x[start : start + self.size])
                for k, x in self.arrays.items()
            }
            yield Batch(rows, keys, real)


class Examples(Protocol):
    """Sequences that can be taken in any order, in memory or not."""

    def __len__(self) -> int:
        """Returns how many there are."""
        ...

    def take(self, places: np.ndarray) -> "Examples":
        """Returns some of them, in an order."""
        ...

    def batches(self, size: int) -> Batches:
        """Returns them in batches."""
        ...


@dataclass(frozen=True)
class Epochs:
    """Batches of sequences, again and again, each time in another order.

    Attributes:
      examples: the sequences.
      size: how many make a batch.
      batches: how many batches in all.
      seed: of the orders.
    """

    examples: Examples
    size: int
    batches: int
    seed: int = 0

    def __len__(self) -> int:
        """Returns the number of batches."""
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        """Walks the batches; every epoch's last one may not be full."""
        whole = (self._epoch(i) for i in count())
        return islice(chain.from_iterable(whole), self.batches)

    def _epoch(self, number: int) -> Batches:
        rng = np.random.default_rng([self.seed, number])
        order = rng.permutation(len(self.examples))
        return self.examples.take(order).batches(self.size)


class Centre(NamedTuple):
    """What values at a site are brought to the middle and to one size by.

    Attributes:
      mean_D: their mean.
      scale: what brings their mean square length to `D`.
      limit: the length above which a value is left out.
    """

    mean_D: Array
    scale: Array
    limit: Array


def centres(source: Values, sites: Sequence[Address]) -> Fold:
    """Returns the pass that finds the middle and the size of values, by site.

    A few thousand positions are enough: walk over the first batches only. The state is
    those positions.
    """

    @jax.jit
    def look(params: Params, batch: Batch) -> Any:
        return source.values(sites, params, batch)

    def update(state: list[Any], batch: Batch) -> list[Any]:
        rows, keep = look(source.params, batch)
        keep = np.asarray(keep)
        return [*state, {k: np.asarray(x)[keep] for k, x in rows.items()}]

    def finish(state: list[Any]) -> dict[Address, Centre]:
        if not state or not sum(len(x[sites[0]]) for x in state):
            raise ValueError(
                "There is no position to learn from: all tokens are padding or "
                "special. Give a corpus with text."
            )
        return {k: _centre(np.concatenate([x[k] for x in state])) for k in sites}

    return Fold("centres", list, update, finish)


def _centre(rows_NxD: np.ndarray) -> Centre:
    length = np.linalg.norm(rows_NxD, axis=1)
    if not np.isfinite(length).all():
        raise ValueError(
            f"{(~np.isfinite(length)).sum()} of {len(length)} values at a site are not "
            "finite. Does the model's own loss come out finite on this corpus?"
        )
    limit = OUTLIER * np.median(length)
    kept = rows_NxD[length <= limit]
    mean = kept.mean(0)
    square = ((kept - mean) ** 2).sum(1).mean()
    if square <= 0:
        raise ValueError(
            f"All {len(kept)} values at a site are the same: there is nothing to learn."
        )
    scale = (rows_NxD.shape[1] / square) ** 0.5
    kind = rows_NxD.dtype
    return Centre(*(jnp.asarray(np.asarray(x, kind)) for x in (mean, scale, limit)))
