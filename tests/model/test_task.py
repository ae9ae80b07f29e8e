"""What counts, what it costs, and how labels are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import influence
from influence.model.examples import keys, prompted
from influence.model.task import LanguageModel, Sampled, draw, losses
from tests import cases

TASK = LanguageModel(lambda params, tokens: params[tokens])
TABLE = cases.normal(0, (11, 11))
"""A model whose next token depends on the last alone: logits are a table's rows."""


def test_a_loss_is_the_sum_over_next_tokens_that_count():
    (batch,) = influence.sequences([[1, 2, 3], [4, 5]]).batches(2)
    outputs = TASK.outputs(TABLE, batch.inputs)
    found = losses(TASK, outputs, TASK.labels(batch.inputs), batch)
    log_p = jax.nn.log_softmax(TABLE, axis=-1)
    expected = [-(log_p[1, 2] + log_p[2, 3]), -log_p[4, 5]]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_counted_positions_are_those_a_label_can_be_reached_from():
    (batch,) = influence.sequences([[1, 2, 3, 4], [5, 6]]).batches(2)
    np.testing.assert_array_equal(
        TASK.counted(batch.inputs), [[1, 1, 1, 0], [1, 0, 0, 0]]
    )
    # The prompt is counted, though none of its own tokens is a label that counts.
    inputs = prompted({"a": ([1, 2], [3]), "b": ([4], [5, 6])}).inputs
    np.testing.assert_array_equal(TASK.counts(inputs), [[0, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(TASK.counted(inputs), [[1, 1, 0], [1, 1, 0]])


def test_rows_that_fill_up_a_batch_cost_nothing():
    *_, last = influence.sequences([[1, 2, 3], [4, 5], [6, 7]]).batches(2)
    outputs = TASK.outputs(TABLE, last.inputs)
    found = losses(TASK, outputs, TASK.labels(last.inputs), last)
    assert found[0] > 0
    assert found[1] == 0


def test_labels_hang_on_nothing_but_seed_name_draw_and_position():
    long = influence.sequences([[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]], ["a", "b", "c"])
    short = influence.sequences([[8, 9, 10], [6, 7]], ["c", "b"])

    def labels(examples, size, seed=0, draw=0):
        found = {}
        for start, batch in enumerate(examples.batches(size)):
            outputs = TASK.outputs(TABLE, batch.inputs)
            rows = Sampled(seed)(TASK, outputs, batch, jnp.uint32(draw))
            names = examples.ids[start * size : (start + 1) * size]
            found |= dict(zip(names, np.asarray(rows), strict=False))
        return found

    whole, parts, others = labels(long, 3), labels(long, 1), labels(short, 2)
    for name in "abc":
        np.testing.assert_array_equal(whole[name], parts[name])
    np.testing.assert_array_equal(whole["c"][:3], others["c"][:3])
    np.testing.assert_array_equal(whole["b"][:2], others["b"][:2])
    assert any((whole[k] != labels(long, 3, seed=1)[k]).any() for k in "abc")
    assert any((whole[k] != labels(long, 3, draw=1)[k]).any() for k in "abc")


def test_draws_follow_the_softmax():
    n = 20_000
    logits = jnp.broadcast_to(TABLE[:1], (n, 11))
    found = draw(jax.random.split(jax.random.key(1), n), logits)
    share = np.bincount(np.asarray(found), minlength=11) / n
    expected = np.asarray(jax.nn.softmax(TABLE[0]))
    # Five standard deviations of a share of `n` draws.
    tolerance = 5 * np.sqrt(expected * (1 - expected) / n)
    assert (np.abs(share - expected) < tolerance).all()


def test_a_class_of_no_probability_is_never_drawn():
    logits = jnp.array([[-jnp.inf, 0.0, -jnp.inf, 0.0, -jnp.inf]])
    rows = jnp.broadcast_to(logits, (1000, 5))
    found = draw(jax.random.split(jax.random.key(2), 1000), rows)
    assert set(np.asarray(found).tolist()) == {1, 3}


def test_the_key_of_an_example_is_its_name_s_alone():
    assert (keys(["x", "y"])[1] == keys(["y"])[0]).all()
    assert (keys(["x"]) != keys(["y"])).any()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: influence.sequences([]), "There are no examples"),
        (lambda: influence.sequences([[1, 2], [3]], ["a", "b"]), "'b' has 1 tokens"),
        (lambda: influence.sequences([[1, 2], [3, 4]], ["a"]), "1 ids were given"),
        (
            lambda: influence.sequences([[1, 2], [3, 4]], ["a", "a"]),
            "'a' names several",
        ),
        (lambda: influence.sequences([[1, 2]]).batches(0), "at least one example"),
        (lambda: prompted({"q": ([1], [])}), "completion of 'q' is empty"),
        (lambda: prompted({"q": ([], [1])}), "prompt of 'q' is empty"),
        (lambda: prompted({}), "There are no examples"),
    ],
)
def test_data_that_would_mean_nothing_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_batches_have_one_shape_and_every_example_once():
    examples = cases.texts(7)
    batches = examples.batches(3)
    assert len(batches) == 3
    rows = [b.inputs["tokens"][b.real_B] for b in batches]
    np.testing.assert_array_equal(np.concatenate(rows), examples.inputs["tokens"])
    assert {b.inputs["tokens"].shape for b in batches} == {(3, cases.T)}
    assert list(batches.ids) == list(examples.ids)
