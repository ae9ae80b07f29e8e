"""Which training sequences say nearly the same.

A passage that stands in the corpus many times fills a ranking with its copies. Two
sequences are near duplicates if the sets of their n-grams overlap enough (Jaccard
similarity, as Lee et al. 2022 use it on training data); groups are what pairs connect.
"""

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph


def near_duplicates(
    tokens: Sequence[Sequence[int]], *, n: int = 5, similarity: float = 0.5
) -> np.ndarray:
    """Returns the group of each sequence, `[N]`: a number, equal for near duplicates.

    Groups are numbered in the order of their first sequence. Meant for the top of a
    ranking, or some ten thousand sequences: memory is that of all overlapping pairs.

    Args:
      tokens: `N` lists of token ids; those shorter than `n` are one n-gram.
      n: how many tokens make an n-gram.
      similarity: of two sets of n-grams, shared ones to all, from which they count as
        near duplicates.

    Raises:
      ValueError: if `n` is not positive, or `similarity` is not above zero and at most
        one.

    Example:
      >>> from influence.attribution.duplicates import near_duplicates
      >>> near_duplicates([[1, 2, 3, 4], [7, 8, 9], [1, 2, 3, 4, 5]], n=2).tolist()
      [0, 1, 0]
    """
    if n < 1 or not 0 < similarity <= 1:
        raise ValueError(
            f"Near duplicates need n of 1 or more and a similarity in (0, 1], not {n} "
            f"and {similarity}."
        )
    grams = [_grams(tuple(x), n) for x in tokens]
    sizes = np.array([len(x) for x in grams])
    shared = _shared(grams)
    union = sizes[shared.row] + sizes[shared.col] - shared.data
    near = shared.data >= similarity * union
    pairs = (shared.row[near], shared.col[near])
    graph = sparse.coo_array((np.ones(len(pairs[0])), pairs), shared.shape)
    _, groups = csgraph.connected_components(graph, directed=False)
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _grams(tokens: tuple[int, ...], n: int) -> set[tuple[int, ...]]:
    return {tokens[i : i + n] for i in range(max(1, len(tokens) - n + 1))}


def _shared(grams: Sequence[set[tuple[int, ...]]]) -> sparse.coo_array:
    """Returns how many n-grams each two sequences share, where they share any."""
    places = {gram: i for i, gram in enumerate(set().union(*grams))}
    rows = np.repeat(np.arange(len(grams)), [len(x) for x in grams])
    columns = np.array([places[gram] for x in grams for gram in x])
    ones = np.ones(len(rows), np.int64)
    has = sparse.csr_array((ones, (rows, columns)), (len(grams), len(places)))
    return sparse.coo_array(has @ has.T)
