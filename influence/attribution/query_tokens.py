"""Splits a query over its own tokens.

The gradient of a completion's log-probability is a sum over positions, `Σ_t g_t a_tᵀ`,
and so are the query it makes, its scores, and each of their shares. As queries of their
own, one a position, they say *which word of the question* a training sequence answers;
`token_scores(..., by_layer=True)` of them is the cube layer × query token × train token
of chosen pairs, and every sum over it is the score it splits.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from influence.attribution.forms import Compress
from influence.attribution.measurements import Likelihood
from influence.attribution.query import Query, solved
from influence.curvature.operator import Curvature
from influence.curvature.solvers import Eigenbasis, Solver
from influence.linalg.contract import contract
from influence.model.check import check_params
from influence.model.reading import Reading, by_layer
from influence.model.task import Empirical, LanguageModel, read_loss
from influence.types import Batch, Inputs, Layer, Params


def query_tokens(
    curvature: Curvature,
    params: Params,
    name: str,
    completion: Likelihood,
    *,
    solver: Solver = Eigenbasis(),
    compress: Compress | None = None,
) -> Query:
    """Returns one query for each position of a completion and its prompt.

    They are named `name@t`, after the position whose update they are a share of: from
    the tokens up to `t`, towards the token at `t + 1`. Holds a matrix per position and
    layer while it solves.

    Args:
      curvature: as fitted to the model.
      params: the model's parameters.
      name: of the completion.
      completion: as `completions` makes them.
      solver: what the curvature is inverted by, and its damping.
      compress: how each layer's queries are made small; None keeps matrices.

    Raises:
      ValueError: as `query` does; if layers see different numbers of positions.

    Example:
      >>> from influence.attribution.query_tokens import query_tokens
      >>> asked = measurements["3 after 1, 2"]
      >>> parts = query_tokens(curvature, params, "3", asked)
      >>> parts.names
      ('3@0', '3@1', '3@2')
      >>> shares = influence.scan(task, params, parts, batches).total.sum("query")
      >>> np.testing.assert_allclose(shares, scores.total[0], atol=1e-3)
    """
    check_params(params)
    completion.check(name, params)
    layers = curvature.layers
    gradients = _gradients(completion.task, layers, params, completion.inputs)
    if len({len(x) for x in gradients.values()}) > 1:
        raise ValueError(
            "The layers see different numbers of positions of a sequence, so its "
            "tokens have no common axis. Fit the curvature to layers that see the same."
        )
    positions = len(next(iter(gradients.values())))
    names = [f"{name}@{t}" for t in range(positions)]
    return solved(curvature, params, gradients, {}, names, solver, compress)


def _at(
    a_BxTxI: Array, gs: Mapping[str, Array], given: None, counted: Array
) -> dict[str, Array]:
    """Returns `-g_t a_tᵀ` of the one example, `[T, O, I]`, by layer."""
    del given, counted
    return {k: -contract("bto,bti->toi", g, a_BxTxI) for k, g in gs.items()}


READING = Reading(_at)


@jax.jit(static_argnums=(0, 1))
def _gradients(
    task: LanguageModel, layers: tuple[Layer, ...], params: Params, inputs: Inputs
) -> dict[str, Array]:
    """Returns each position's share of the gradient, axis `T` in front."""
    batch = Batch(inputs, jnp.zeros((1, 2), jnp.uint32), jnp.ones(1, bool))
    found = by_layer(read_loss(task, layers, READING, Empirical(), params, batch, {}))
    return {x.name: jnp.moveaxis(found[x.name], len(x.stack), 0) for x in layers}
