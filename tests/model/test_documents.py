"""Documents that share a row are to one another as if each had a row of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import influence
from influence import fold
from influence.curvature import covariance, eigenvalues
from influence.linalg.basis import Basis
from influence.model.check import check_batches, check_documents
from influence.model.examples import Examples
from influence.model.task import Empirical, LanguageModel, losses
from influence.model.trace import trace

V, D = 11, 6
DOCUMENTS = [[1, 2, 3, 4], [5, 6], [7], [8, 9, 10, 1, 2]]
ROW = 16


def attentive(params, tokens, segments=None):
    """A decoder of one block whose attention stays within segments."""
    x = params["embed"][tokens]
    q, k, v = (x @ params[name] for name in "qkv")
    seen = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None]
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])
    weights = jax.nn.softmax(jnp.where(seen, q @ k.mT, -1e9), axis=-1)
    return jnp.tanh(x + weights @ v) @ params["head"]


def crossing(params, tokens, segments=None):
    """The same decoder, deaf to segments."""
    del segments
    return attentive(params, tokens)


def random_params():
    shapes = {"embed": (V, D), "q": (D, D), "k": (D, D), "v": (D, D), "head": (D, V)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape, jnp.float64) / 2
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def packed(documents, counting=None):
    """Returns documents in one padded row, all or one of them counting."""
    numbers = [i for i, x in enumerate(documents, 1) for _ in x]
    padding = [0] * (ROW - len(numbers))
    tokens = np.array([[*sum(documents, []), *padding]], np.int32)
    segments = np.array([[*numbers, *padding]], np.int32)
    counts = segments > 0 if counting is None else segments == counting
    inputs = {"tokens": tokens, "counts": counts, "segments": segments}
    return filled(Examples(inputs, ("row",)))


def rows(documents):
    """Returns the same row twice, under two names."""
    (batch,) = packed(documents)
    return Examples(batch.inputs, ("row", "again")).batches(2)


def alone(document):
    return filled(influence.sequences([document]))


def filled(example):
    """Returns one example and a row that fills up the batch."""
    (batch,) = example.batches(1)
    two = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), batch)
    return [two._replace(real_B=np.array([True, False]))]


TASK = LanguageModel(attentive)


@pytest.fixture(scope="module")
def params():
    return random_params()


LONG = [x for x in DOCUMENTS if len(x) > 1]


def test_the_first_token_of_a_document_is_no_label():
    (batch,) = packed([[1, 2, 3], [4], [5, 6]])
    counts = TASK.counts(batch.inputs)
    np.testing.assert_array_equal(counts[0, :7], [1, 1, 0, 0, 1, 0, 0])


def test_counted_positions_are_those_before_a_label_of_their_own_document():
    (batch,) = packed([[1, 2, 3], [4], [5, 6, 7]])
    inputs = {**batch.inputs, "counts": batch.inputs["counts"].copy()}
    inputs["counts"][0, 2] = False  # The last token of the first document.
    counted = TASK.counted(inputs)
    np.testing.assert_array_equal(counted[0, :8], [1, 0, 0, 0, 1, 1, 0, 0])


@pytest.mark.parametrize("seed", range(5))
def test_counted_positions_are_the_definition_s(seed):
    rng = np.random.default_rng(seed)
    documents = [[1] * n for n in rng.integers(1, 5, 4)]
    (batch,) = packed(documents)
    inputs = {**batch.inputs, "counts": rng.random((2, ROW)) < 0.4}
    inputs["counts"] &= inputs["segments"] > 0
    segments, labels = inputs["segments"][0], np.asarray(TASK.counts(inputs))[0]
    expected = [
        any(labels[s] and segments[s] == segments[t] for s in range(t, ROW))
        for t in range(ROW)
    ]
    np.testing.assert_array_equal(TASK.counted(inputs)[0], expected)


def test_a_row_s_loss_is_the_sum_of_its_documents(params):
    def total(batches):
        (batch,) = batches
        outputs = TASK.outputs(params, batch.inputs)
        return losses(TASK, outputs, TASK.labels(batch.inputs), batch).sum()

    expected = sum(float(total(alone(x))) for x in LONG)
    np.testing.assert_allclose(total(packed(DOCUMENTS)), expected, rtol=1e-12)


def moments(params, batches):
    layers = _layers(params, batches)
    return fold.run(covariance.fold(TASK, params, layers, Empirical()), batches)


def curvature(params, batches, bases):
    layers = _layers(params, batches)
    one_pass = eigenvalues.fold(TASK, params, layers, Empirical(), bases)
    return fold.run(one_pass, batches).lam


def _layers(params, batches):
    (batch,) = batches
    return tuple(trace(TASK.outputs, params, batch.inputs).layers)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_document_s_curvature_does_not_depend_on_its_neighbours(params, number):
    document = DOCUMENTS[number - 1]
    among = packed(DOCUMENTS, counting=number)
    found, expected = moments(params, among), moments(params, alone(document))
    assert found.positions == expected.positions
    for side in ("inputs", "gradients"):
        close(getattr(found, side), getattr(expected, side))
    layers = _layers(params, among)
    bases = eigenvalues.Bases(
        {x.reads: Basis((_turn(x.columns),)) for x in layers},
        {x.name: Basis((_turn(x.outputs),)) for x in layers},
    )
    close(curvature(params, among, bases), curvature(params, alone(document), bases))


def test_a_row_s_covariances_are_those_of_its_documents_pooled(params):
    found = moments(params, packed(DOCUMENTS))
    one_each = influence.sequences(LONG).batches(2)
    layers = _layers(params, packed(DOCUMENTS))
    one_pass = covariance.fold(TASK, params, layers, Empirical())
    expected = fold.run(one_pass, one_each)
    assert found.positions == expected.positions
    close(found.inputs, expected.inputs)
    close(found.gradients, expected.gradients)


def close(found, expected):
    jax.tree.map(
        # Sums of the same numbers, in the order of another length of row.
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-13),
        found,
        expected,
    )


def _turn(size):
    square = np.random.default_rng(size).standard_normal((size, size))
    return jnp.asarray(np.linalg.qr(square)[0])


def test_a_model_deaf_to_segments_is_refused(params):
    (batch,) = packed(DOCUMENTS)
    check_documents(TASK, params, batch)
    with pytest.raises(ValueError, match="lets documents of one row see each other"):
        check_documents(LanguageModel(crossing), params, batch)
    with pytest.raises(ValueError, match="or leave the segments out"):
        influence.fit(LanguageModel(crossing), params, rows(DOCUMENTS))


def test_the_first_row_of_several_documents_is_looked_at_wherever_it_is(params):
    (first,), (second,) = packed(DOCUMENTS[:1]), packed(DOCUMENTS)
    inputs = jax.tree.map(
        lambda x, y: np.concatenate([x, y]), first.inputs, second.inputs
    )
    later = Examples(inputs, tuple("abcd")).batches(2)
    with pytest.raises(ValueError, match="lets documents of one row see each other"):
        influence.fit(LanguageModel(crossing), params, later)


def test_rows_of_one_document_have_nothing_to_tell_apart(params):
    (batch,) = packed(DOCUMENTS[:1])
    check_documents(LanguageModel(crossing), params, batch)
    (batch,) = alone(DOCUMENTS[0])
    check_documents(LanguageModel(crossing), params, batch)


@pytest.mark.parametrize(
    ("segments", "counts", "said"),
    [
        ([1, 1, 2, 1], [1, 1, 1, 1], "from document 2 to 1 after position 2"),
        ([1, 0, 0, 2], [1, 0, 0, 1], "from document 0 to 2 after position 2"),
        ([1, 1, 2, 0], [1, 1, 1, 1], "counts at position 3, which belongs to no"),
    ],
)
def test_documents_that_are_torn_are_refused(params, segments, counts, said):
    inputs = {
        "tokens": np.array([[1, 2, 3, 4]]),
        "counts": np.array([counts], bool),
        "segments": np.array([segments]),
    }
    with pytest.raises(ValueError, match=said):
        check_batches(TASK, params, Examples(inputs, ("row",)).batches(1))
