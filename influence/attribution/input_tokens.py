"""How much of a score hangs on each word a sequence was read with.

    share_t = d/dε_t score(e_1, …, (1 + ε_t) e_t, …) at ε = 0

with `e_t` the embedding of token `t` (Grosse et al. 2023, appendix B, where it is a
difference of two backward passes; here the gradient of a forward-mode derivative, which
is exact). Where the shares of positions and of output tokens say where the model was
updated and to predict what, this says which words it was updated *because of*.

The shares do not sum to the score: scores are not linear in embeddings. They sum to how
fast the score changes as all embeddings are scaled together.
"""

from fnmatch import fnmatchcase
from functools import partial

import jax
import jax.numpy as jnp
import xarray as xr
from jax import Array

from influence.attribution.forward import directions
from influence.attribution.query import Query
from influence.fold import Run, collected, run
from influence.model.check import check_batches, check_params
from influence.model.edit import edited
from influence.model.lookup import Lookup
from influence.model.tangents import Leaves, covered, derivatives
from influence.model.task import LanguageModel, losses
from influence.model.trace import Program, trace
from influence.types import Batch, Batches, Params, with_leaves


def input_token_scores(
    task: LanguageModel,
    params: Params,
    query: Query,
    batches: Batches,
    *,
    embedding: str = "*",
    n_train: int | None = None,
    run: Run = run,
) -> xr.DataArray:
    """Returns `(query, train, token)`: what scaling each token's embedding would do.

    Costs about two forward and two backward passes for each query: meant for the
    sequences a scan ranks high.

    Args:
      task: the language model.
      params: its parameters.
      query: what is asked.
      batches: the sequences.
      embedding: a glob on the name of the token embedding, if there are several.
      n_train: how many sequences the model was trained on, if not those of `batches`.
      run: carries out the pass.

    Raises:
      ValueError: as `scan` does, and if not exactly one embedding is looked up.

    Example:
      >>> from influence.attribution.input_tokens import input_token_scores
      >>> input_token_scores(task, params, query, batches).dims
      ('query', 'train', 'token')
    """
    check_params(params)
    first = check_batches(task, params, batches).first
    _lookup(trace(task.outputs, params, first.inputs), embedding)
    leaves = covered(params, query.layers)
    along = directions(query, leaves)
    read = partial(_read, task, embedding, params, leaves, along)
    values = run(collected("input tokens", read, axis=1), batches)
    return query.scores(values, batches.ids, n_train, token=range(values.shape[-1]))


def _lookup(program: Program, embedding: str) -> Lookup:
    """Returns the one lookup of the tokens' embeddings."""
    found = [
        (name, x.use)
        for name, uses in program.uses.items()
        for x in uses
        if isinstance(x.use, Lookup) and fnmatchcase(name, embedding)
    ]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ValueError(
            f"Input tokens need the one embedding that tokens are looked up in, and "
            f"{embedding!r} matches {names}. Name it with `embedding`."
        )
    ((_, use),) = found
    return use


@jax.jit(static_argnums=(0, 1))
def _read(
    task: LanguageModel,
    embedding: str,
    params: Params,
    leaves: Leaves,
    along: Leaves,
    batch: Batch,
) -> Array:
    """Returns each token's share along each direction, `[Q, B, T]`."""
    program = trace(task.outputs, params, batch.inputs)
    use = _lookup(program, embedding)
    ids = jnp.shape(batch.inputs["tokens"])

    def score(eps_BxT: Array, direction: Leaves) -> Array:
        def run(leaves: Leaves) -> Array:
            moved = with_leaves(params, leaves)
            edits = {use.out: partial(_scaled, use, eps_BxT)}
            outputs = edited(program, moved, batch.inputs, edits)
            return losses(task, outputs, task.labels(batch.inputs), batch).sum()

        _, forward, _ = derivatives(run, leaves)
        return -forward(direction)

    zero = jnp.zeros(ids, next(iter(leaves.values())).dtype)
    return jax.lax.map(lambda x: jax.grad(score)(zero, x), along)


def _scaled(use: Lookup, eps_BxT: Array, rows: Array) -> Array:
    """Returns looked-up rows, each times `1 + ε` of its position."""

    def by_position(rows: Array) -> Array:
        return use.left(rows, rows)

    # Moving axes is its own inverse, transposed.
    (back,) = jax.linear_transpose(by_position, rows)(
        by_position(rows) * (1 + eps_BxT[..., None]).astype(rows.dtype)
    )
    return back
