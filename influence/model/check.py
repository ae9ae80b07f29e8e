"""What is looked at before a long pass, so that bad input costs seconds, not hours.

And the check the tracer makes of itself: that what it reads of a model's layers is what
automatic differentiation says, example by example. Most silent mistakes (a model that
mixes examples, dropout left on, a gradient that does not reach a weight the way its
product suggests) show there.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.linalg.contract import contract
from influence.model.jaxprs import aval
from influence.model.reading import Reading, by_layer
from influence.model.task import Empirical, Task, losses, read_loss, shape_of_outputs
from influence.model.trace import trace
from influence.model.weight import matrix
from influence.types import Batch, Batches, Layer, Params, named_leaves

QUICK = {"xla_backend_optimization_level": 0}
"""How XLA compiles for a CPU in half the time."""


def check_params(params: Params) -> None:
    """Raises if a parameter is not finite.

    Raises:
      ValueError: naming the parameter and how many of its entries are not finite.
    """
    leaves = named_leaves(params)
    for name, bad in _not_finite(leaves).items():
        if bad:
            raise ValueError(
                f"Parameter {name!r} has {int(bad)} entries of "
                f"{np.size(leaves[name])} that are NaN or infinite; every score would "
                "be NaN. Was the checkpoint read whole?"
            )


@jax.jit
def _not_finite(leaves: dict[str, Array]) -> dict[str, Array]:
    """Returns how many entries of each are not finite: one program for all shapes."""
    return {
        name: x.size - jnp.isfinite(x).sum()
        for name, x in leaves.items()
        if jnp.issubdtype(x.dtype, jnp.inexact)
    }


class Checked(NamedTuple):
    """Batches that are fit to be looked at closer.

    Attributes:
      first: of all.
      shared: the first with a row of several documents; None if there is none.
    """

    first: Batch
    shared: Batch | None


def check_batches(task: Task, params: Params, batches: Batches) -> Checked:
    """Returns batches to look at closer, after the task has looked at all of them.

    Raises:
      TypeError: if they can't be walked twice.
      ValueError: if there are none, or the task refuses one.
    """
    if iter(batches) is iter(batches):
        raise TypeError(
            "The batches are an iterator, which is used up after one pass, and fitting "
            "takes two. Pass something that can be walked again, such as "
            "`examples.batches(32)`."
        )
    first, shared, outputs, start = None, None, None, 0
    for batch in batches:
        if first is None:
            first, outputs = batch, shape_of_outputs(task, params, batch.inputs)
        real = np.asarray(batch.real_B)
        rows = jax.tree.map(lambda x, real=real: np.asarray(x)[real], batch.inputs)
        task.check(rows, outputs, batches.ids[start : start + int(real.sum())])
        start += int(real.sum())
        if shared is None and len(_of_several(batch)):
            shared = batch
    if first is None:
        raise ValueError("There are no examples: the data is empty.")
    return Checked(first, shared)


def _of_several(batch: Batch) -> np.ndarray:
    """Returns the rows that hold several documents."""
    if not isinstance(batch.inputs, Mapping) or "segments" not in batch.inputs:
        return np.empty(0, int)
    segments = np.asarray(batch.inputs["segments"])
    return np.flatnonzero((segments.max(1) > segments[:, 0]) & (segments[:, 0] > 0))


def check_taps(
    task: Task, layers: Sequence[Layer], params: Params, batch: Batch
) -> None:
    """Compares what is read of each layer with `jax.grad`, on the first two examples.

    Each example's gradient, read from a batch of both, must equal the gradient of that
    example alone. The comparison is of `uᵀ DW w` for random `u` and `w`, which differ
    whenever the matrices do, so no example's gradient is held for all layers at once.

    Raises:
      ValueError: naming the layer, with both numbers.
    """
    two = jax.tree.map(lambda x: np.asarray(x)[:2], batch)
    layers, probes = tuple(layers), _probes(layers)
    uses = trace(task.outputs, params, two.inputs).uses
    # Rounding stays well below the square root of the precision, and a mistake well
    # above, whatever the precision is.
    eps = {
        x.name: max(jnp.finfo(aval(y.use.out).dtype).eps for y in uses[x.name])
        for x in layers
    }
    slack = {k: float(x) ** 0.5 for k, x in eps.items()}
    with jax.default_matmul_precision("highest"):
        together = _read(task, layers, params, two, probes)
        for i in range(len(two.real_B)):
            one = jax.tree.map(lambda x, i=i: x[i : i + 1], two)
            alone, norm = _differentiate(task, layers, params, one, probes)
            like = _like(together, i, alone, norm, slack)
            for x in layers:
                if not like[x.name]:
                    read, expected = together[x.name][..., i], alone[x.name]
                    _refuse(x, i, read, expected, norm[x.name])


def check_documents(task: Task, params: Params, batch: Batch) -> None:
    """Raises if what is in one document of a row changes another's outputs.

    Looks at the first row that holds two documents: every token of the first is
    exchanged, and the outputs in all others must stay what they were.

    Raises:
      ValueError: with the position and the size of the change.
    """
    shared = _of_several(batch)
    if not len(shared):
        return
    at = slice(shared[0], shared[0] + 1)
    row = jax.tree.map(lambda x: jnp.asarray(x)[at], batch.inputs)
    before = task.outputs(params, row)
    tokens, first = row["tokens"], row["segments"] == row["segments"][:, :1]
    others = jnp.where(first, (tokens + 1) % before.shape[-1], tokens)
    after = task.outputs(params, {**row, "tokens": others})
    change = jnp.where(first, 0, jnp.abs(after - before).max(-1))[0]
    change = jnp.where(row["segments"][0] == 0, 0, change)
    place = int(change.argmax())
    # A mask leaves nothing but rounding, far below the square root of the precision.
    if not change[place] <= jnp.finfo(before.dtype).eps ** 0.5 * jnp.abs(before).max():
        raise ValueError(
            f"The model lets documents of one row see each other: exchanging the first "
            f"document's tokens changes the output at position {place}, in document "
            f"{int(row['segments'][0, place])}, by {float(change[place]):.3g}. Let "
            "`apply(params, tokens, segments)` mask attention between different "
            "segments, or leave the segments out."
        )


Probes = Mapping[str, tuple[Array, Array]]
"""A random `u_O` and `w_I` for each layer, behind its stack."""


def _probes(layers: Sequence[Layer]) -> Probes:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

    return {
        x.name: (normal(*x.stack, x.outputs), normal(*x.stack, x.columns))
        for x in layers
    }


def _project(
    a_BxTxI: Array, gs: Mapping[str, Array], given: Probes, counted: Array
) -> dict[str, Array]:
    """Returns `uᵀ DW w` of each example, `[B]`, by layer."""
    del counted
    return {
        name: contract("bto,bti,o,i->b", g, a_BxTxI, *given[name])
        for name, g in gs.items()
    }


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what `jax.jit(function, static_argnums=(0, 1))` does.

    Compiled without optimisation where that is quick: for what runs on two examples,
    once, a CPU's compiler otherwise takes far longer than what it compiled.
    """

    @cache
    def jitted() -> Callable[..., Any]:
        # Asked for late: which backend there is is not known at import.
        options = QUICK if jax.default_backend() == "cpu" else None
        return jax.jit(function, static_argnums=(0, 1), compiler_options=options)

    return wraps(function)(lambda *arguments: jitted()(*arguments))


