"""A corpus that fits in memory, with names, cut into batches of one shape."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from influence.types import Batch, Inputs


@dataclass(frozen=True)
class Examples:
    """Named examples.

    Attributes:
      inputs: what a task reads; every array has a leading axis of length `N`.
      ids: a stable name for each example. Sampled labels hang on it.

    Example:
      >>> pairs = np.array([[1, 2], [3, 4]])
      >>> inputs = {"tokens": pairs, "counts": np.ones((2, 2), bool)}
      >>> named = influence.Examples(inputs, ("first", "second"))
      >>> len(named), named.take([1]).ids
      (2, ('second',))
    """

    inputs: Inputs
    ids: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises if names and arrays do not belong together."""
        if not self.ids:
            raise ValueError("There are no examples: the data is empty.")
        lengths = {len(x) for x in jax.tree.leaves(self.inputs)}
        if lengths != {len(self.ids)}:
            raise ValueError(
                f"{len(self.ids)} ids were given for arrays of {sorted(lengths)} "
                "examples. Give one id to each example."
            )
        if len(set(self.ids)) != len(self.ids):
            twice = next(x for x in self.ids if self.ids.count(x) > 1)
            raise ValueError(
                f"The id {twice!r} names several examples; make it unique."
            )

    def __len__(self) -> int:
        """Returns `N`."""
        return len(self.ids)

    def take(self, places: Sequence[int] | np.ndarray) -> "Examples":
        """Returns the examples at some places, in that order.

        Example:
          >>> first = examples.take([0, 1])
          >>> first.ids
          ('up', 'up later')
        """
        inputs = jax.tree.map(lambda x: x[np.asarray(places)], self.inputs)
        return Examples(inputs, tuple(self.ids[i] for i in places))

    def batches(self, size: int) -> "InMemory":
        """Returns the examples in batches of `size`, the last one filled up.

        Example:
          >>> batches = examples.batches(4)
          >>> len(batches), [int(batch.real_B.sum()) for batch in batches]
          (3, [4, 4, 2])
        """
        if size < 1:
            raise ValueError(f"A batch needs at least one example, not {size}.")
        return InMemory(self, min(size, len(self)))


@dataclass(frozen=True)
class InMemory:
    """Batches of examples held in memory."""

    examples: Examples
    size: int

    @property
    def ids(self) -> Sequence[str]:
        """Returns the examples' names."""
        return self.examples.ids

    def __len__(self) -> int:
        """Returns the number of batches."""
        return -(-len(self.examples) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        """Walks the batches; rows that fill up the last repeat its first example."""
        return self.rows(range(self.size))

    def rows(self, which: Sequence[int], done: int = 0) -> Iterator[Batch]:
        """Walks the batches, taking of each only some rows.

        Args:
          which: the places of the rows within a batch; those beyond its end are filled
            up as those of the last batch are.
          done: how many batches are left out.
        """
        for places, real in cut(len(self.examples), self.size, which, done):
            inputs = jax.tree.map(lambda x: x[places], self.examples.inputs)  # noqa: B023
            yield Batch(inputs, keys([self.ids[int(i)] for i in places]), real)


def cut(
    count: int, size: int, which: Sequence[int], done: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields which examples stand in some rows of each batch, and which rows are real.

    A row beyond its batch's end, or beyond the last example, repeats the batch's first.

    Args:
      count: how many examples there are.
      size: how many rows a batch has.
      which: the places of the rows within a batch.
      done: how many batches are left out.

    Example:
      >>> from influence.model.examples import cut
      >>> [(x.tolist(), real.tolist()) for x, real in cut(5, 2, [1])]
      [([1], [True]), ([3], [True]), ([4], [False])]
    """
    rows = np.asarray(which)
    for start in range(done * size, count, size):
        real = (rows < size) & (start + rows < count)
        yield np.where(real, start + rows, start), real


def sequences(
    tokens: Sequence[Sequence[int]], ids: Sequence[str] | None = None
) -> Examples:
    """Returns token sequences as examples, padded at the end to the longest.

    Args:
      tokens: `N` lists of token ids, of any lengths, or an array `[N, T]`.
      ids: their names; "0", "1", … if left out.

    Raises:
      ValueError: if there are no sequences, or one has no token to predict.

    Example:
      >>> two = influence.sequences([[1, 2, 3], [4, 5]], ["long", "short"])
      >>> print(two.inputs["tokens"])
      [[1 2 3]
       [4 5 0]]
      >>> print(two.inputs["counts"])
      [[ True  True  True]
       [ True  True False]]
    """
    lengths = np.array([len(x) for x in tokens])
    names = tuple(str(i) for i in range(len(lengths))) if ids is None else tuple(ids)
    if len(lengths) and lengths.min() < 2:
        place = int(lengths.argmin())
        raise ValueError(
            f"Sequence {names[place]!r} has {lengths[place]} tokens: there is nothing "
            "to predict in fewer than two. Leave it out."
        )
    width = lengths.max(initial=0)
    counts = np.arange(width) < lengths[:, None]
    padded = np.zeros(counts.shape, np.int32)
    padded[counts] = (
        np.concatenate([np.asarray(x) for x in tokens]) if len(tokens) else 0
    )
    return Examples({"tokens": padded, "counts": counts}, names)


def prompted(texts: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> Examples:
    """Returns prompts with their completions as examples; only completions count.

    Args:
      texts: by name, the token ids of a prompt and of its completion.

    Raises:
      ValueError: if there are none, or a prompt or completion is empty, naming it.
    """
    for name, pair in texts.items():
        for part, ids in zip(("prompt", "completion"), pair, strict=True):
            if not len(ids):
                raise ValueError(
                    f"The {part} of {name!r} is empty. A completion is predicted from "
                    "at least one token before it; give the start-of-text token if "
                    "there is no prompt."
                )
    joined = sequences(
        [[*prompt, *rest] for prompt, rest in texts.values()], list(texts)
    )
    counts = joined.inputs["counts"]
    starts = np.array([len(prompt) for prompt, _ in texts.values()])[:, None]
    counts = counts & (np.arange(counts.shape[1]) >= starts)
    return Examples({**joined.inputs, "counts": counts}, joined.ids)


def keys(ids: Sequence[str]) -> np.ndarray:
    """Returns a 64-bit digest of each name as two words, `uint32[N, 2]`."""
    digests = [hashlib.blake2b(x.encode(), digest_size=8).digest() for x in ids]
    return np.frombuffer(b"".join(digests), "<u4").reshape(-1, 2)
