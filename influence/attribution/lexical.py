"""BM25, the baseline to compare with: which sequences share the query's words.

    score(Q, D) = Σ_{t in Q} [t in D] · IDF(t),
    IDF(t) = log((N - n_t + 1/2) / (n_t + 1/2) + 1)

with binary term presence and no length normalisation (Grosse et al. 2023:
with presence for frequency the saturation factor `(k₁ + 1) / (k₁ + 1)` is one).
A term counts as often as the query has it; `n_t` is how many sequences contain it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr


def bm25(
    queries: Mapping[str, Sequence[int]],
    tokens: Sequence[Sequence[int]],
    ids: Sequence[str],
) -> xr.DataArray:
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
    terms = sorted({t for query in queries.values() for t in query})
    column = {t: i for i, t in enumerate(terms)}
    present = np.zeros((len(tokens), len(terms)), bool)
    for row, sequence in zip(present, tokens, strict=True):
        row[[column[t] for t in set(sequence) & column.keys()]] = True
    documents = present.sum(0)
    idf = np.log((len(tokens) - documents + 0.5) / (documents + 0.5) + 1)
    counts = [Counter(query) for query in queries.values()]
    weight = np.array([[count[t] for t in terms] for count in counts], float) * idf
    return xr.DataArray(
        weight @ present.T.astype(float),
        dims=("query", "train"),
        coords={"query": list(queries), "train": list(ids)},
        name="bm25",
        attrs={"unit": "sum of inverse document frequencies"},
    )
