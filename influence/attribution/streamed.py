"""Queries of log-probabilities, each read, solved and made small in one program.

A log-probability's gradient can be read as a training sequence's is, in the eigenbasis,
where the inverse curvature only scales it. The first half of solving for it then costs
`T (O² + I²)` multiplications a matrix in place of `O I (O + I)`. What leaves the
program is what is kept: of queries of low rank no more than one is ever whole.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, TypeGuard

import jax
from jax import Array

from influence.attribution.forms import Compress, Form, formed, total
from influence.attribution.gradients import check_sound, is_likelihood, size, stacked
from influence.attribution.measurements import Likelihood, Measurement
from influence.curvature.coordinates import READING, grouped
from influence.curvature.covariance import Factors
from influence.curvature.operator import Curvature
from influence.curvature.solvers import Eigenbasis
from influence.linalg.kronecker import Kronecker
from influence.linalg.solvers import dot
from influence.model.reading import by_layer, read
from influence.model.trace import trace
from influence.types import Layer, Params

BESIDE = 0.25
"""How large all layers' bases may be beside the gradients that are read with them.

They have to be there together, where solving takes them layer by layer.
"""


class Kept(NamedTuple):
    """What is kept of a query; of all of them, with an axis `Q`.

    Attributes:
      value: of the measurement.
      own: the gradient's product with its solution, over all layers.
      energy: the solution's square norm, as a compression weighs it.
      kept: and what is left of that.
      forms: by layer, `Q` behind the stack.
    """

    value: Array
    own: Array
    energy: Array
    kept: Array
    forms: dict[str, Form]


def readable(
    measurements: Mapping[str, Measurement],
    layers: Sequence[Layer],
    compress: Compress | None,
) -> TypeGuard[Mapping[str, Likelihood]]:
    """Returns whether queries are better read in the eigenbasis, one after another.

    If all are of log-probabilities, and of so many that the bases are little beside
    their gradients, and are not made small together. An embedding is looked up, and its
    gradient is found faster that way.
    """
    inputs = {
        x.reads: prod(x.stack) * basis(x.columns, diagonal=x.diagonal[0])
        for x in layers
    }
    outputs = [prod(x.stack) * basis(x.outputs, diagonal=x.diagonal[1]) for x in layers]
    each = sum(prod(x.stack) * x.outputs * x.columns for x in layers)
    return (
        bool(measurements)
        and all(map(is_likelihood, measurements.values()))
        and all(x.kind != "embedding" for x in layers)
        and (compress is None or compress.alone)
        and sum(inputs.values()) + sum(outputs) <= BESIDE * len(measurements) * each
    )


def basis(length: int, *, diagonal: bool) -> int:
    """Returns how many numbers a side's basis holds, if it is not cut into blocks.

    None where the basis is the standard one: as `Factors.widest` is by default.

    Example:
      >>> from influence.attribution.streamed import basis
      >>> basis(4096, diagonal=False), basis(32768, diagonal=False)
      (16777216, 0)
    """
    return 0 if diagonal or length > Factors.widest else length**2


def streamed(
    curvature: Curvature,
    params: Params,
    measurements: Mapping[str, Likelihood],
    solver: Eigenbasis,
    compress: Compress | None,
) -> Kept:
    """Returns what is kept of every query.

    Raises:
      ValueError: if a measurement is not a finite number or does not depend on the
        layers, or the damped curvature has no inverse.
    """
    curvature = curvature.loaded()
    curvature.check_inverse(solver.inverse)

    def kept(name: str, measurement: Likelihood) -> tuple[Any, ...]:
        measurement.check(name, params)
        found, absolute = _kept(
            curvature.layers, solver, compress, measurement, params, curvature.blocks
        )
        check_sound(name, found.value, absolute)
        return tuple(found)

    # Nobody holds on to one while the next is made.
    each = map(kept, measurements.keys(), measurements.values())
    behind = {x.name: len(x.stack) for x in curvature.layers}
    return Kept(*stacked(each, len(measurements), (0, 0, 0, 0, behind)))


@jax.jit(static_argnums=(0, 1, 2))
def _kept(
    layers: tuple[Layer, ...],
    solver: Eigenbasis,
    compress: Compress | None,
    measurement: Likelihood,
    params: Params,
    blocks: Mapping[str, Kronecker],
) -> tuple[Kept, Array]:
    """Returns what is kept of a query, and its gradient's absolute values' sum."""
    program = trace(measurement.task.outputs, params, measurement.inputs)
    inputs = {x.reads: blocks[x.name].inputs for x in layers}
    given = grouped(layers, inputs, {k: x.outputs for k, x in blocks.items()})
    value, found = read(
        program, layers, READING, measurement.of, params, measurement.inputs, given
    )
    # The one example that is read, behind the stack, is the query, in front.
    turned = {k: x.squeeze(-3)[None] for k, x in by_layer(found).items()}
    solved = solver.scaled(blocks, turned)
    made = {
        x.name: formed(compress, len(x.stack), blocks[x.name], solved[x.name])
        for x in layers
    }
    kept = Kept(
        value,
        dot(turned, solved).squeeze(0),
        total([x.energy_Q for x in made.values()]).squeeze(0),
        total([x.kept_Q for x in made.values()]).squeeze(0),
        {x.name: _one(made[x.name].form, len(x.stack)) for x in layers},
    )
    return kept, size(turned)


def _one(form: Form, stack: int) -> Form:
    """Returns the form of a single query without its axis `Q`."""
    return jax.tree.map(lambda x: x.squeeze(stack), form)