@_once
def _read(
    task: Task, layers: tuple[Layer, ...], params: Params, batch: Batch, probes: Probes
) -> dict[str, Array]:
    given: dict[str, dict] = {x.reads: {} for x in layers}
    for x in layers:
        given[x.reads][x.name] = probes[x.name]
    found = read_loss(
        task, layers, Reading(_project), Empirical(), params, batch, given
    )
    return by_layer(found)


@_once
def _differentiate(
    task: Task, layers: tuple[Layer, ...], params: Params, batch: Batch, probes: Probes
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns `uᵀ DW w` of one example by `jax.grad`, and the norm of `DW`."""

    def loss(params):
        outputs = task.outputs(params, batch.inputs)
        return losses(task, outputs, task.labels(batch.inputs), batch).sum()

    leaves = named_leaves(jax.grad(loss, allow_int=True)(params))
    found = {x.name: matrix(x, leaves) for x in layers}
    along = {
        k: contract("...oi,...o,...i->...", v, *probes[k]) for k, v in found.items()
    }
    return along, {k: jnp.sqrt((v**2).sum((-2, -1))) for k, v in found.items()}


@jax.jit
def _like(
    together: dict[str, Array],
    example: int,
    alone: dict[str, Array],
    norm: dict[str, Array],
    slack: dict[str, float],
) -> dict[str, Array]:
    """Returns of each layer whether an example's numbers agree."""
    apart = {k: jnp.abs(x[..., example] - alone[k]) for k, x in together.items()}
    return {
        k: (x <= (slack[k] * norm[k]).astype(x.dtype)).all() for k, x in apart.items()
    }


def _refuse(
    layer: Layer, example: int, read: Array, expected: Array, norm: Array
) -> None:
    worst = jnp.unravel_index(jnp.argmax(jnp.abs(read - expected)), read.shape)
    raise ValueError(
        f"What is read of layer {layer.name!r} is not its gradient: along a random "
        f"direction example {example} of a batch has {float(read[worst]):.6g}, but "
        f"{float(expected[worst]):.6g} by `jax.grad` on that example alone (the "
        f"gradient's norm is {float(norm[worst]):.6g}). Does the model mix examples "
        "(batch statistics), use the weight in another way as well, or stop its "
        "gradient?"
    )
