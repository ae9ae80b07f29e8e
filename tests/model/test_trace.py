"""What is read of a layer is its gradient, however the model is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from influence.model.examples import sequences
from influence.model.reading import by_layer, read
from influence.model.task import Empirical, LanguageModel, read_loss, shape_of_outputs
from influence.model.trace import select, trace
from influence.types import named_leaves
from tests import cases
from tests.curvature import exact
from tests.model.readings import FLOAT64, assert_read, everything, gradients, normal

FLOAT32 = 2e-4  # the same in float32, through two blocks and a softmax


def read_all(case, layers):
    """Returns each example's gradient of every layer, `[*stack, B, O, I]`."""
    (batch,) = case.examples.batches(len(case.examples))
    found = jax.jit(read_loss, static_argnums=(0, 1, 2, 3))(
        case.task, layers, gradients, Empirical(), case.params, batch, {}
    )
    return by_layer(found)


def program_of(case):
    """Returns the model, traced."""
    (batch,) = case.examples.batches(len(case.examples))
    return trace(case.task.outputs, case.params, batch.inputs)


@pytest.mark.parametrize(("name", "bias"), cases.ALL, ids=cases.IDS)
def test_readings_are_gradients(name, bias):
    check_readings(cases.case(cases.MAKERS[name], bias), FLOAT64)


@pytest.mark.parametrize("name", ["raw-scan", "nnx-loop", "linen-scan"])
def test_readings_are_gradients_in_float32(name):
    check_readings(cases.case(cases.MAKERS[name], True, jnp.float32), FLOAT32)


def check_readings(case, tolerance):
    layers = everything(program_of(case))
    read, expected = read_all(case, layers), exact.gradients(case, layers)
    for x in layers:
        found = jnp.moveaxis(read[x.name], len(x.stack), 0)
        scale = float(jnp.abs(expected[x.name]).max())
        np.testing.assert_allclose(
            found, expected[x.name], rtol=0, atol=tolerance * scale, err_msg=x.name
        )


@pytest.mark.parametrize(("name", "bias"), cases.ALL, ids=cases.IDS)
def test_every_matrix_is_found_and_every_other_parameter_listed(name, bias):
    case = cases.case(cases.MAKERS[name], bias)
    program = program_of(case)
    copies = cases.BLOCKS if "loop" in name else 1
    matrices = select(program, "*")
    assert len(matrices) == copies * len(cases.MATRICES) + 1
    assert all((x.bias is not None) == bias for x in matrices[:-1])
    others = [x.kind for x in program.layers if x.kind != "matrix"]
    assert others == ["embedding"] + ["scale"] * copies
    biases = [x.bias for x in program.layers if x.bias]
    covered = [*(x.parameter for x in program.layers), *biases]
    listed = covered + [x.name for x in program.uncovered]
    assert sorted(listed) == sorted(named_leaves(case.params))


@pytest.mark.parametrize(("name", "bias"), cases.ALL, ids=cases.IDS)
def test_layers_that_read_one_activation_are_told_so(name, bias):
    case = cases.case(cases.MAKERS[name], bias)
    groups = {}
    for x in select(program_of(case), "*"):
        groups.setdefault(x.reads, []).append(x.name)
    copies = cases.BLOCKS if "loop" in name else 1
    shared = [names for names in groups.values() if len(names) > 1]
    assert [len(names) for names in shared] == [3] * copies


def test_names_are_paths_in_the_params_tree():
    case = cases.case(cases.MAKERS["nnx-loop"], True)
    names = [x.name for x in select(program_of(case), "*")]
    assert names[:2] == ["loop.0.q.kernel", "loop.0.k.kernel"]


def heads(x):
    """Returns `[B, T, 6]` as `[B, T, 2, 3]`."""
    return x.reshape(*x.shape[:2], 2, 3)


