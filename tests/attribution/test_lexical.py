"""BM25 is its formula, of everything at once or of the best of a stream."""

from math import log

import numpy as np
import pytest
import xarray as xr

import influence
from influence.attribution.lexical import candidates
from influence.model.examples import prompted
from influence.model.task import Empirical
from tests import cases

QUERIES = {"q": [2, 2, 1, 9], "r": [4], "none": [10]}


def test_bm25_is_the_sum_over_the_query_s_terms():
    tokens = [[1, 2, 2], [2, 3], [4], [1]]
    found = influence.bm25({"q": [2, 2, 1, 9]}, tokens, ["a", "b", "c", "d"])

    def idf(n):
        return log((4 - n + 0.5) / (n + 0.5) + 1)

    # Two documents have 2 and two have 1; a term counts as often as the query has it.
    expected = [2 * idf(2) + idf(2), 2 * idf(2), 0.0, idf(2)]
    np.testing.assert_allclose(found.sel(query="q"), expected)
    assert list(found["train"].values) == ["a", "b", "c", "d"]


def corpus(n, seed):
    """Returns sequences of ten ids, so that many have the same terms."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 10, k).tolist() for k in rng.integers(2, 8, n)]
    return rows, [f"text-{i}" for i in range(n)]


@pytest.mark.parametrize("each", [1, 3, 20, 500])
@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_candidates_are_the_best_of_all_scores(each, size, seed):
    tokens, ids = corpus(150, seed)
    whole = influence.bm25(QUERIES, tokens, ids).values
    batches = influence.sequences(tokens, ids).batches(size)
    found = candidates(QUERIES, batches, each)
    assert found.queries == tuple(QUERIES)
    assert found.n_train == 150
    for scores, places, row in zip(found.scores, found.places, whole, strict=True):
        expected = np.argsort(-row, kind="stable")[:each]
        expected = expected[row[expected] > 0]
        # To the bit: ties would fall otherwise.
        np.testing.assert_array_equal(places, expected)
        np.testing.assert_array_equal(scores, row[expected])
    assert not len(found.places[2])
    assert found.union.tolist() == sorted({int(i) for x in found.places for i in x})


def test_a_prompt_is_searched_and_padding_is_not():
    examples = prompted({"long": ([1, 2], [3, 4, 5]), "short": ([6], [7])})
    found = candidates({"prompt": [1], "padding": [0]}, examples.batches(2), 5)
    assert [x.tolist() for x in found.places] == [[0], []]


def test_what_is_held_does_not_grow_with_the_corpus():
    tokens, ids = corpus(400, 2)
    held = []

    def watched(fold, batches):
        state = fold.init()
        for batch in batches:
            state = fold.update(state, batch)
            if fold.name == "BM25":
                held.append(max(map(len, state.scores)))
        return fold.finish(state)

    batches = influence.sequences(tokens, ids).batches(16)
    candidates(QUERIES, batches, 5, run=watched)
    assert len(held) == 25
    assert max(held) <= 10


def test_a_scan_of_candidates_is_the_scan_of_everything_on_them():
    case = cases.case(cases.MAKERS["raw-scan"], False)
    batches = case.examples.batches(7)
    curvature = influence.fit(case.task, case.params, batches, labels=Empirical())
    asked = influence.completions(case.task, {"a": ([1, 2], [3])})
    query = influence.query(curvature, case.params, asked)
    found = candidates({"a": [1, 2, 3]}, batches, 3)
    some = case.examples.take(found.union)
    few = influence.scan(
        case.task, case.params, query, some.batches(2), n_train=found.n_train
    ).layers
    all_ = influence.scan(case.task, case.params, query, batches).layers
    expected = all_.sel(train=list(some.ids))
    assert few.attrs == expected.attrs
    # Sums over a batch of another size.
    xr.testing.assert_allclose(few, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("queries", "each"), [({}, 3), ({"q": [1]}, 0)])
def test_nothing_is_not_searched_for(queries, each):
    batches = cases.texts(3).batches(3)
    with pytest.raises(ValueError, match=f"{each} candidates were asked for, for"):
        candidates(queries, batches, each)
