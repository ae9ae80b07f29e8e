"""Queries are most of the memory, and are held once: counted in arrays and by XLA."""

from dataclasses import dataclass, field
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import influence
from influence.attribution import scan
from influence.attribution.forms import Factored, Joint, Plain, Whitened, dense
from influence.attribution.gradients import gradients, placed, stacked
from influence.attribution.measurements import Likelihood
from influence.attribution.query import solved
from influence.attribution.streamed import readable, streamed
from influence.curvature.solvers import Eigenbasis, Solver
from influence.model.task import Empirical
from influence.types import rows

DEPTH, WIDTH, QUERIES, VOCABULARY = 4, 48, 40, 11


def apply(params, tokens):
    """Returns logits of a residual stream of squares."""
    x = params["embed"][tokens]
    for w in params["blocks"]:
        x = x + jnp.tanh(x @ w)
    return x @ params["head"]


@cache
def fitted():
    """Returns a model, its data, its curvature and what is asked."""
    draw = partial(jax.random.normal, dtype=jnp.float64)
    keys = jax.random.split(jax.random.key(0), DEPTH + 2)
    params = {
        "embed": draw(keys[0], (VOCABULARY, WIDTH)),
        "blocks": [draw(k, (WIDTH, WIDTH)) / WIDTH for k in keys[2:]],
        "head": draw(keys[1], (WIDTH, VOCABULARY)),
    }
    task = influence.LanguageModel(apply)
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(6, 5)).tolist()
    batches = influence.sequences(tokens, [str(i) for i in range(6)]).batches(3)
    curvature = influence.fit(
        task, params, batches, layers="blocks.*", labels=Empirical()
    )
    asked = influence.completions(
        task, {str(i): ([i % VOCABULARY, i // 3 % 7], [i % 5]) for i in range(QUERIES)}
    )
    return task, params, batches, curvature, asked


@dataclass(frozen=True)
class Weighing(influence.Curvature):
    """A curvature that writes down how many bytes of arrays there are as it solves."""

    seen: list = field(default_factory=list)

    def rotated(self, gradients):
        return self.noted(super().rotated(gradients))

    def unrotated(self, gradients):
        return self.noted(super().unrotated(gradients))

    def noted(self, found):
        self.seen.append(held())
        return found


class Noting(Likelihood):
    """A log-probability that does the same when its turn comes."""

    seen = []

    def check(self, name, params):
        self.seen.append(held())


jax.tree_util.register_dataclass(Noting, ["inputs"], ["task"])


def held():
    return sum(x.nbytes for x in jax.live_arrays())


@pytest.mark.parametrize("compress", [None, Plain(2), Joint(2)])
def test_queries_are_never_held_twice(compress):
    task, params, batches, curvature, asked = fitted()
    # As any function of parameters is asked.
    asked = {k: partial(Likelihood.__call__, f) for k, f in asked.items()}
    assert not readable(asked, curvature.layers, compress)
    layer = QUERIES * WIDTH**2 * 8
    weighing = Weighing(**vars(curvature))
    before = held()
    influence.query(weighing, params, asked, compress=compress)
    seen = [x - before for x in weighing.seen]
    assert len(seen) == DEPTH * (1 if compress else 2)
    # One layer is there twice, and what it is solved from is there still.
    assert max(seen) < (DEPTH + 1.5) * layer


@pytest.mark.parametrize("compress", [None, Plain(2), Whitened(2)])
def test_log_probabilities_are_kept_one_by_one(compress):
    task, params, batches, curvature, asked = fitted()
    asked = {k: Noting(f.task, f.inputs) for k, f in asked.items()}
    assert readable(asked, curvature.layers, compress)
    before, Noting.seen = held(), []
    query = influence.query(curvature, params, asked, compress=compress)
    assert len(Noting.seen) == QUERIES
    kept = sum(x.nbytes for x in jax.tree.leaves(query.forms))
    one = DEPTH * WIDTH**2 * 8
    # Beside what is kept of all of them no other is left when one's turn comes.
    assert max(Noting.seen) - before < kept + 0.1 * one


def test_queries_come_together_without_a_copy_of_them():
    one = (jnp.arange(3.0), {"of a stack": jnp.arange(24.0).reshape(2, 3, 4)})
    each = [jax.tree.map(lambda x, i=i: x + i, one) for i in range(5)]
    axes = (0, {"of a stack": 1})
    found = stacked(iter(each), 5, axes)
    expected = jax.tree.map(lambda q, *x: jnp.stack(x, q), axes, *each)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    memory = placed.lower((0, 1), found, one, 1).compile().memory_analysis()
    assert memory is not None
    # What holds all of them is written to where it is, in no more than one's room.
    kept, own = (sum(x.nbytes for x in jax.tree.leaves(y)) for y in (found, one))
    assert memory.alias_size_in_bytes == kept
    assert memory.temp_size_in_bytes <= own


def test_gradients_are_those_of_each_measurement():
    task, params, batches, curvature, asked = fitted()
    found, values = gradients(curvature.layers, params, asked)
    assert values == pytest.approx([float(f(params)) for f in asked.values()])
    for place, f in enumerate(asked.values()):
        for i, w in enumerate(jax.grad(f)(params)["blocks"]):
            own = found[curvature.layers[i].name][place]
            np.testing.assert_allclose(own, w.T, atol=1e-12)  # rounding


def mixed(params, tokens):
    """Returns logits of stacked layers, one input for two, and of a shared one."""
    x = params["embed"][tokens]

    def block(x, own):
        gate = jnp.tanh(x @ own["gate"] + own["bias"][None, None])
        return x + gate * (x @ own["up"]), None

    x, _ = jax.lax.scan(block, x, params["blocks"])
    for _ in range(2):
        x = x + jnp.tanh(x @ params["twice"])
    return x @ params["head"]


@cache
def fitted_to_mixed():
    """Returns the same as `fitted` of a model with layers of every sort."""
    draw = partial(np.random.default_rng(0).normal, scale=0.3)
    blocks = {"gate": draw(size=(3, 6, 6)), "up": draw(size=(3, 6, 6))}
    params = {
        "embed": draw(size=(VOCABULARY, 6)),
        "blocks": {**blocks, "bias": draw(size=(3, 6))},
        "twice": draw(size=(6, 6)),
        "head": draw(size=(6, VOCABULARY)),
    }
    params = jax.tree.map(jnp.asarray, params)
    task = influence.LanguageModel(mixed)
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(6, 5)).tolist()
    batches = influence.sequences(tokens, [str(i) for i in range(6)]).batches(3)
    curvature = influence.fit(task, params, batches, layers=("blocks.*", "twice"))
    asked = influence.completions(task, {"one": ([1, 2], [3, 4]), "two": ([5], [0])})
    return task, params, batches, curvature, asked


class Outside(Eigenbasis):
    """The same solver, taken as any other is: its solutions leave the eigenbasis."""

    taken = Solver.taken


@pytest.mark.parametrize("model", [fitted, fitted_to_mixed])
@pytest.mark.parametrize("compress", [None, Plain(2), Whitened(2)])
def test_queries_read_one_by_one_are_those_solved_together(model, compress):
    _, params, _, curvature, asked = model()
    kept = streamed(curvature, params, asked, Eigenbasis(), compress)
    found, values = gradients(curvature.layers, params, asked)
    expected = solved(
        curvature, params, found, {"value": values}, asked, Eigenbasis(), compress
    )
    facts = dict(expected.facts)
    np.testing.assert_allclose(kept.value, facts["value"], rtol=1e-12)  # rounding
    # Rounding, and what the inverse makes of it.
    np.testing.assert_allclose(kept.own, facts["self"], rtol=1e-9)
    share = kept.kept / kept.energy
    np.testing.assert_allclose(share, facts.get("energy_kept", 1), rtol=1e-9)
    for name, form in expected.forms.items():
        h, other = (dense(x).h_QxOxI for x in (form, kept.forms[name]))
        np.testing.assert_allclose(h, other, atol=1e-8 * float(jnp.abs(h).max()))


@pytest.mark.parametrize("compress", [None, Plain(2), Whitened(2), Joint(2)])
@pytest.mark.parametrize("model", [fitted, fitted_to_mixed])
def test_solved_in_the_eigenbasis_or_not_queries_are_the_same(model, compress):
    _, params, _, curvature, asked = model()
    found, _ = gradients(curvature.layers, params, asked)
    own = dict(found)
    left = solved(curvature, params, own, {}, asked, Eigenbasis(), compress)
    assert own == {}
    back = solved(curvature, params, found, {}, asked, Outside(), compress)
    for (name, x), (other, y) in zip(left.facts, back.facts, strict=True):
        assert name == other
        np.testing.assert_allclose(x, y, rtol=1e-9)  # rounding
    # Rounding, and what gaps of singular values make of it.
    for name, form in left.forms.items():
        h, other = (dense(x).h_QxOxI for x in (form, back.forms[name]))
        np.testing.assert_allclose(h, other, atol=1e-8 * float(jnp.abs(h).max()))


def test_layers_of_every_sort_are_among_those_read():
    curvature = fitted_to_mixed()[3]
    by_name = {x.name: x for x in curvature.layers}
    assert by_name["blocks.gate"].stack == (3,)
    assert by_name["blocks.gate"].bias == "blocks.bias"
    assert "twice" in by_name


def test_only_many_log_probabilities_are_read_in_the_eigenbasis():
    _, params, _, curvature, asked = fitted()
    few = dict(list(asked.items())[:4])
    assert not readable(few, curvature.layers, None)
    others = {**asked, "norm": lambda p: p["head"].sum()}
    assert not readable(others, curvature.layers, None)
    (layer, *_) = curvature.layers
    assert not readable(asked, [layer._replace(kind="embedding")], None)
    assert not readable(asked, curvature.layers, Joint(2))
    lost = {**params, "head": params["head"].at[:, 0].set(-jnp.inf)}
    with pytest.raises(ValueError, match="'lost' is nan"):
        streamed(curvature, lost, {"lost": asked["0"]}, Eigenbasis(), None)


def test_what_is_taken_is_what_is_solved():
    task, params, batches, curvature, asked = fitted()
    found, _ = gradients(curvature.layers, params, asked)
    solvers = [
        Eigenbasis(),
        influence.ConjugateGradients(task, batches, steps=2, tolerance=0),
    ]
    for solver in solvers:
        expected = solver(curvature, params, found).solved
        given = dict(found)
        taken = solver.taken(curvature, params, given)
        assert given == {}
        own = sum((found[k] * x).sum((1, 2)) for k, x in expected.items())
        np.testing.assert_allclose(taken.own_Q, own, rtol=1e-9)  # order of sums
        own = taken.solution.solved
        own = curvature.unrotated(own) if taken.turned else own
        for k, x in expected.items():
            np.testing.assert_allclose(own[k], x, rtol=1e-12)  # order of products


def test_queries_of_low_rank_are_made_matrices_a_few_at_a_time():
    task, params, batches, curvature, asked = fitted()
    # Longer than the test's other data, so that matrices are the cheaper form.
    tokens = np.zeros((3, 64), int).tolist()
    long = influence.sequences(tokens, ["a", "b", "c"]).batches(3)
    query = influence.query(curvature, params, asked, compress=Plain(4))
    form = next(iter(query.forms.values()))
    assert isinstance(form, Factored)
    assert scan.cheaper(3, 64, form) is dense
    (batch,) = long

    def temporary(query, reading):
        program = scan._read.lower(
            task, query.layers, reading, params, query.forms, batch
        )
        said = program.compile().memory_analysis()
        assert said is not None
        return said.temp_size_in_bytes

    matrices = QUERIES * WIDTH**2 * 8 * len(rows(query.layers))
    extra = temporary(query, scan.CHEAPEST) - temporary(
        query.in_form(dense), scan.CHEAPEST
    )
    assert extra < matrices / 4
    whole = influence.scan(task, params, query, long, form=dense).total
    found = influence.scan(task, params, query, long).total
    np.testing.assert_allclose(found, whole, rtol=1e-9)  # order of sums
