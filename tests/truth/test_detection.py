"""Counting what a ranking finds."""

import numpy as np
import pytest
import xarray as xr

from influence.truth.detection import detected, hits, recall

SCORES = xr.DataArray(
    [[5.0, 4, 3, 2, 1], [1, 2, 3, 4, 5]],
    dims=("query", "train"),
    coords={"query": ["a", "b"]},
)
WANTED = np.array([True, False, True, False, False])


def test_hits_are_the_wanted_among_the_first():
    np.testing.assert_array_equal(hits(SCORES, WANTED, 2), [1, 0])
    np.testing.assert_array_equal(hits(SCORES, WANTED, 3), [2, 1])
    np.testing.assert_array_equal(hits(SCORES, WANTED, 5), [2, 2])


def test_recall_is_one_if_all_that_fit_are_found():
    np.testing.assert_array_equal(recall(SCORES, WANTED, 1), [1, 0])
    np.testing.assert_array_equal(recall(SCORES, WANTED, 3), [1, 0.5])


def test_detection_goes_from_the_first_looked_at_to_all():
    own = SCORES[0]
    np.testing.assert_allclose(detected(own, WANTED), [0.5, 0.5, 1, 1, 1])
    layers = xr.concat([own, -3 * own], "layer").transpose("train", "layer")
    np.testing.assert_allclose(detected(layers, WANTED), [0, 0, 0.5, 0.5, 1])


def test_what_can_t_be_counted_is_an_error():
    for k in (0, 6):
        with pytest.raises(ValueError, match="Ask for 1 to 5"):
            hits(SCORES, WANTED, k)
    for act in (lambda x: recall(SCORES, x, 2), lambda x: detected(SCORES[0], x)):
        with pytest.raises(ValueError, match="No sequence is wanted"):
            act(np.zeros(5, bool))
