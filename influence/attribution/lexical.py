"""BM25, the baseline to compare with: which sequences share the query's words.

    score(Q, D) = Σ_{t in Q} [t in D] · IDF(t),
    IDF(t) = log((N - n_t + 1/2) / (n_t + 1/2) + 1)

with binary term presence and no length normalisation (Grosse et al. 2023:
with presence for frequency the saturation factor `(k₁ + 1) / (k₁ + 1)` is one).
A term counts as often as the query has it; `n_t` is how many sequences contain it.

Either of all sequences at once, held in memory, or of the best of a corpus of any size
(`candidates`): one pass to count, one to rank. Both add up the same numbers in the same
order, so sequences with the same terms have the same score to the bit.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from influence.fold import Fold, Run, run
from influence.types import Batch, Batches

if TYPE_CHECKING:
    import xarray as xr
    from scipy.sparse import csr_array

Queries = Mapping[str, Sequence[int]]
"""By name, the token ids of a prompt and completion together."""


class Terms(NamedTuple):
    """What the queries are made of.

    Attributes:
      ids_M: every token id in any query, ascending.
      counts_MxQ: how often each query has it.
      known: of each id up to the largest of them, whether it is one; then a False.
    """

    ids_M: np.ndarray
    counts_MxQ: np.ndarray
    known: np.ndarray


@dataclass(frozen=True)
class Candidates:
    """The sequences that share most with each query.

    Attributes:
      queries: the queries' names.
      places: for each query, where in the corpus they are, the best first; of equals,
        the first in the corpus first.
      scores: their scores.
      n_train: how many sequences they were chosen from.
    """

    queries: tuple[str, ...]
    places: tuple[np.ndarray, ...]
    scores: tuple[np.ndarray, ...]
    n_train: int

    @property
    def union(self) -> np.ndarray:
        """Returns the places of all queries' candidates, once each, in their order."""
        return np.unique(np.concatenate(self.places))


def bm25(
    queries: Queries, tokens: Sequence[Sequence[int]], ids: Sequence[str]
) -> "xr.DataArray":
    """Returns `(query, train)`: the lexical score of every sequence for every query.

    Args:
      queries: by name, the token ids of the prompt and completion together.
      tokens: the token ids of each training sequence, without padding.
      ids: the sequences' names.

    Example:
      >>> words = influence.bm25({"3 after 1, 2": [1, 2, 3]}, tokens, ids)
      >>> words.idxmax("train").item()
      'up'
    """
    terms = _terms(queries)
    import xarray as xr  # takes as long to import as all of the package

    present_NxM = _present(terms, tokens)
    weight_MxQ = _weights(terms, present_NxM.sum(0), len(tokens))
    return xr.DataArray(
        (present_NxM @ weight_MxQ).T,
        dims=("query", "train"),
        coords={"query": list(queries), "train": list(ids)},
        name="bm25",
        attrs={"unit": "sum of inverse document frequencies"},
    )


def candidates(
    queries: Queries, batches: Batches, each: int, *, run: Run = run
) -> Candidates:
    """Returns each query's `each` highest-scoring sequences that share a term with it.

    Two passes over the tokens, none over the model. Memory does not grow with the
    corpus: a count for every term, and `2 each` scores for every query. A scan of
    `union` alone gives those sequences the scores a scan of everything would.

    Args:
      queries: by name, the token ids of the prompt and completion together.
      batches: the training sequences, as a language model reads them.
      each: how many a query.
      run: carries out the passes.

    Raises:
      ValueError: if there are no queries, or not one candidate is asked for.

    Example:
      >>> from influence.attribution.lexical import candidates
      >>> found = candidates({"3 after 1, 2": [1, 2, 3]}, batches, each=3)
      >>> [batches.ids[place] for place in found.places[0]]
      ['up', 'down', 'down later']
      >>> some = examples.take(found.union).batches(5)
      >>> few = influence.scan(task, params, query, some, n_train=found.n_train)
      >>> [ranked.id for ranked in few.top(1)[0]]
      ['up']
    """
    if not queries or each < 1:
        raise ValueError(
            f"{each} candidates were asked for, for {len(queries)} queries. Ask for "
            "one at least, for one query at least."
        )
    terms = _terms(queries)
    documents_M, sequences = run(occurrences(terms), batches)
    weight_MxQ = _weights(terms, documents_M, sequences)
    places, scores = run(_best(terms, weight_MxQ, each), batches)
    return Candidates(tuple(queries), places, scores, sequences)


