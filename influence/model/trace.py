"""A model as a flat program whose layers are known.

Any `outputs(params, inputs)` will do: nothing in it is edited, no class of models is
asked for. The walk that finds every use of every parameter is in `find.py`, and what
layers they make up in `assembly.py`; here is what both begin from, and the choice of
layers by name.
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from influence.model import jaxprs
from influence.model.assembly import assemble
from influence.model.find import Findings, find
from influence.model.product import Product, operand_axes
from influence.model.use import Contribution
from influence.model.weight import whole
from influence.types import KINDS, Inputs, Layer, Params, named_leaves

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
      uncovered: every parameter in no layer.
      uses: every use of each layer's weight, by the layer's name.
      early: the variables that hold rearranged parameters.
    """

    closed: ClosedJaxpr
    tree: Any
    layers: tuple[Layer, ...]
    uncovered: tuple[Uncovered, ...]
    uses: Mapping[str, tuple[Contribution, ...]]
    early: frozenset[Var]

    def several(self, layer: str) -> bool:
        """Returns whether a layer's weight is used more than once."""
        first, *others = self.uses[layer]
        return bool(others) or first.use.weight.repeated


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
    closed, tree = jaxprs.flatten_once(outputs, params, inputs)
    doubled = jaxprs.flatten_once(outputs, params, double).closed
    _check_program(closed.jaxpr, doubled.jaxpr)
    names = named_leaves(params)
    values = [
        whole(name, x.shape) if jnp.issubdtype(x.dtype, jnp.inexact) else None
        for name, x in names.items()
    ]
    values += [None] * len(jax.tree.leaves(inputs))
    found = find(closed.jaxpr, doubled.jaxpr, values, examples, Findings())
    layers, uses, refused = assemble(found, list(names))
    return Program(
        closed=closed,
        tree=tree,
        layers=layers,
        uncovered=tuple(
            Uncovered(name, x.shape, refused[name])
            for name, x in names.items()
            if name in refused
        ),
        uses=uses,
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


def select(program: Program, patterns: str | Sequence[str]) -> tuple[Layer, ...]:
    """Returns the layers whose names match a glob or one of several.

    A bare glob chooses among matrices and convolutions, what curvature is usually
    wanted of. `embedding:*`, `scale:*norm*` and `shift:*` choose among the others, as
    `matrix:*` and `convolution:*` among one kind of these.

    Layers that read the same activation are told so: their `reads` is the name of the
    first of them.

    Raises:
      ValueError: if a pattern matches no layer, naming what it does match.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError("No layers were selected: the list of patterns is empty.")
    for pattern in patterns:
        if not any(_matches(x, pattern) for x in program.layers):
            raise ValueError(_nothing_matches(program, pattern))
    chosen = [x for x in program.layers if any(_matches(x, y) for y in patterns)]
    first: dict[Any, str] = {}
    keys = [_activation_key(program, x) for x in chosen]
    for key, layer in zip(keys, chosen, strict=True):
        first.setdefault(key, layer.name)
    return tuple(
        x._replace(reads=first[key]) for key, x in zip(keys, chosen, strict=True)
    )


def on_request(layer: Layer) -> bool:
    """Returns whether a layer is chosen only by a pattern that names its kind."""
    return layer.kind not in ("matrix", "convolution")


def _matches(layer: Layer, pattern: str) -> bool:
    kind, colon, glob = pattern.partition(":")
    if colon and kind in KINDS:
        return layer.kind == kind and _named(layer, glob)
    return not on_request(layer) and _named(layer, pattern)


def _named(layer: Layer, glob: str) -> bool:
    """Returns whether a glob matches a layer; a part also goes by the whole's name."""
    names = (layer.name, layer.parameter)
    return glob == layer.name or any(fnmatchcase(x, glob) for x in names)


def _nothing_matches(program: Program, pattern: str) -> str:
    begun = f"No layer matches {pattern!r}."
    other = [x for x in program.layers if on_request(x) and _named(x, pattern)]
    if other:
        said = _listed([f"{x.kind}:{x.name}" for x in other])
        return f"{begun} Matrices and convolutions do not; ask by kind for {said}."
    glob = pattern.partition(":")[2] if pattern.partition(":")[0] in KINDS else pattern
    matched = [x for x in program.uncovered if fnmatchcase(x.name, glob)]
    if matched:
        said = "\n".join(f"  {x.name}: {x.reason}" for x in matched[:10])
        return f"{begun} These parameters do, uncovered:\n{said}"
    names = [f"{x.kind}:{x.name}" if on_request(x) else x.name for x in program.layers]
    return f"{begun} The model's layers are: {_listed(names) or 'none'}."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


def _activation_key(program: Program, layer: Layer) -> Any:
    """Two layers with the same key have the same `a_BxTxI`, its ones included."""
    use = program.uses[layer.name][0].use
    if program.several(layer.name) or not isinstance(use, Product):
        return layer.name
    batch, free, contracted = operand_axes(use.eqn, 1 - use.side)
    axes = (tuple(batch), tuple(free), tuple(contracted), use.example)
    return use.activation, axes, layer.bias is not None
