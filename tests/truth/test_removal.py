"""A removed sequence is gone, and nothing else is different."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import influence
from influence.attribution.measurements import measure
from influence.fold import run
from influence.model import train
from influence.model.task import LanguageModel
from influence.truth.removal import by_rank, check, curve

TASK = LanguageModel(lambda params, tokens: params[tokens])
TABLE = jax.random.normal(jax.random.key(0), (11, 11), jnp.float32)
RECIPE = train.Recipe(steps=12, batch=4, rate=0.1)
TEXTS = [[1, 2, 3], [3, 4, 5], [5, 6, 7], [7, 8, 9], [2, 4, 6], [1, 3, 5]]


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # adamw mixes types
        yield


def trained(texts, weights, seed=0):
    examples = influence.sequences(texts)
    order = train.Order(len(texts), RECIPE, seed, chunk=5)
    fold = train.fold(TASK, RECIPE, TABLE, examples, np.asarray(weights, np.float32))
    return run(fold, order)


def test_training_lowers_the_loss_and_keeps_where_it_started():
    before = jnp.copy(TABLE)
    losses = trained(TEXTS, np.ones(6)).losses
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(TABLE, before)


def test_training_is_the_same_every_time_and_another_for_another_seed():
    first, again = (trained(TEXTS, np.ones(6)).params for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = trained(TEXTS, np.ones(6), seed=1).params
    assert (np.asarray(first) != np.asarray(other)).any()


def test_a_sequence_of_weight_zero_leaves_no_trace():
    weights = np.ones(6)
    weights[2] = 0
    other = [*TEXTS[:2], [9, 10, 0], *TEXTS[3:]]
    found = [trained(texts, weights).params for texts in (TEXTS, other)]
    # Same start, same batches, same denominators: the same model, whatever it was.
    np.testing.assert_array_equal(*found)
    assert (np.asarray(found[0]) != np.asarray(trained(TEXTS, np.ones(6)).params)).any()


def test_an_order_takes_every_sequence_once_an_epoch():
    order = train.Order(6, train.Recipe(9, 4, 0.1), 0).whole().ravel()
    assert len(order) == 36
    for epoch in order.reshape(6, 6):
        assert sorted(epoch) == list(range(6))


def test_chunks_are_alike_and_filling_the_last_one_up_changes_nothing():
    order = train.Order(6, train.Recipe(9, 4, 0.1), 0, chunk=4)
    chunks = list(order)
    assert [x.shape for x in chunks] == [(4, 4)] * len(order)
    taken = np.concatenate(chunks)
    np.testing.assert_array_equal(taken[taken[:, 0] != train.NONE], order.whole())
    fold = train.fold(TASK, RECIPE, TABLE, influence.sequences(TEXTS), np.ones(6))
    whole = run(fold, [train.Order(6, RECIPE, 0).whole()])
    apart = run(fold, train.Order(6, RECIPE, 0, chunk=RECIPE.steps - 1))
    np.testing.assert_array_equal(whole.params, apart.params)
    total = apart.losses[0] * (RECIPE.steps - 1) + apart.losses[1]
    # Means of twelve numbers, multiplied out again.
    np.testing.assert_allclose(whole.losses[0] * RECIPE.steps, total, rtol=1e-12)


def test_ranks_go_round_the_queries():
    scores = xr.DataArray([[0, 3, 2, 1], [9, 8, 0, 1]], dims=("query", "train"))
    assert list(by_rank(scores)) == [1, 0, 2, 3]


def test_a_check_removes_what_it_says_and_compares():
    examples = influence.sequences(TEXTS)
    asked = influence.completions(TASK, {"a": ([1], [2]), "b": ([7], [8])})
    seen = {}

    def retrain(name, weights):
        seen[name] = weights
        return trained(TEXTS, weights).params

    params = trained(TEXTS, np.ones(6)).params
    dims = {"query": ["a", "b"], "train": list(examples.ids)}
    scores = xr.DataArray(
        [[2.0, 0, 0, 0, 1, 0], [0, 0, 0, 3.0, 0, 0]], coords=dims, dims=list(dims)
    )
    words = influence.bm25({"a": [1, 2], "b": [7, 8]}, TEXTS, examples.ids)
    found = check(retrain, asked, params, scores, words, share=0.17)
    np.testing.assert_array_equal(found.top.places, [0, 3])
    np.testing.assert_allclose(found.predicted, [-2, -3])
    assert len(found.random.places) == len(found.bm25.places) == 2
    assert not set(found.random.places) & {0, 3}
    for name, removal in zip(seen, (found.top, found.random, found.bm25), strict=True):
        np.testing.assert_array_equal(
            np.flatnonzero(seen[name] == 0), np.sort(removal.places)
        )
    # The only sequences with these pairs are gone: both completions lose.
    assert (found.top.changes < 0).all()
    assert found.same_sign == 2
    assert found.rank_correlation == pytest.approx(
        1.0 if found.top.changes[1] < found.top.changes[0] else -1.0
    )
    assert found.deviations == pytest.approx(
        -np.median(found.top.changes) / np.std(found.random.changes, ddof=1)
    )


def test_a_check_of_what_does_not_go_together_is_an_error():
    examples = influence.sequences(TEXTS)
    asked = influence.completions(TASK, {"a": ([1], [2]), "b": ([7], [8])})
    params = trained(TEXTS, np.ones(6)).params
    dims = {"query": ["a", "b"], "train": list(examples.ids)}
    scores = xr.DataArray(np.eye(6)[:2], coords=dims, dims=list(dims))
    apart = scores.copy(data=[[3.0, 2, 0, 0, 0, 0], [0, 0, 3.0, 2, 0, 0]])

    def nothing(name, weights):
        raise AssertionError("nothing is trained before all is checked")

    with pytest.raises(ValueError, match="different names along 'query'"):
        check(nothing, asked, params, scores, scores[::-1])
    turned = dict(reversed(asked.items()))
    with pytest.raises(ValueError, match=r"queries \['a', 'b'\], and what is measured"):
        check(nothing, turned, params, scores, scores)
    with pytest.raises(ValueError, match="together are 4 of 6 sequences"):
        check(nothing, asked, params, apart, scores, share=0.33)


def test_a_curve_is_what_training_without_the_first_of_a_ranking_changes():
    examples = influence.sequences(TEXTS)
    training = train.Training(TASK, RECIPE, examples, lambda seed: TABLE)
    (asked,) = influence.completions(TASK, {"a": ([1], [2])}).values()
    rng = np.random.default_rng(0)
    scores, words = (
        xr.DataArray(rng.normal(size=6), coords={"train": list(examples.ids)})
        for _ in range(2)
    )
    found = curve(training, 0, asked, scores, [1, 3], lexical=words, at_once=2)
    assert set(found.removed.sel(ranking="top").values).isdisjoint(
        found.removed.sel(ranking="random").values
    )
    for ranking, by in (("top", scores), ("bm25", words)):
        order = by.sortby(by, ascending=False)["train"].values[:3].tolist()
        assert found.removed.sel(ranking=ranking).values.tolist() == order
    before = measure(asked, training(np.ones(6), 0))
    for ranking in found["ranking"].values:
        for count in (1, 3):
            gone = found.removed.sel(ranking=ranking).values[:count]
            at = found.sel(ranking=ranking, count=count)
            assert float(at.predicted) == pytest.approx(
                -float(scores.sel(train=gone).sum())
            )
            weights = ~np.isin(examples.ids, gone)
            after = measure(asked, training(weights, 0))
            assert float(at.measured) == pytest.approx(after - before, abs=1e-6)


def test_a_curve_leaves_as_many_as_it_removes():
    scores = xr.DataArray(np.zeros(6), coords={"train": list("abcdef")})
    training = train.Training(TASK, RECIPE, influence.sequences(TEXTS), lambda _: TABLE)
    with pytest.raises(ValueError, match="4 of 6 .* Remove 3 at most"):
        curve(training, 0, lambda _: jnp.zeros(()), scores, [1, 4])


def test_a_curve_of_labels_is_what_training_without_predicting_them_changes():
    examples = influence.sequences([*TEXTS[:5], [1, 3]])
    training = train.Training(TASK, RECIPE, examples, lambda seed: TABLE)
    (asked,) = influence.completions(TASK, {"a": ([1], [2])}).values()
    # Eleven labels, and one place that has none, which no ranking may remove.
    counts = np.asarray(TASK.counts(examples.inputs))
    values = np.random.default_rng(0).normal(size=counts.shape)
    values[~counts] = 100
    scores = xr.DataArray(
        values, {"train": list(examples.ids)}, dims=("train", "token")
    )
    found = curve(training, 0, asked, scores, [1, 5], at_once=2)
    assert list(found["ranking"].values) == ["top", "random"]
    before = measure(asked, training(np.ones(6), 0))
    for ranking in ("top", "random"):
        gone = found.sel(ranking=ranking)
        rows = [examples.ids.index(x) for x in gone.removed.values]
        places = list(zip(rows, gone.position.values.tolist(), strict=True))
        assert all(counts[x] for x in places)
        for count in (1, 5):
            weights = np.ones(counts.shape)
            for place in places[:count]:
                weights[place] = 0
            after = measure(asked, training(weights, 0))
            at = gone.sel(count=count)
            assert float(at.measured) == pytest.approx(after - before, abs=1e-6)
            assert float(at.predicted) == pytest.approx(
                -sum(values[x] for x in places[:count])
            )
    labels = np.sort(values[counts])[::-1]
    assert float(found.predicted.sel(ranking="top", count=5)) == pytest.approx(
        -labels[:5].sum()
    )


def test_scores_of_other_labels_are_an_error():
    training = train.Training(TASK, RECIPE, influence.sequences(TEXTS), lambda _: TABLE)
    scores = xr.DataArray(np.zeros((6, 9)), dims=("train", "token"))
    with pytest.raises(ValueError, match=r"of \(6, 9\), and the training has \(6, 3\)"):
        curve(training, 0, lambda _: jnp.zeros(()), scores, [1])
