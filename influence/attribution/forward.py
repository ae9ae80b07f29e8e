"""Scores by forward mode: one derivative along the query instead of many gradients.

    score_t = (1/N) d/dε log p(token t + 1 | tokens up to t; θ + ε h) at ε = 0

(Grosse et al. 2023, appendix B, where it is a finite difference.) How much *predicting
each token* of a sequence does for a query, the **output-token influence**: it sums to
the same score as the shares of positions (`tokens.py`), but marks the words whose
prediction mattered rather than the places where the update was made. No layer is told
from another. For one or two queries it is also the cheapest way to total scores.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array

from influence.attribution.forms import dense
from influence.attribution.query import Query
from influence.fold import Fold, Run, collected, run
from influence.model.check import check_batches, check_params
from influence.model.tangents import Leaves, covered, derivatives, tangent
from influence.model.task import Task, token_losses
from influence.types import Batch, Batches, Params, with_leaves

if TYPE_CHECKING:
    import xarray as xr


def output_token_scores(
    task: Task,
    params: Params,
    query: Query,
    batches: Batches,
    *,
    n_train: int | None = None,
    run: Run = run,
) -> "xr.DataArray":
    """Returns `(query, train, token)`: the share of every label's loss.

    Costs a forward pass and a forward-mode pass for each query. The share at position
    `t` is that of predicting the token at `t + 1`, as in `token_scores`.

    Args:
      task: the model and its loss, of labels `[B]` or `[B, T]`.
      params: its parameters.
      query: what is asked.
      batches: the sequences.
      n_train: how many sequences the model was trained on, if not those of `batches`.
      run: carries out the pass.

    Raises:
      ValueError: as `scan` does.

    Example:
      >>> from influence.attribution.forward import output_token_scores
      >>> shares = output_token_scores(task, params, query, batches)
      >>> shares.dims
      ('query', 'train', 'token')
      >>> np.testing.assert_allclose(shares.sum("token"), scores.total, atol=1e-3)
    """
    check_params(params)
    check_batches(task, params, batches)
    values = run(fold(task, params, query), batches)
    return query.scores(values, batches.ids, n_train, token=range(values.shape[-1]))


def fold(task: Task, params: Params, query: Query) -> Fold:
    """Returns the pass that computes minus the losses' derivatives, `[Q, N, T]`."""
    return collected("scores, forward mode", reader(task, params, query), axis=1)


def reader(task: Task, params: Params, query: Query) -> Callable[[Batch], Array]:
    """Returns what the pass does with each batch: `batch -> [Q, B, T]`."""
    leaves = covered(params, query.layers)
    return partial(_read, task, params, leaves, directions(query, leaves))


def directions(query: Query, leaves: Leaves) -> Leaves:
    """Returns the queries as tangents of the parameters, axis `Q` in front."""
    matrices = {
        x.name: jnp.moveaxis(dense(query.forms[x.name]).h_QxOxI, len(x.stack), 0)
        for x in query.layers
    }
    return jax.vmap(lambda v: tangent(query.layers, leaves, v))(matrices)


@jax.jit(static_argnums=0)
def _read(
    task: Task, params: Params, leaves: Leaves, along: Leaves, batch: Batch
) -> Array:
    """Returns minus each label's derivative along each direction, `[Q, B, T]`."""

    def run(leaves: Leaves) -> Array:
        outputs = task.outputs(with_leaves(params, leaves), batch.inputs)
        found = token_losses(task, outputs, task.labels(batch.inputs), batch)
        return found.reshape(len(found), -1)

    _, forward, _ = derivatives(run, leaves)
    return -jax.vmap(forward)(along)
