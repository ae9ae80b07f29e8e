"""A sketch as long as gradients loses nothing; a shorter one is right on average."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from influence.attribution.countsketch import (
    _short,
    _together,
    added,
    asked,
    count_sketch,
    length_of,
    mixed,
    reader,
)
from influence.attribution.forms import Dense, dense
from influence.attribution.measurements import completions
from influence.attribution.query import query
from influence.attribution.scan import scan
from influence.curvature.covariance import PerToken
from influence.curvature.ekfac import fit
from influence.curvature.leading import Directions, leading, of_matrix
from influence.curvature.solvers import Eigenbasis
from influence.linalg.basis import Basis
from influence.linalg.damping import Absolute, Relative
from influence.model.task import LanguageModel
from tests import cases

ROUNDING = 1e-9  # float64; scores are of the order of one.


@cache
def made(make, bias=True, layers="*"):
    """Returns what is needed: a case, its curvature and the scores of a scan."""
    case = cases.case(cases.MAKERS[make], bias)
    batches = case.examples.batches(3)
    curvature = fit(case.task, case.params, batches, layers=layers)
    measured = completions(case.task, {"a": ([1, 2], [3]), "b": ([4], [5, 6])})
    solved = query(curvature, case.params, measured)
    scores = scan(case.task, case.params, solved, batches, n_train=1)
    return case, batches, curvature, solved, scores.total.values


def products(case, batches, sketch, solved):
    """Returns what the sketches make of the scores, `[Q, N]`."""
    read = reader(case.task, case.params, sketch)
    short_NxK = np.concatenate([np.asarray(read(x))[x.real_B] for x in batches])
    return -np.asarray(asked(sketch, solved)) @ short_NxK.T


@pytest.mark.parametrize(
    "make",
    cases.thinned(
        ["raw-loop", "raw-scan-remat", "nnx-scan"], ["raw-loop", "raw-scan-remat"]
    ),
)
def test_a_sketch_with_room_for_every_coordinate_is_exact(make):
    case, batches, curvature, solved, scores = made(make)
    size = sum(x.lam_OxI.size for x in curvature.blocks.values())
    for inverse in (Relative(), Absolute(3.0)):  # Whatever the query was solved with.
        sketch = count_sketch(curvature, length=size, inverse=inverse)
        found = products(case, batches, sketch, solved)
        np.testing.assert_allclose(found, scores, atol=ROUNDING)


@cache
def with_long_sides(blocks=1):
    """Returns a case whose stacked layers have sides two and three times the other.

    `short` reads what `long` reads, and is itself half as wide as that.
    """

    def block(x, w):
        return x + jax.numpy.tanh(x @ w["long"]) @ w["back"] + x @ w["short"] @ w["up"]

    def apply(params, tokens_BxT):
        x = params["embed"][tokens_BxT]
        x, _ = jax.lax.scan(lambda x, w: (block(x, w), None), x, params["blocks"])
        return x @ params["head"]

    sizes = {"long": (4, 12), "back": (12, 4), "short": (4, 2), "up": (2, 4)}
    shapes = {"embed": (cases.V, 4), "head": (4, cases.V)}
    params = {
        **{k: jax.numpy.zeros(x) for k, x in shapes.items()},
        "blocks": {k: jax.numpy.zeros((2, *x)) for k, x in sizes.items()},
    }
    params = cases.randomised(params, jax.numpy.float64)
    case = cases.Case(LanguageModel(apply), params, cases.texts(7))
    batches, factors = case.examples.batches(3), PerToken(blocks)
    layers = ["blocks.*", "head"]
    return case, fit(case.task, params, batches, layers=layers, factors=factors)


def few(curvature, kept=0.9, inverse=Relative()):
    """Returns leading directions, and checks that they are not all."""
    found = leading(curvature, inverse, kept=kept, least=0.2)
    sides = found.inputs.values(), found.outputs.values()
    assert not all(x.whole for side in sides for x in side)
    return found


def test_of_leading_directions_only_the_corner_is_missing():
    case, curvature = with_long_sides()
    batches = case.examples.batches(3)
    measured = completions(case.task, {"a": ([1, 2], [3])})
    solved = query(curvature, case.params, measured)
    directions = few(curvature)
    expected = 0.0
    for x in curvature.layers:
        h = dense(solved.forms[x.name]).h_QxOxI
        u, v = directions.of(x)
        p, q = (
            (y.dense(n) @ y.dense(n).mT)[..., None, :, :]
            for y, n in ((u, x.outputs), (v, x.columns))
        )
        kept = p @ h + h @ q - p @ h @ q
        part = replace(solved, layers=(x,), forms={x.name: Dense(kept)})
        own = scan(case.task, case.params, part, batches, n_train=1)
        expected = expected + own.total.values
    size = directions.count(curvature.layers)
    for length in (size, None):  # Of the second, sums are mixed.
        sketch = count_sketch(curvature, length=length, directions=directions)
        found = products(case, batches, sketch, solved)
        np.testing.assert_allclose(found, expected, atol=ROUNDING)


@pytest.mark.parametrize(("all_of", "blocks"), [(True, 1), (False, 1), (False, 2)])
def test_weights_are_those_with_the_least_product_of_lengths(all_of, blocks):
    # With gradients of covariance C, damped, and queries of covariance C⁻¹, coordinates
    # have the variances `c` and `q`; Cauchy and Schwarz:
    # Σ c w² Σ q / w² ≥ (Σ √(c q))², layer by layer.
    _, curvature = with_long_sides(blocks)
    damping = Relative()
    directions = None if all_of else few(curvature)
    sketch = count_sketch(curvature, length=24, inverse=damping, directions=directions)
    for x in sketch.layers:
        whole, own = curvature.blocks[x.name], sketch.directions.of(x)
        for place in range(whole.lam_OxI.shape[0]) if "blocks" in x.name else [...]:
            block, taken = jax.tree.map(lambda x, place=place: x[place], (whole, own))
            inverse_OxI = damping(whole.lam_OxI)[place]
            c = variances(block, taken, 1 / inverse_OxI)
            q = variances(block, taken, inverse_OxI)
            w = np.asarray(abs(sketch.scales[x.name][place]))
            found = (c * w**2).sum() * (q / w**2).sum()
            np.testing.assert_allclose(found, np.sqrt(c * q).sum() ** 2, rtol=ROUNDING)


def variances(block, taken, lam_OxI):
    """Returns what coordinates vary by, given eigenvalues, one by one."""
    covariance = np.asarray(block._replace(lam_OxI=lam_OxI).dense())
    size = lam_OxI.size
    eye = jax.numpy.eye(size).reshape(size, *lam_OxI.shape)
    q = np.asarray(of_matrix(eye, *taken))
    return np.einsum("ai,ab,bi->i", q, covariance, q)


def test_mixing_is_a_rotation_after_which_no_number_stands_out():
    x = np.random.default_rng(0).normal(size=(5, 64 * 3))
    y = np.asarray(mixed(jax.numpy.asarray(x)))
    np.testing.assert_allclose(y @ y.T, x @ x.T, atol=ROUNDING)
    one = np.asarray(mixed(jax.numpy.zeros(64 * 3).at[5].set(8.0)))
    assert sorted(abs(one)) == pytest.approx([0.0] * 128 + [1.0] * 64)
    # Of a length that 64 does not divide nothing is mixed.
    np.testing.assert_array_equal(mixed(jax.numpy.asarray(x[:, :96])), x[:, :96])


def test_a_weight_that_is_used_twice_is_sketched_once():
    def apply(params, tokens_BxT):
        x = params["embed"][tokens_BxT]
        for _ in range(2):
            x = x + jax.numpy.tanh(x @ params["w"])
        return x @ params["head"]

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"embed": (cases.V, 4), "w": (4, 4), "head": (4, cases.V)}
    params = {
        k: jax.random.normal(key, x)
        for (k, x), key in zip(shapes.items(), keys, strict=True)
    }
    case = cases.Case(LanguageModel(apply), params, cases.texts(7))
    batches = case.examples.batches(3)
    curvature = fit(case.task, params, batches, layers=["w", "head"])
    solved = query(curvature, params, completions(case.task, {"a": ([1, 2], [3])}))
    scores = scan(case.task, params, solved, batches, n_train=1).total.values
    sketch = count_sketch(curvature, length=4 * 4 + 4 * cases.V)
    found = products(case, batches, sketch, solved)
    np.testing.assert_allclose(found, scores, atol=ROUNDING)


def test_a_short_sketch_is_right_on_average_and_errs_as_its_length_says():
    case, batches, curvature, solved, scores = made("raw-loop")
    length, draws = 64, 60
    found = np.stack(
        [
            products(
                case, batches, count_sketch(curvature, length=length, seed=i), solved
            )
            for i in range(draws)
        ]
    )
    size = sum(x.lam_OxI.size for x in curvature.blocks.values())
    whole = count_sketch(curvature, length=size)
    read = reader(case.task, case.params, whole)
    u = np.concatenate([np.asarray(read(x))[x.real_B] for x in batches])
    v = np.asarray(asked(whole, solved))
    squares = (v**2).sum(1)[:, None] * (u**2).sum(1)[None]
    bound = np.sqrt((squares + scores**2) / length)
    # Five standard errors of a mean: one of a million such means is further off.
    assert (abs(found.mean(0) - scores) < 5 * bound / draws**0.5).all()
    # Of 60 draws a spread is known to a tenth; two sequences may differ by three.
    assert (found.std(0) < 1.3 * bound).all()


def test_nothing_depends_on_how_sequences_are_batched():
    case, _, curvature, solved, _ = made("raw-scan-remat")
    sketch = count_sketch(curvature, length=40)
    one, other = (
        products(case, case.examples.batches(size), sketch, solved) for size in (1, 4)
    )
    np.testing.assert_allclose(one, other, atol=ROUNDING)


def test_a_query_by_another_solver_has_the_scores_of_that_solver():
    case, batches, curvature, _, _ = made("raw-loop")
    measured = completions(case.task, {"a": ([1, 2], [3])})
    solved = query(curvature, case.params, measured, solver=Eigenbasis(Absolute(0.5)))
    scores = scan(case.task, case.params, solved, batches, n_train=1).total.values
    size = sum(x.lam_OxI.size for x in curvature.blocks.values())
    sketch = count_sketch(curvature, length=size, inverse=Relative(10.0))
    found = products(case, batches, sketch, solved)
    np.testing.assert_allclose(found, scores, atol=ROUNDING)


def test_what_makes_no_sense_is_refused():
    case, _, curvature, _, _ = made("raw-loop")
    with pytest.raises(ValueError, match="1 number at least, not 0"):
        count_sketch(curvature, length=0)
    less = fit(case.task, case.params, case.examples.batches(3), layers="*up*")
    measured = completions(case.task, {"a": ([1, 2], [3])})
    solved = query(less, case.params, measured)
    with pytest.raises(ValueError, match="they differ"):
        asked(count_sketch(curvature, length=8), solved)


@pytest.mark.parametrize(
    ("size", "parts"), [(2, 8), (3, 8), (10, 8), (504, 8), (8191, 8), (8192, 64)]
)
def test_lengths_fit_and_have_one_large_factor(size, parts):
    length = length_of(size)
    assert length <= 8 * size
    prime = length // parts
    assert length % parts == 0
    assert all(prime % k for k in range(2, prime))


def test_signs_are_drawn_anew_by_another_seed():
    _, _, curvature, _, _ = made("raw-loop")
    first, again, other = (count_sketch(curvature, length=8, seed=i) for i in (0, 0, 1))
    name = curvature.layers[0].name
    assert jax.numpy.array_equal(first.scales[name], again.scales[name])
    assert not jax.numpy.array_equal(first.scales[name], other.scales[name])


def test_the_queries_of_a_matrix_are_made_short_one_at_a_time():
    size, length = 64, 24
    whole, one = Basis((jnp.eye(size),)), jnp.ones((size, size))

    def temporary(queries):
        h_QxOxI = jnp.broadcast_to(one, (queries, size, size))
        program = _short.lower(length, whole, whole, one.ravel(), h_QxOxI).compile()
        memory = program.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    # Less than one more matrix: what grows are their few numbers, `[Q, K]`.
    assert temporary(32) - temporary(2) < one.nbytes


@pytest.mark.parametrize("length", [5, 16, 40, 1000])
def test_vectors_follow_one_another_as_if_in_one_row(length):
    sizes = (7, 16, 3, 40, 2, 5)
    coordinates = [cases.normal(i, (3, n)) for i, n in enumerate(sizes)]
    pieces = [added(x, length) for x in coordinates]
    row = np.concatenate(coordinates, axis=1)
    row = np.pad(row, ((0, 0), (0, -row.shape[1] % length)))
    expected = row.reshape(3, -1, length).sum(1)
    found = _together(length, sizes, pieces)
    np.testing.assert_allclose(found, expected, atol=ROUNDING)


def test_models_of_more_coordinates_than_32_bits_count_are_asked():
    _, _, curvature, solved, _ = made("raw-loop")
    x = curvature.layers[0]
    layers = tuple(x._replace(name=name, reads=name) for name in ("a", "b"))
    sketch = count_sketch(curvature, length=24)

    def short(scale_OxI, h_QxOxI):
        plain = {y.name: Basis(()) for y in layers}
        scales = dict.fromkeys(plain, scale_OxI.ravel())
        taken = Directions(plain, plain)
        own = replace(sketch, layers=layers, directions=taken, scales=scales)
        forms = {name: Dense(h_QxOxI) for name in plain}
        return asked(own, replace(solved, layers=layers, forms=forms))

    with jax.enable_x64(False):
        one = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)
        each = jax.ShapeDtypeStruct((2, *one.shape), jnp.float32)
        assert jax.eval_shape(short, one, each).shape == (2, 24)
