"""What curvature is compared with: exact gradients, and a layer worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from influence.model.task import losses
from influence.model.weight import matrix
from influence.types import named_leaves
from tests import cases


def gradients(case, layers):
    """Returns each example's gradient, `[B, *stack, O, I]`, by `vmap(grad)`."""
    (batch,) = case.examples.batches(len(case.examples))

    def loss(params, row):
        one = jax.tree.map(lambda x: x[None], row)
        outputs = case.task.outputs(params, one.inputs)
        return losses(case.task, outputs, case.task.labels(one.inputs), one).sum()

    found = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(
        case.params, jax.tree.map(jnp.asarray, batch)
    )
    leaves = named_leaves(found)
    return {x.name: jax.vmap(lambda y, x=x: matrix(x, y))(leaves) for x in layers}


def head(case):
    """Returns a raw model's head's inputs and output gradients where labels count.

    Every sequence of the table is one document whose labels all count, so the counted
    positions are those with a label.
    """
    params, inputs = case.params, case.examples.inputs
    hidden = case.task.apply({**params, "head": jnp.eye(cases.D)}, inputs["tokens"])
    logits = hidden @ params["head"]
    labels, counts = case.task.labels(inputs), np.asarray(case.task.counts(inputs))
    g = jax.nn.softmax(logits) - jax.nn.one_hot(labels, cases.V, dtype=logits.dtype)
    return hidden[counts], g[counts]
