"""BM25 is its formula."""

from math import log

import numpy as np

import influence


def test_bm25_is_the_sum_over_the_query_s_terms():
    tokens = [[1, 2, 2], [2, 3], [4], [1]]
    found = influence.bm25({"q": [2, 2, 1, 9]}, tokens, ["a", "b", "c", "d"])

    def idf(n):
        return log((4 - n + 0.5) / (n + 0.5) + 1)

    # Two documents have 2 and two have 1; a term counts as often as the query has it.
    expected = [2 * idf(2) + idf(2), 2 * idf(2), 0.0, idf(2)]
    np.testing.assert_allclose(found.sel(query="q"), expected)
    assert list(found["train"].values) == ["a", "b", "c", "d"]
