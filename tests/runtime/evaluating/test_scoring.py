"""What a method costs is kept with its scores, and one that diverges stays in view."""

from functools import partial

import numpy as np
import pytest
import xarray as xr

from influence.curvature.solvers import LiSSA
from influence.runtime.evaluating.scoring import costed, shown
from influence.truth.methods import gradients
from influence.truth.table import rows
from tests.truth.test_methods import language


def wild(subject):
    """Returns nothing: the steps are too large by orders of magnitude."""
    solver = LiSSA(subject.training.task, subject.batches, steps=50, rate=1e6)
    return subject.scores(subject.fitted(), solver)


@pytest.fixture(scope="module")
def scored():
    act = partial(costed, language())
    return {"dot": act(gradients), "warm": act(gradients, warm=True), "wild": act(wild)}


def test_scores_say_what_they_cost(scored):
    for x in scored.values():
        assert x.dims == ("query", "train")
        assert set(x.coords) == {"query", "train"}
        assert x.attrs["seconds"] > 0
    np.testing.assert_array_equal(scored["dot"], scored["warm"])


def test_a_method_that_diverges_ranks_nothing_and_says_why(scored):
    assert not scored["wild"].values.any()
    assert "take smaller steps" in scored["wild"].attrs["diverged"]


def test_the_table_has_the_best_first_and_differences_from_the_reference(scored):
    subject = language()
    weight = np.ones((6, 12))
    weight[np.arange(6), np.arange(6)] = 0
    truth = xr.Dataset(
        {
            "measured": (
                ("subset", "seed", "query"),
                (weight @ scored["dot"].values.T)[:, None],
            ),
            "weight": (("subset", "train"), weight),
        },
        coords={
            "seed": [0],
            "query": list(subject.measurements),
            "train": list(subject.training.examples.ids),
        },
        attrs={"protocol": "same seed"},
    )
    judged = {"wild": scored["wild"], "dot": scored["dot"]}
    found = rows(judged, dict.fromkeys(judged, "final weights"), truth)
    assert [x.method for x in found] == ["dot", "wild"]
    assert found[0].lds == pytest.approx(1)
    assert found[1].lds == 0
    # Nothing is called "cg": the first method is what others are compared with.
    assert (found[1].difference, found[0].difference) == (0, pytest.approx(1))
    assert shown(found).row_count == 2