def scanned_twice(p, x):
    def inner(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(lambda x, ws: jax.lax.scan(inner, x, ws), x, p["w"])[0]


# How else a product can be written: the model, its parameters, and `(stack, O, I)`.
PRODUCTS = {
    "weight on the left": (
        lambda p, x: jnp.einsum("oi,bti->obt", p["w"], x),
        {"w": normal(3, 6)},
        ((), 3, 6),
    ),
    "several outputs and contractions": (
        lambda p, x: jnp.einsum("bthk,hkmn->btmn", heads(x), p["w"]),
        {"w": normal(2, 3, 2, 4)},
        ((), 8, 6),
    ),
    "outputs in two axes, with a bias": (
        lambda p, x: jnp.einsum("bti,imn->btmn", x, p["w"]) + p["b"][None, None],
        {"w": normal(6, 2, 4), "b": normal(2, 4)},
        ((), 8, 7),
    ),
    "batched over experts": (
        lambda p, x: jnp.einsum("bthk,hko->btho", heads(x), p["w"]),
        {"w": normal(2, 3, 4)},
        ((2,), 4, 3),
    ),
    "a bias for each expert": (
        lambda p, x: (
            jnp.einsum("bthk,hko->btho", heads(x), p["w"]) + p["b"][None, None]
        ),
        {"w": normal(2, 3, 4), "b": normal(2, 4)},
        ((2,), 4, 4),
    ),
    "examples and positions merged": (
        lambda p, x: (x.reshape(-1, 6) @ p["w"]).reshape(*x.shape[:2], 3),
        {"w": normal(6, 3)},
        ((), 3, 6),
    ),
    "positions first": (
        lambda p, x: jnp.swapaxes(jnp.swapaxes(x, 0, 1) @ p["w"], 0, 1),
        {"w": normal(6, 3)},
        ((), 3, 6),
    ),
    "no positions": (
        lambda p, x: x[:, 0] @ p["w"] + p["b"][None],
        {"w": normal(6, 3), "b": normal(3)},
        ((), 3, 7),
    ),
    "vmapped over examples": (
        lambda p, x: jax.vmap(lambda x: x @ p["w"].T + p["b"][None])(x),
        {"w": normal(3, 6), "b": normal(3)},
        ((), 3, 7),
    ),
    "transposed and reshaped": (
        lambda p, x: x @ p["w"].T.reshape(6, 4),
        {"w": normal(6, 4)},
        ((), 4, 6),
    ),
    "one output": (
        lambda p, x: x @ p["w"] + p["b"][None, None],
        {"w": normal(6, 1), "b": normal(1)},
        ((), 1, 7),
    ),
    "scanned twice over": (scanned_twice, {"w": normal(2, 3, 6, 6)}, ((2, 3), 6, 6)),
    "before a function with its own derivative": (
        lambda p, x: jax.nn.relu(x @ p["w"]),
        {"w": normal(6, 3)},
        ((), 3, 6),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_read_however_they_are_written(name):
    apply, params, (stack, rows, columns) = PRODUCTS[name]
    x = normal(4, 5, 6)
    assert not trace(apply, params, x).uncovered
    (layer,) = assert_read(apply, params, x)
    assert (layer.stack, layer.outputs, layer.columns) == (stack, rows, columns)


def test_bfloat16_kernels_are_read_in_float32():
    def apply(p, x):
        return (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(
            jnp.float32
        )

    params, x = (
        {"w": normal(6, 3).astype(jnp.float32)},
        normal(4, 5, 6).astype(jnp.float32),
    )
    program = trace(apply, params, x)
    _, found = read(program, program.layers, gradients, jnp.sum, params, x, {})
    found = found["w"]["w"]
    assert found.dtype == jnp.float32
    # The gradient of a sum is one everywhere, so only the operands were cast.
    cast = x.astype(jnp.bfloat16).astype(jnp.float32)
    expected = jnp.broadcast_to(cast.sum(1)[:, None], (4, 3, 6))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@jax.custom_vjp
def opaque(w, x):
    return x @ w


opaque.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[0], g))


def halved_while_large(p, x):
    return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ p["w"] / 2, x)


def on_one_side(p, x):
    return jax.lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: x, x)