def occurrences(terms: Terms) -> Fold:
    """Returns the pass that counts, for each term, the sequences that contain it."""

    def update(state: tuple[np.ndarray, int], batch: Batch) -> tuple[np.ndarray, int]:
        documents_M, sequences = state
        rows = _rows(batch)
        return documents_M + _present(terms, rows).sum(0), sequences + len(rows)

    return Fold(
        "term counts",
        init=lambda: (np.zeros(len(terms.ids_M)), 0),
        update=update,
        finish=lambda state: state,
    )


class _Heap(NamedTuple):
    """What may still be among the best: columns of scores, and where they are from.

    Attributes:
      scores: by query, `[n]`, at most `2 each` and one batch.
      places: the same, of the sequences.
      reached: how many sequences were seen.
    """

    scores: tuple[np.ndarray, ...]
    places: tuple[np.ndarray, ...]
    reached: int


def _best(terms: Terms, weight_MxQ: np.ndarray, each: int) -> Fold:
    """Returns the pass that finds every query's highest-scoring sequences."""

    def init() -> _Heap:
        queries = range(weight_MxQ.shape[1])
        return _Heap(
            tuple(np.zeros(0) for _ in queries),
            tuple(np.zeros(0, np.int64) for _ in queries),
            0,
        )

    def update(heap: _Heap, batch: Batch) -> _Heap:
        scores_BxQ = _present(terms, _rows(batch)) @ weight_MxQ
        scores, places = [], []
        for i, new_B in enumerate(scores_BxQ.T):
            shares = np.flatnonzero(new_B)
            scores.append(np.concatenate([heap.scores[i], new_B[shares]]))
            places.append(np.concatenate([heap.places[i], heap.reached + shares]))
        heap = _Heap(tuple(scores), tuple(places), heap.reached + len(scores_BxQ))
        # Ordering takes longer than adding: it waits until there is much to drop.
        return _kept(heap, each, longest=2 * each)

    def finish(heap: _Heap) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        kept = _kept(heap, each, longest=0)
        return kept.places, kept.scores

    return Fold("BM25", init=init, update=update, finish=finish)


def _kept(heap: _Heap, each: int, longest: int) -> _Heap:
    """Returns the best `each` of the queries that hold more than `longest`."""
    scores, places = list(heap.scores), list(heap.places)
    for i, x in enumerate(scores):
        if len(x) > longest:
            # Stable, of columns in the corpus's order: of equals, the first remain.
            order = np.argsort(-x, kind="stable")[:each]
            scores[i], places[i] = x[order], places[i][order]
    return _Heap(tuple(scores), tuple(places), heap.reached)


def _terms(queries: Queries) -> Terms:
    ids = sorted({t for query in queries.values() for t in query})
    counts = [Counter(query) for query in queries.values()]
    table = np.array([[count[t] for count in counts] for t in ids], float)
    known = np.zeros(max(ids, default=-1) + 2, bool)
    known[ids] = True
    ids_M = np.array(ids, np.int64)
    return Terms(ids_M, table.reshape(len(ids), len(counts)), known)


def _weights(terms: Terms, documents_M: np.ndarray, sequences: int) -> np.ndarray:
    """Returns what a term's presence adds to each query's score, `[M, Q]`."""
    idf_M = np.log((sequences - documents_M + 0.5) / (documents_M + 0.5) + 1)
    return terms.counts_MxQ * idf_M[:, None]


def _present(terms: Terms, tokens: Iterable[Sequence[int] | np.ndarray]) -> "csr_array":
    """Returns which terms each sequence contains, `[N, M]`, as ones.

    Sparse, because its product adds up each row's terms one by one and in their order,
    whatever other rows there are; a dense product's order depends on its size.
    """
    from scipy.sparse import csr_array  # as dear as xarray

    last = len(terms.known) - 1
    arrays = (np.asarray(x, np.int64) for x in tokens)
    rows = [np.unique(x[terms.known[np.minimum(x, last)]]) for x in arrays]
    ends = np.cumsum([0, *map(len, rows)])
    columns = np.searchsorted(terms.ids_M, np.concatenate([*rows, np.zeros(0, int)]))
    shape = (len(rows), len(terms.ids_M))
    return csr_array((np.ones(len(columns)), columns, ends), shape=shape)


def _rows(batch: Batch) -> list[np.ndarray]:
    """Returns the batch's sequences without padding: up to the last that counts."""
    tokens, counts = (np.asarray(batch.inputs[k]) for k in ("tokens", "counts"))
    real = np.asarray(batch.real_B)
    lengths = counts.shape[1] - counts[:, ::-1].argmax(1)
    return [x[:n] for x, n in zip(tokens[real], lengths[real], strict=True)]
