"""Sites: what is read or replaced is what a model written by hand has there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from influence.model.sites import (
    Address,
    addresses,
    frozen,
    read,
    replaced,
    visited,
)

STEPS, D = 4, 3
NAMED = [Address(name, i) for name in ("enter", "inner") for i in range(STEPS)]


def weights():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(STEPS, D, D)) / D**0.5)


def start():
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, D)))


def step(x, w):
    x = checkpoint_name(x, "enter")
    inner = checkpoint_name(jnp.tanh(x @ w), "inner")
    return x + inner, inner.sum(-1)


def loop(w, x, step=step):
    out = []
    for own in w:
        x, y = step(x, own)
        out.append(y)
    return x, jnp.stack(out)


def scan(w, x, step=step):
    return jax.lax.scan(step, x, w)


def nested(w, x):
    x, y = jax.lax.scan(lambda x, w: scan(w, x), x, w.reshape(2, STEPS // 2, D, D))
    return x, y.reshape(STEPS, -1)


def backwards(w, x):
    x, y = jax.lax.scan(step, x, w[::-1], reverse=True)
    return x, y[::-1]


MODELS = {
    "loop": loop,
    "scan": scan,
    "nested scan": nested,
    "backwards": backwards,
    "jitted step": lambda w, x: loop(w, x, jax.jit(step)),
    "loop remat": lambda w, x: loop(w, x, jax.checkpoint(step)),
    "scan remat": lambda w, x: scan(w, x, jax.checkpoint(step)),
    "remat scan": jax.checkpoint(scan),
}
LOOPS = [MODELS[x] for x in ("loop", "jitted step", "loop remat")]
EACH = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def by_hand(w, x, edits=None):
    """Returns outputs and the values at all sites, by a loop that names nothing."""
    edits, values, out = edits or {}, {}, []

    def at(name, i, value):
        values[Address(name, i)] = value
        return edits.get(Address(name, i), lambda x: x)(value)

    for i, own in enumerate(w):
        x = at("enter", i, x)
        inner = at("inner", i, jnp.tanh(x @ own))
        x = x + inner
        out.append(inner.sum(-1))
    return (x, jnp.stack(out)), values


def some_edits():
    return {
        Address("enter", 1): lambda x: 2 * x,
        Address("inner", 1): jnp.sin,
        Address("inner", 3): lambda x: x - 0.3,
    }


def unchanged(model, other):
    """Asserts that two models' outputs are the same bits, or nearly if one scans.

    The step that is carried out by itself is compiled by itself, and the compiler
    need not round a sum of products there as it does within the loop.
    """
    found, wanted = other(weights(), start()), model(weights(), start())
    if model in LOOPS:
        for x, y in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(x, y)
    close(found, wanted)


def close(found, wanted):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # Rounding in another order is all that may differ.
        np.testing.assert_allclose(x, y, rtol=1e-13, atol=1e-14)


@EACH
def test_what_is_read_is_what_is_there(model):
    _, values = by_hand(weights(), start())
    assert addresses(model, weights(), start()) == {"enter": STEPS, "inner": STEPS}
    found = jax.jit(read(model, NAMED))(weights(), start())
    assert found.keys() == values.keys()
    close(found, values)


@EACH
@pytest.mark.parametrize("at", NAMED[::3], ids=str)
def test_a_value_replaced_by_itself_changes_nothing(model, at):
    unchanged(model, replaced(model, {at: lambda x: x}))


@EACH
def test_values_replaced_are_those_of_the_model_written_so(model):
    wanted, _ = by_hand(weights(), start(), some_edits())
    close(jax.jit(replaced(model, some_edits()))(weights(), start()), wanted)


@EACH
def test_notes_are_of_the_values_that_earlier_edits_made(model):
    wanted, values = by_hand(weights(), start(), some_edits())
    visits = {
        at: lambda x, f=f: (f(x), {"before": x, "twice": 2 * x})
        for at, f in some_edits().items()
    }
    out, notes = visited(model, visits)(weights(), start())
    close(out, wanted)
    close(notes, {at: {"before": values[at], "twice": 2 * values[at]} for at in visits})


@EACH
def test_gradients_are_those_of_the_model_written_so(model):
    def loss(fn):
        return lambda w, x: sum((y**2).sum() for y in fn(w, x))

    def edited(w, x):
        return by_hand(w, x, some_edits())[0]

    found = jax.grad(loss(replaced(model, some_edits())), (0, 1))(weights(), start())
    close(found, jax.grad(loss(edited), (0, 1))(weights(), start()))


@EACH
def test_no_gradient_flows_through_what_is_frozen(model):
    cut = [Address("inner", 0), Address("enter", 2)]

    def by_loop(w, x):
        edits = dict.fromkeys(cut, jax.lax.stop_gradient)
        return by_hand(w, x, edits)[0][0].sum()

    fn = frozen(model, cut)
    unchanged(model, fn)
    found = jax.grad(lambda w, x: fn(w, x)[0].sum(), (0, 1))(weights(), start())
    close(found, jax.grad(by_loop, (0, 1))(weights(), start()))
    # The stream is cut where the third step begins: nothing before it is reached.
    assert not np.asarray(found[0][:2]).any()
    assert not np.asarray(found[1]).any()
    assert np.asarray(found[0][2:]).all()


def test_sites_are_read_and_replaced_under_transformations():
    at = Address("inner", 2)
    many = jnp.stack([start(), -2 * start()])
    one = [by_hand(weights(), x)[1][at] for x in many]
    close(jax.vmap(read(scan, [at]), (None, 0))(weights(), many)[at], jnp.stack(one))
    deaf = replaced(replaced(scan, {at: jnp.zeros_like}), {Address("enter", 3): abs})
    edits = {at: jnp.zeros_like, Address("enter", 3): abs}
    close(deaf(weights(), start()), by_hand(weights(), start(), edits)[0])


@pytest.mark.parametrize("remat", [False, True])
def test_what_comes_after_the_last_value_is_not_computed(remat):
    body = jax.checkpoint(step) if remat else step

    def compiled(model, at):
        fn = jax.jit(read(lambda w, x: model(w, x, body), [at]))
        return fn.lower(weights(), start()).compile()

    def tanhs(at):
        return (compiled(loop, at).cost_analysis() or {})["transcendentals"]

    assert tanhs(Address("enter", 1)) == start().size
    assert tanhs(Address("inner", 3)) == start().size * STEPS
    assert "while" not in str(compiled(scan, Address("inner", 0)).as_text())
    assert "while" in str(compiled(scan, Address("inner", 3)).as_text())


def test_what_replaces_a_value_has_its_shape_and_gets_its_type():
    at = Address("enter", 1)
    with pytest.raises(ValueError, match=r"shape \(2, 1\), the value \(2, 3\)"):
        replaced(scan, {at: lambda x: x[:, :1]})(weights(), start())
    low = weights().astype(jnp.float32), start().astype(jnp.float32)
    found = replaced(scan, {at: lambda x: x.astype(jnp.float64) / 3})(*low)
    assert found[0].dtype == jnp.float32


def test_a_site_that_is_not_there_is_named_with_those_that_are():
    listed = r"no site 'enter\.4'\. It has: enter\.0 … enter\.3, inner\.0 … inner\.3\."
    with pytest.raises(ValueError, match=listed):
        read(scan, [Address("enter", STEPS)])(weights(), start())
    with pytest.raises(ValueError, match=r"no site 'inner\.0'\. It has: none at all"):
        read(lambda x: x + 1, [Address("inner")])(start())
    once = read(lambda x: checkpoint_name(x, "only"), [Address("other")])
    with pytest.raises(ValueError, match=r"It has: only\. "):
        once(start())


def test_a_site_that_can_not_be_reached_is_said_to_be_hidden():
    def branching(x):
        return jax.lax.cond(x.sum() > 0, lambda x: checkpoint_name(x, "in"), abs, x)

    assert addresses(branching, start()) == {}
    with pytest.raises(ValueError, match="'in' is inside a `cond`"):
        read(branching, [Address("in")])(start())


@pytest.mark.parametrize("at", [*NAMED, Address("blocks.2.out", 7), Address("x.1")])
def test_addresses_are_read_as_they_are_written(at):
    assert Address.parse(str(at)) == at


def test_a_name_alone_is_its_first_place():
    assert Address.parse("resid_final") == Address("resid_final", 0)
    assert Address.parse("blocks.out") == Address("blocks.out", 0)
