"""Scores every training sequence for every query, through every layer, in one pass.

    score = -(1/N) Σ_layers ⟨h, DW⟩,   DW = Σ_t g_t a_tᵀ

with `h` the query and `DW` the gradient of the sequence's loss (Grosse et al. 2023,
equation 30): the change of the measurement, in its own unit, per added copy of
the sequence.

Several contractions give the same number. *Dense* forms `DW` and takes its inner
product with each query; *factored*, for `h = Σ_r u_r v_rᵀ`, never forms it:
`Σ_t Σ_r (g_t·u_r)(a_t·v_r)`; each layer takes the one with fewer multiplications.
*Forward mode* knows of no layers: the derivative of all losses of a batch along the
query (`forward.py`), for one or two queries the cheapest.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from influence.attribution import forward
from influence.attribution.forms import (
    Dense,
    Factored,
    Form,
    Projected,
    Reform,
    dense,
    factored,
)
from influence.attribution.query import Query
from influence.attribution.scores import Scores
from influence.fold import Fold, Run, collected, run
from influence.linalg import count
from influence.linalg.contract import contract, inner
from influence.model.check import check_batches, check_params
from influence.model.reading import Reading, by_matrix
from influence.model.task import Empirical, Task, read_loss
from influence.types import Batch, Batches, Layer, Params, rows

FORWARD = 2
"""Up to so many queries forward mode is cheaper: a pass for each and one more, against
two and the gradients."""

EXPANDED = 4
"""How many queries of low rank are made matrices at a time, at most."""


def scan(
    task: Task,
    params: Params,
    query: Query,
    batches: Batches,
    *,
    n_train: int | None = None,
    form: Reform | None = None,
    by_layer: bool = True,
    run: Run = run,
) -> Scores:
    """Scores every sequence for every query.

    Costs a forward and an activation-backward pass, and what `cheaper` says.

    Args:
      task: the model and its loss.
      params: its parameters.
      query: what is asked.
      batches: the training sequences.
      n_train: how many sequences the model was trained on, if not those of `batches`.
      form: `dense` or `factored` to contract every layer so; the cheaper one if None.
      by_layer: whether layers are kept apart. If they need not be and `form` is None,
        one or two queries are scanned in forward mode.
      run: carries out the pass.

    Raises:
      ValueError: if a parameter is not finite, a batch is not fit for the task, or the
        model does not have the query's layers.

    Example:
      >>> scores = influence.scan(task, params, query, batches)
      >>> scores.layers.dims
      ('query', 'train', 'layer')
      >>> [ranked.id for ranked in scores.top(2)[0]]
      ['up', 'odd']
    """
    check_params(params)
    check_batches(task, params, batches)
    read = reader(task, params, query, form=form, by_layer=by_layer)
    ahead = _forward(query, form, by_layer=by_layer)
    name = "scores, forward mode" if ahead else "scores"
    values = run(collected(name, read), batches).transpose(1, 0, 2)
    labels = axis(query, by_layer=by_layer)
    return Scores(query.scores(values, batches.ids, n_train, layer=labels))


def axis(query: Query, *, by_layer: bool) -> list[str]:
    """Returns the labels of the axis of layers: every matrix, or all of them as one."""
    return [label for _, _, label in rows(query.layers)] if by_layer else ["all"]


def reader(
    task: Task,
    params: Params,
    query: Query,
    *,
    form: Reform | None = None,
    by_layer: bool = True,
) -> Callable[[Batch], Array]:
    """Returns what a scan does with each batch: `batch -> scores [B, Q, layers]`.

    Not yet divided by the number of training sequences. For whoever keeps scores
    elsewhere than in memory; `form` and `by_layer` are those of `scan`.

    Example:
      >>> from influence.attribution.scan import reader
      >>> read = reader(task, params, query)
      >>> read(next(iter(batches))).shape
      (5, 1, 3)
    """
    if _forward(query, form, by_layer=by_layer):
        along = forward.reader(task, params, query)
        return lambda batch: along(batch).sum(-1).T[..., None]
    if form is None:
        each = partial(_read, task, query.layers, CHEAPEST, params, query.forms)
    else:
        forms = query.in_form(form).forms
        each = partial(_read, task, query.layers, AS_GIVEN, params, forms)
    return each if by_layer else lambda batch: each(batch).sum(-1, keepdims=True)


def _forward(query: Query, form: Reform | None, *, by_layer: bool) -> bool:
    """Returns whether forward mode is the cheapest there is."""
    return not by_layer and form is None and len(query.names) <= FORWARD


def _as_given(
    a_BxTxI: Array, gs: Mapping[str, Array], given: Mapping[str, Any], counted: Array
) -> dict[str, Array]:
    """Returns `⟨h, DW⟩` of each example and query, `[B, Q]`, by layer."""
    del counted
    return {name: _scores(a_BxTxI, g, given[name]) for name, g in gs.items()}


def _cheapest(
    a_BxTxI: Array, gs: Mapping[str, Array], given: Mapping[str, Any], counted: Array
) -> dict[str, Array]:
    """Returns what `_as_given` does, each layer's queries in the cheaper form."""
    del counted
    examples, positions, _ = a_BxTxI.shape

    def scores(g_BxTxO: Array, form: Form) -> Array:
        if cheaper(examples, positions, form) is dense and isinstance(form, Factored):
            return _expanded(a_BxTxI, g_BxTxO, form)
        return _scores(a_BxTxI, g_BxTxO, form)

    return {name: scores(g, given[name]) for name, g in gs.items()}