def ragged(p, x):
    sizes = jnp.full(2, x.shape[0] * x.shape[1] // 2, jnp.int32)
    return jax.lax.ragged_dot(x.reshape(-1, 6), p["w"], sizes).reshape(x.shape)


# Uses of a parameter that are no layer, and what is said of them.
REFUSED = {
    "half a layer": (
        lambda p, x: x @ p["w"] + jnp.sin(p["w"])[None, :5],
        normal(6, 6),
        "only partly a layer, used 2 times: a matrix product; used in `sin`",
    ),
    "rearranged before it is cut": (
        lambda p, x: x @ p["w"].T[:, :2],
        normal(3, 6),
        "after it was rearranged",
    ),
    "cut in strides": (lambda p, x: x @ p["w"][:, ::2], normal(6, 3), "strides"),
    "parts that overlap": (
        lambda p, x: x @ p["w"][:, :4] + x @ p["w"][:, 2:],
        normal(6, 6),
        "parts that overlap: w[:, 0:4], w[:, 2:6]",
    ),
    "different matrices": (
        lambda p, x: (x @ p["w"]) @ p["w"].reshape(4, 6),
        normal(6, 4),
        "used as different matrices",
    ),
    "masked": (
        lambda p, x: x @ (p["w"] * jnp.tri(6, dtype=x.dtype)),
        normal(6, 6),
        "apply a mask or the scale of a quantised weight to the activation",
    ),
    "own derivative": (
        lambda p, x: opaque(p["w"], x),
        normal(6, 3),
        "derivative rule of its own",
    ),
    "broadcast": (
        lambda p, x: jnp.einsum(
            "bti,bio->bto", x, jnp.broadcast_to(p["w"], (len(x), 6, 3))
        ),
        normal(6, 3),
        "broadcast before its product",
    ),
    "constant": (
        lambda p, x: x + (jnp.ones((5, 6)) @ p["w"])[None],
        normal(6, 6),
        "the same for every example",
    ),
    "looked up by position": (
        lambda p, x: x + p["w"][jnp.arange(5)][None],
        normal(9, 6),
        "broadcast the ids to all examples",
    ),
    "while": (halved_while_large, normal(6, 6), "inside a `while` loop"),
    "cond": (on_one_side, normal(6, 6), "inside a `cond`"),
    "ragged": (ragged, normal(2, 6, 6), "`ragged_dot`: write experts as a batched"),
    "carried": (
        lambda p, x: jax.lax.scan(
            lambda c, _: ((c[0] @ c[1], c[1] * 0.5), None), (x, p["w"]), length=2
        )[0][0],
        normal(6, 6),
        "carried from step to step",
    ),
    "subtracted": (lambda p, x: x - p["w"][None, None], normal(6), "`x + (-b)`"),
    "stopped": (
        lambda p, x: x @ jax.lax.stop_gradient(p["w"]),
        normal(6, 3),
        "its gradient is stopped",
    ),
    "unused": (lambda p, x: x, normal(6, 3), "not used"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_layer_is_listed_with_the_reason(name):
    apply, w, said = REFUSED[name]
    program = trace(apply, {"w": w}, normal(4, 5, 6))
    assert not program.layers
    (uncovered,) = program.uncovered
    assert said in uncovered.reason


def test_examples_that_a_product_mixes_cannot_be_told_apart():
    def apply(p, x):
        pairs = jnp.einsum("bti,cti->bct", x, x)
        return (pairs.reshape(-1, x.shape[1]) @ p["w"]).reshape(*pairs.shape[:2], 3)

    (uncovered,) = trace(apply, {"w": normal(5, 3)}, normal(4, 5, 6)).uncovered
    assert "can't be told apart" in uncovered.reason


def test_a_bias_added_elsewhere_too_is_no_bias():
    def apply(p, x):
        y = x @ p["w"]
        return (y + p["b"][None, None]) * y

    layers = assert_read(apply, {"w": normal(6, 3), "b": normal(3)}, normal(4, 5, 6))
    assert [(x.kind, x.bias) for x in layers] == [("matrix", None), ("shift", None)]


def test_dropout_left_on_is_an_error():
    model = linen.Sequential([linen.Dense(6), linen.Dropout(0.5, deterministic=False)])
    x = normal(4, 5, 6).astype(jnp.float32)
    params = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)

    def apply(params, x):
        return model.apply(params, x, rngs={"dropout": jax.random.key(2)})

    with pytest.raises(ValueError, match=r"random numbers.*Turn dropout off"):
        trace(apply, params, x)


def test_a_task_is_traced_once_for_all_that_is_done_with_it():
    traced = []

    def apply(params, tokens):
        traced.append(tokens.shape)
        return jax.nn.one_hot(tokens, 3) @ params["w"]

    (batch,) = sequences([[0, 1, 2], [2, 1, 0]], ["up", "down"]).batches(2)
    task, params = LanguageModel(apply), {"w": normal(3, 3)}
    for _ in range(2):
        assert [x.name for x in trace(task.outputs, params, batch.inputs).layers]
        assert shape_of_outputs(task, params, batch.inputs).shape == (2, 3, 3)
    # Of two examples for the program and for the shapes, of four to tell axes apart.
    assert sorted(traced) == [(2, 3), (2, 3), (4, 3)]


def test_a_function_is_traced_anew_where_its_arithmetic_changes():
    def apply(params, x):
        return x @ params["w"]

    def precision():
        program = trace(apply, {"w": normal(6, 3)}, normal(4, 5, 6))
        (dot,) = [x for x in program.closed.eqns if "precision" in x.params]
        return dot.params["precision"]

    usual = precision()
    with jax.default_matmul_precision("highest"):
        assert precision() != usual
    assert precision() == usual


def test_side_effects_are_an_error():
    def apply(p, x):
        jax.debug.print("{}", x.sum())
        return x @ p["w"]

    with pytest.raises(ValueError, match="side effects"):
        trace(apply, {"w": normal(6, 3)}, normal(4, 5, 6))


def test_another_program_for_another_number_of_examples_is_an_error():
    def apply(p, x):
        return x @ p["w"] if len(x) > 4 else jnp.sin(x) @ p["w"]

    with pytest.raises(ValueError, match="another number of examples"):
        trace(apply, {"w": normal(6, 3)}, normal(4, 5, 6))


def test_arrays_without_a_common_axis_of_examples_are_an_error():
    inputs = {"tokens": jnp.zeros((3, 6), int), "seen": jnp.zeros(6)}
    with pytest.raises(
        ValueError, match=r"shapes \[\(6,\), \(3, 6\)\].*same leading axis"
    ):
        trace(lambda params, inputs: params["w"], {"w": jnp.ones(2)}, inputs)


def stopped_program():
    return trace(REFUSED["stopped"][0], {"w": normal(6, 3)}, normal(4, 5, 6))


def test_selection_is_by_glob_and_an_empty_one_is_an_error():
    program = program_of(cases.case(cases.MAKERS["raw-loop"], True))
    chosen = select(program, ["*.up.*", "blocks.1.q.*"])
    assert [x.name for x in chosen] == [
        "blocks.0.up.w",
        "blocks.1.q.w",
        "blocks.1.up.w",
    ]
    with pytest.raises(
        ValueError, match=r"No layer matches 'attention\.\*'.*blocks\.0\.q\.w"
    ):
        select(program, "attention.*")
    with pytest.raises(ValueError, match=r"matches 'embed'.*ask.*for embedding:embed"):
        select(program, "embed")
    with pytest.raises(ValueError, match=r"'shift:embed'.*layers are: embedding:embed"):
        select(program, "shift:embed")
    assert [x.name for x in select(program, ["embedding:*", "head"])] == [
        "embed",
        "head",
    ]
    with pytest.raises(ValueError, match=r"(?s)'w'.*uncovered:.*stopped"):
        select(stopped_program(), "w")
    with pytest.raises(ValueError, match="the list of patterns is empty"):
        select(program, [])


def test_a_group_is_named_after_its_first_chosen_layer():
    program = program_of(cases.case(cases.MAKERS["raw-scan"], True))
    assert {x.reads for x in select(program, ["*.k.*", "*.v.*"])} == {"blocks.k.w"}
