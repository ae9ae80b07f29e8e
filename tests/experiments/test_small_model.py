"""What experiments share: queries as one, pieces of text, rows that correlate."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models

import influence
from experiments.planted_passages import Settings, planted, recall, unbroken
from experiments.small_model import correlations, joined, pieces
from influence.attribution.forms import Plain
from tests import cases

ROUNDING = 1e-9  # float64


def test_queries_as_one_score_what_they_score_alone():
    case = cases.case(cases.MAKERS["raw-loop"], bias=True)
    batches = case.examples.batches(3)
    curvature = influence.fit(case.task, case.params, batches)
    asked = influence.completions(case.task, {"one": ([1, 2], [3]), "two": ([5], [6])})
    queries = [
        influence.query(curvature, case.params, asked, compress=x)
        for x in (None, Plain(2))
    ]
    alone, together = (
        [influence.scan(case.task, case.params, x, batches).total.values for x in each]
        for each in (queries, [joined(queries)])
    )
    np.testing.assert_allclose(np.concatenate(alone), together[0], rtol=ROUNDING)


def test_pieces_are_full_and_go_on_where_the_last_ended():
    letters = Tokenizer(models.BPE({x: i for i, x in enumerate("ab\n")}, []))
    found = list(pieces(letters, ["abb", "ab", "aaaaaaa"], 3))
    assert [x for x, _ in found] == [
        [0, 1, 1],
        [2, 0, 1],
        [2, 0, 0],
        [0, 0, 0],
        [0, 0, 2],
    ]
    assert [place for _, place in found] == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_those_of_rows(seed):
    x, y = np.random.default_rng(seed).normal(size=(2, 4, 9))
    expected = np.diag(np.corrcoef(x, y)[:4, 4:])
    np.testing.assert_allclose(correlations(x, y), expected, rtol=ROUNDING)


@pytest.mark.parametrize("seed", range(3))
def test_every_passage_is_where_it_was_planted(seed):
    settings = Settings(copies=(1, 5), each=2, prompt=2, completion=3)
    train, held = np.zeros((40, 9), int), np.arange(1, 33).reshape(4, 8)
    found, passages = planted(settings, train, held, seed)
    has = [
        [i for i, row in enumerate(found) if set(x.tokens) <= set(row.tolist())]
        for x in passages
    ]
    assert has == [sorted(x.places.tolist()) for x in passages]
    assert [len(x) for x in has] == [1, 1, 5, 5]


def test_what_is_found_of_a_passage():
    score, places = np.array([5.0, 1, 4, 3, 2]), np.array([0, 3, 4])
    assert recall(score, places) == pytest.approx(2 / 3)
    assert unbroken(score, places) == pytest.approx(1 / 3)