def _scores(a_BxTxI: Array, g_BxTxO: Array, form: Form) -> Array:
    """Returns `⟨h, DW⟩`, `[B, Q]`, in the way of the queries' form."""
    if isinstance(form, Dense):
        d_BxN = _flat(a_BxTxI, g_BxTxO)
        h_QxN = form.h_QxOxI.reshape(len(form.h_QxOxI), -1)
        return inner(d_BxN, h_QxN)
    if isinstance(form, Projected):
        left = contract("bto,or->btr", g_BxTxO, form.left_OxR)
        right = contract("bti,is->bts", a_BxTxI, form.right_IxR)
        projected = contract("btr,bts->brs", left, right)
        return contract("brs,qrs->bq", projected, form.core_QxRxR)
    left = contract("bto,qor->btqr", g_BxTxO, form.left_QxOxR)
    right = contract("bti,qir->btqr", a_BxTxI, form.right_QxIxR)
    return contract("btqr,btqr->bq", left, right)


def _expanded(a_BxTxI: Array, g_BxTxO: Array, form: Factored) -> Array:
    """Returns the scores of factored queries as matrices, some of which are made anew.

    In a loop: the compiler would make those of all layers before the pass begins, for
    they do not depend on the batch, and hold on to what factors are meant to save. Over
    groups of queries, not over queries and a `vmap`: that puts them on the left of the
    product, which takes up to twice as long on a CPU.
    """
    d_BxN = _flat(a_BxTxI, g_BxTxO)
    queries = len(form.left_QxOxR)
    groups = -(-queries // EXPANDED)
    each = -(-queries // groups)

    def grouped(x_QxDxR: Array) -> Array:
        rest = groups * each - queries
        padded = jnp.pad(x_QxDxR, ((0, rest), (0, 0), (0, 0)))
        return padded.reshape(groups, each, *x_QxDxR.shape[1:])

    def scored(group: Factored) -> Array:
        return inner(d_BxN, dense(group).h_QxOxI.reshape(each, -1))

    scores_GxBxQ = jax.lax.map(scored, jax.tree.map(grouped, form))
    return scores_GxBxQ.transpose(1, 0, 2).reshape(len(d_BxN), -1)[:, :queries]


def _flat(a_BxTxI: Array, g_BxTxO: Array) -> Array:
    """Returns each example's gradient as a vector.

    For a product over two axes is one that XLA first transposes.
    """
    d_BxOxI = contract("bto,bti->boi", g_BxTxO, a_BxTxI)
    return d_BxOxI.reshape(len(d_BxOxI), -1)


AS_GIVEN = Reading(_as_given)
CHEAPEST = Reading(_cheapest)


def cheaper(examples: int, positions: int, form: Form) -> Reform:
    """Returns the form that takes fewer multiplications for one batch of a layer.

    Dense: `B O I (T + Q)`, and `Q R O I` to expand factors once a batch. Factored, for
    queries that are: `B T Q R (O + I + 1)`. Matrices are not factored for a scan, and a
    joint basis is left as it is.
    """
    if isinstance(form, Dense):
        return dense
    if isinstance(form, Projected):
        return lambda form: form
    queries, outputs, rank = form.left_QxOxR.shape
    inputs = form.right_QxIxR.shape[1]
    whole = count.dense_scan(examples, positions, queries, outputs, inputs)
    whole += count.expanded(queries, rank, outputs, inputs)
    samples = examples * positions
    parts = count.factored_scan(samples, queries, rank, outputs, inputs)
    return dense if whole < parts else factored


def fold(task: Task, params: Params, query: Query, reading: Reading) -> Fold:
    """Returns the pass that computes `-reading`, `[N, ..., Q, rows]`.

    Args:
      task: the model and its loss.
      params: its parameters.
      query: what is asked.
      reading: of each layer, something linear in the gradient, `[B, ..., Q]`.
    """
    read = partial(_read, task, query.layers, reading, params, query.forms)
    return collected("scores", read)


@jax.jit(static_argnums=(0, 1, 2))
def _read(
    task: Task,
    layers: tuple[Layer, ...],
    reading: Reading,
    params: Params,
    forms: Mapping[str, Form],
    batch: Batch,
) -> Array:
    given: dict[str, dict] = {x.reads: {} for x in layers}
    for x in layers:
        given[x.reads][x.name] = forms[x.name]
    found = read_loss(task, layers, reading, Empirical(), params, batch, given)
    return -by_matrix(layers, found)
