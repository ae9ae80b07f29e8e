"""Splits a sequence's score over its positions.

    score = Σ_t score_t,   score_t = -(1/N) Σ_layers g_tᵀ h a_t

(Grosse et al. 2023, equation 31). The share of position `t` is that of the update made
there: from the tokens up to `t`, towards the token at `t + 1`. It mixes what earlier
tokens put into `a_t` with what later losses send back in `g_t`, so a large share marks
where the sequence acts, not which word it would miss.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from influence.attribution.forms import Dense, Factored, Form, Projected, Reform
from influence.attribution.query import Query
from influence.attribution.scan import fold
from influence.fold import Run, run
from influence.linalg.contract import contract
from influence.model.check import check_batches, check_params
from influence.model.reading import Reading
from influence.model.task import Task
from influence.types import Batches, Params, rows

if TYPE_CHECKING:
    import xarray as xr

FACTORED = 8
"""How many queries of low rank are taken at a time: alone they make thin products."""


def token_scores(
    task: Task,
    params: Params,
    query: Query,
    batches: Batches,
    *,
    n_train: int,
    form: Reform | None = None,
    by_layer: bool = False,
    run: Run = run,
) -> "xr.DataArray":
    """Returns `(query, train, token)`: the shares of every position, over all layers.

    Or `(query, train, layer, token)`, their shares layer by layer.

    Costs `T Q O I` multiplications an example and layer for dense queries and
    `T Q R (O + I)` for factored ones, so it is meant for the sequences a scan ranks
    high. Every layer must see every position.

    Args:
      task: the model and its loss.
      params: its parameters.
      query: what is asked.
      batches: the sequences.
      n_train: how many sequences the model was trained on.
      form: `dense` or `factored`; that of the query if None.
      by_layer: whether layers are kept apart.
      run: carries out the pass.

    Raises:
      ValueError: as `scan` does, and if layers see different numbers of positions.

    Example:
      >>> shares = influence.token_scores(task, params, query, batches, n_train=10)
      >>> shares.dims
      ('query', 'train', 'token')
      >>> np.testing.assert_allclose(shares.sum("token"), scores.total, atol=1e-3)
    """
    check_params(params)
    check_batches(task, params, batches)
    query = query if form is None else query.in_form(form)
    values = run(fold(task, params, query, READING), batches)
    values = values.transpose(2, 0, 3, 1)
    rest: dict[str, Sequence[Any]] = {"token": range(values.shape[-1])}
    if by_layer:
        rest = {"layer": [label for _, _, label in rows(query.layers)], **rest}
    else:
        values = values.sum(2)
    return query.scores(values, batches.ids, n_train, **rest)


def _at(
    a_BxTxI: Array, gs: Mapping[str, Array], given: Mapping[str, Any], counted: Array
) -> dict[str, Array]:
    """Returns `g_tᵀ h a_t` of each position and query, `[B, T, Q]`, by layer."""
    del counted

    def score(g_BxTxO: Array, form: Form) -> Array:
        if isinstance(form, Projected):
            left = contract("bto,or->btr", g_BxTxO, form.left_OxR)
            right = contract("bti,is->bts", a_BxTxI, form.right_IxR)
            return contract("btr,qrs,bts->btq", left, form.core_QxRxR, right)
        # Query by query: what all of them make of every position is far larger than
        # the queries, and no faster to come by.
        if isinstance(form, Dense):
            one, each = partial(_through_matrix, a_BxTxI, g_BxTxO), None
        else:
            one, each = partial(_through_factors, a_BxTxI, g_BxTxO), FACTORED
        return jnp.moveaxis(jax.lax.map(one, form, batch_size=each), 0, -1)

    return {name: score(g, given[name]) for name, g in gs.items()}


def _through_matrix(a_BxTxI: Array, g_BxTxO: Array, h: Dense) -> Array:
    """Returns `g_tᵀ h a_t` of each position for one query, `[B, T]`.

    As many multiplications either way, so the shorter side is where the two meet.
    """
    (h_OxI,) = h
    if a_BxTxI.shape[-1] <= g_BxTxO.shape[-1]:
        pulled = contract("bto,oi->bti", g_BxTxO, h_OxI)
        return contract("bti,bti->bt", pulled, a_BxTxI)
    pushed = contract("bti,oi->bto", a_BxTxI, h_OxI)
    return contract("bto,bto->bt", g_BxTxO, pushed)


def _through_factors(a_BxTxI: Array, g_BxTxO: Array, h: Factored) -> Array:
    """Returns the same through a query's factors."""
    left = contract("bto,or->btr", g_BxTxO, h.left_QxOxR)
    right = contract("bti,ir->btr", a_BxTxI, h.right_QxIxR)
    return contract("btr,btr->bt", left, right)


READING = Reading(_at)


def concentrated(shares: "xr.DataArray") -> "xr.DataArray":
    """Returns which scores hang on so few tokens that they are probably spurious.

    `‖a‖₂ / ‖a‖₁ > 2/3` of the vector `a` of a sequence's shares: one token all but
    alone (Grosse et al. 2023, who leave such sequences out of top lists).

    Args:
      shares: `(…, token)`.

    Example:
      >>> from influence.attribution.tokens import concentrated
      >>> shares = influence.token_scores(task, params, query, batches, n_train=10)
      >>> marked = concentrated(shares)
      >>> marked.dims
      ('query', 'train')
      >>> spread_out = scores.total.where(~marked)
    """
    spread, length = abs(shares).sum("token"), (shares**2).sum("token") ** 0.5
    return (length > 2 / 3 * spread).rename("concentrated")
