"""A model as a flat program whose layers are known.

Any `outputs(params, inputs)` will do: nothing in it is edited, no class of models is
asked for. The walk that finds the layers is in `find.py`; here its findings become the
list of layers, the list of every other parameter with the reason, and the choice of
layers by name.
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from influence.model import jaxprs
from influence.model.find import Bias, Findings, Use, find
from influence.model.product import Product, operand_axes, whole
from influence.types import Inputs, Layer, Params, named_leaves

Outputs = Callable[[Params, Inputs], Any]
"""A model: `(params, inputs) -> outputs`, every array with a leading example axis."""


class Uncovered(NamedTuple):
    """A parameter no reading covers, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


class Program(NamedTuple):
    """A traced model.

    Attributes:
      closed: the flat program.
      tree: the structure of the model's outputs.
      layers: every layer found, in the order of the program.
      uncovered: every other parameter.
      products: the product behind each layer, by name.
      early: the variables that hold rearranged parameters.
    """

    closed: ClosedJaxpr
    tree: Any
    layers: tuple[Layer, ...]
    uncovered: tuple[Uncovered, ...]
    products: Mapping[str, Product]
    early: frozenset[Var]


def trace(outputs: Outputs, params: Params, inputs: Inputs) -> Program:
    """Returns the model's program and its layers, from the shapes of its arguments.

    Raises:
      ValueError: if the model draws random numbers, writes state, or is another program
        for another number of examples; or if the inputs have no common leading axis.
    """
    params, inputs = jax.eval_shape(lambda *xs: xs, params, inputs)
    examples = _examples(inputs)
    double = jax.tree.map(
        lambda x: x.update(shape=(2 * examples, *x.shape[1:])), inputs
    )
    closed = jaxprs.flatten(outputs, params, inputs)
    doubled = jaxprs.flatten(outputs, params, double)
    _check_program(closed.jaxpr, doubled.jaxpr)
    names = named_leaves(params)
    values = [
        whole(name, x.shape) if jnp.issubdtype(x.dtype, jnp.inexact) else None
        for name, x in names.items()
    ]
    values += [None] * len(jax.tree.leaves(inputs))
    found = find(closed.jaxpr, doubled.jaxpr, values, examples, Findings())
    products = {
        x.weight.name: x for x in found.products if len(found.uses[x.weight.name]) == 1
    }
    biases = {
        name: found.biases[x]
        for name, x in products.items()
        if x in found.biases and len(found.uses[found.biases[x].name]) == 1
    }
    covered = {*products, *(x.name for x in biases.values())}
    return Program(
        closed=closed,
        tree=jax.tree.structure(jax.eval_shape(outputs, params, inputs)),
        layers=tuple(_layer(x, biases.get(name)) for name, x in products.items()),
        uncovered=tuple(
            Uncovered(name, x.shape, _reason(found.uses.get(name, [])))
            for name, x in names.items()
            if name not in covered
        ),
        products=products,
        early=frozenset(found.early),
    )


def _examples(inputs: Inputs) -> int:
    shapes = [x.shape for x in jax.tree.leaves(inputs)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"The arrays of a batch have the shapes {shapes}. Give every one the same "
            "leading axis of examples."
        )
    return shapes[0][0]


def _check_program(jaxpr: Jaxpr, doubled: Jaxpr) -> None:
    """Refuses programs whose readings would be silently wrong."""
    names = [eqn.primitive.name for eqn in jaxprs.equations(jaxpr)]
    drawn = next((x for x in names if x.startswith(("random_bits", "rng_"))), None)
    if drawn or "threefry2x32" in names:
        raise ValueError(
            f"The model draws random numbers (`{drawn or 'threefry2x32'}`) as it runs, "
            "so its gradients would differ from call to call. Turn dropout off: "
            "`model.eval()` in Flax NNX, `deterministic=True` in Linen."
        )
    if jaxpr.effects:
        raise ValueError(
            f"The model has side effects as it runs ({jaxpr.effects}): it writes state "
            "or calls back to Python. Pass a pure function of params and inputs."
        )
    if names != [eqn.primitive.name for eqn in jaxprs.equations(doubled)]:
        raise ValueError(
            "The model is another program for another number of examples, so its "
            "examples can't be told apart. Write it without Python branches on the "
            "batch size."
        )


def _reason(uses: Sequence[Use]) -> str:
    """Says why a parameter is not covered."""
    words = {Product: "a matrix product", Bias: "a bias of a layer not covered"}
    said = [x if isinstance(x, str) else words[type(x)] for x in uses]
    if any(isinstance(x, Product) for x in uses):
        return f"only partly a layer, used {len(uses)} times: {'; '.join(said)}"
    return "; ".join(dict.fromkeys(said)) or "not used"


def _layer(product: Product, bias: Bias | None) -> Layer:
    name = product.weight.name
    return Layer(
        name=name,
        bias=bias.name if bias else None,
        inputs=product.inputs,
        outputs=product.outputs,
        stack=(*product.weight.stack, *product.stack),
        reads=name,
        weight_view=product.weight_view(),
        bias_view=bias.view if bias else (),
    )


def select(program: Program, patterns: str | Sequence[str]) -> tuple[Layer, ...]:
    """Returns the layers whose names match a glob or one of several.

    Layers that read the same activation are told so: their `reads` is the name of the
    first of them.

    Raises:
      ValueError: if a pattern matches no layer, naming what it does match.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError("No layers were selected: the list of patterns is empty.")
    for pattern in patterns:
        if not any(fnmatchcase(x.name, pattern) for x in program.layers):
            raise ValueError(_nothing_matches(program, pattern))
    chosen = [
        x for x in program.layers if any(fnmatchcase(x.name, y) for y in patterns)
    ]
    first: dict[Any, str] = {}
    keys = [_activation_key(program.products[x.name], x) for x in chosen]
    for key, layer in zip(keys, chosen, strict=True):
        first.setdefault(key, layer.name)
    return tuple(
        x._replace(reads=first[key]) for key, x in zip(keys, chosen, strict=True)
    )


def _nothing_matches(program: Program, pattern: str) -> str:
    matched = [x for x in program.uncovered if fnmatchcase(x.name, pattern)]
    if matched:
        said = "\n".join(f"  {x.name}: {x.reason}" for x in matched[:10])
        return f"No layer matches {pattern!r}. These parameters do, uncovered:\n{said}"
    names = [x.name for x in program.layers]
    said = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    return f"No layer matches {pattern!r}. The model's layers are: {said or 'none'}."


def _activation_key(product: Product, layer: Layer) -> Any:
    """Two products with the same key have the same `a_BxTxI`, its ones included."""
    batch, free, contracted = operand_axes(product.eqn, 1 - product.side)
    axes = (tuple(batch), tuple(free), tuple(contracted), product.example)
    return product.activation, axes, layer.bias is not None
