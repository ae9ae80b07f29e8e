"""What every fit begins with: errors that would come after hours come first."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.curvature.covariance import Covariances
from influence.model.check import (
    check_batches,
    check_documents,
    check_params,
    check_taps,
)
from influence.model.task import Task
from influence.model.trace import select, trace
from influence.types import Batches, Layer, Params


def begin(
    task: Task, params: Params, batches: Batches, layers: str | Sequence[str]
) -> tuple[Layer, ...]:
    """Returns the chosen layers, after looking at parameters, data and gradients.

    Raises:
      TypeError: if the batches can't be walked twice.
      ValueError: if a pattern matches no layer, a parameter is not finite, a batch is
        not fit for the task, documents of one row see each other, examples can't be
        told apart, or what is read of a layer is not its gradient.
    """
    check_params(params)
    first, shared = check_batches(task, params, batches)
    _check_count(len(batches.ids) * task.counted(first.inputs).shape[1])
    if shared is not None:
        check_documents(task, params, shared)
    chosen = select(trace(task.outputs, params, first.inputs), layers)
    check_taps(task, chosen, params, first)
    return chosen


def _check_count(positions: int) -> None:
    if positions >= 2**32:
        raise ValueError(
            f"{positions} positions are more than the 32-bit counters of a pass hold. "
            "Fit on a sample: some hundred thousand sequences are plenty."
        )


def check_moments(layers: Sequence[Layer], moments: Covariances) -> None:
    """Raises for second moments that have no inverse.

    Raises:
      ValueError: naming the layer, if its moments are zero or not finite.
    """
    for x in layers:
        if not moments.positions[x.reads]:
            raise ValueError(
                "No position of any example counts: every label is masked out."
            )
        for part in moments.inputs[x.reads]:
            check_factor(x, "covariance of inputs", part)
        for part in moments.gradients[x.name]:
            check_factor(x, "covariance of gradients", part)


def check_factor(layer: Layer, what: str, factor: Array) -> None:
    """Raises for a factor, `[*stack, …]`, that is zero or not finite.

    Raises:
      ValueError: naming the layer and the factor.
    """
    if _sound(factor, len(layer.stack)):
        return
    total = _size(factor, len(layer.stack))
    for place in np.ndindex(total.shape):
        label = layer.name + "".join(f"[{i}]" for i in place)
        if not jnp.isfinite(total[place]):
            raise ValueError(
                f"The {what} of layer {label!r} is not finite. The model's activations "
                "or gradients overflow on this data: use a wider type for them."
            )
        if total[place] == 0:
            raise ValueError(
                f"The {what} of layer {label!r} is zero, so it can't be inverted: "
                "nothing that counts reaches the layer. Leave it out of `layers`."
            )


def _size(factor: Array, stack: int) -> Array:
    """Returns the sum of absolute values of each factor of a stack."""
    return jnp.abs(factor).sum(tuple(range(stack, factor.ndim)))


@jax.jit(static_argnums=1)
def _sound(factor: Array, stack: int) -> Array:
    """Returns whether all are finite and none is zero: for most, all there is to do."""
    size = _size(factor, stack)
    return (jnp.isfinite(size) & (size > 0)).all()
