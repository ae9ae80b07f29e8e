"""Running a traced model with some of its values changed on the way."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import Array
from jax.extend.core import Var

from influence.model import jaxprs
from influence.model.trace import Program
from influence.types import Inputs, Params

Edits = Mapping[Var, Callable[[Array], Array]]
"""For some values of a program, what to put in their place."""


def edited(program: Program, params: Params, inputs: Inputs, edits: Edits) -> Any:
    """Returns the model's outputs with some values replaced.

    Args:
      program: the model, traced at the shapes of `params` and `inputs`.
      params: the model's parameters.
      inputs: a batch.
      edits: of values of the program itself, not of the body of a scan or remat.

    Raises:
      ValueError: if a value is not among them.
    """
    jaxpr = program.closed.jaxpr
    own = {x for eqn in jaxpr.eqns for x in eqn.outvars}
    if not edits.keys() <= own:
        raise ValueError(
            "A value to be changed is computed inside a `scan` or `remat`, where it "
            "can't be. Compute it outside."
        )
    env = jaxprs.Environment()
    values: Sequence[Any] = jax.tree.leaves((params, inputs))
    env.write([*jaxpr.constvars, *jaxpr.invars], [*program.closed.consts, *values])
    for eqn in jaxpr.eqns:
        out = jaxprs.bind(eqn, env.read(eqn.invars))
        pairs = zip(eqn.outvars, out, strict=True)
        env.write(eqn.outvars, [edits[x](y) if x in edits else y for x, y in pairs])
    return jax.tree.unflatten(program.tree, env.read(jaxpr.outvars))
