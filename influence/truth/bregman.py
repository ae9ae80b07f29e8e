"""Proximal Bregman objectives: how far one sequence moves a model held in its place.

    (1/B) Σ_i D_i(h(θ, x_i), h(θˢ, x_i)) + ε L(z, θ) + ½ Σ λ |θ - θˢ|²
    D(y, yˢ) = L(y) - L(yˢ) - ⟨∇L(yˢ), y - yˢ⟩

`M` objectives at a time, as functions of how far the layers' matrices have moved.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from influence.curvature.gauss_newton import Matrices
from influence.curvature.operator import Curvature
from influence.linalg.damping import Damping
from influence.model.tangents import covered, tangent
from influence.model.task import Task, losses
from influence.types import Batch, Layer, Params, with_leaves


def divergence(task: Task, params: Params, moved: Params, batch: Batch) -> Array:
    """Returns each example's Bregman divergence of its outputs, `[B]`, in nats.

    For cross-entropy the Kullback–Leibler divergence `KL(before ‖ after)`, whatever the
    labels; for squared errors half the squared difference.
    """
    labels = task.labels(batch.inputs)
    before, after = (task.outputs(x, batch.inputs) for x in (params, moved))

    def each(outputs: Any) -> Array:
        return losses(task, outputs, labels, batch)

    change = jax.tree.map(jnp.subtract, after, before)
    at_B, along_B = jax.jvp(each, (before,), (change,))
    return each(after) - at_B - along_B


@dataclass(frozen=True)
class Objectives:
    """Proximal Bregman objectives, as functions of how far the layers have moved.

    Two for each sequence: first those with a copy more, then those with one less.

    Attributes:
      task: the model and its loss.
      params: `θˢ`.
      curvature: its layers move; of it `damping` is made.
      corpus: what is to stay.
      sequences: one for each pair of objectives.
      copy: `|ε|`.
      damping: `λ`.
    """

    task: Task
    params: Params
    curvature: Curvature
    corpus: Sequence[Batch]
    sequences: Batch
    copy: float
    damping: Damping

    def start(self) -> dict[str, Array]:
        """Returns no move at all, `[M, *stack, O, I]` by layer.

        Raises:
          ValueError: if the damped curvature, the preconditioner, has no inverse.
        """
        self.curvature.check_inverse(self.damping)
        m = 2 * len(self.sequences.real_B)
        return {
            k: jnp.zeros((m, *x.lam_OxI.shape), x.lam_OxI.dtype)
            for k, x in self.curvature.blocks.items()
        }

    def evaluate(self, x: Matrices) -> tuple[Array, Matrices]:
        """Returns the objectives and their slopes."""
        about = (self.task, self.curvature.layers, self.params)
        total = _pulled(*about, self.sequences, self.copy, self._amounts, x)
        for batch in self.corpus:
            total = _kept(*about, batch, self._count, total, x)
        return total

    def precondition(self, v: Matrices) -> dict[str, Array]:
        """Returns the fitted `(G + λ)⁻¹ v`."""
        return self.curvature.filtered(v, self.damping)

    @cached_property
    def _amounts(self) -> dict[str, Array]:
        blocks = self.curvature.blocks
        return {k: self.damping.amount(x.lam_OxI) for k, x in blocks.items()}

    @cached_property
    def _count(self) -> float:
        return sum(float(batch.real_B.sum()) for batch in self.corpus)


@jax.jit(static_argnums=(0, 1))
def _pulled(
    task: Task,
    layers: tuple[Layer, ...],
    params: Params,
    sequences: Batch,
    copy: float,
    amounts: Matrices,
    x: Matrices,
) -> tuple[Array, Matrices]:
    """Returns `ε L + ½ Σ λ x²`, and its slope."""
    one_by_one = jax.tree.map(lambda y: jnp.concatenate([y, y])[:, None], sequences)

    def one(row: Batch, x: Matrices, copy: Array) -> Array:
        # Rows that fill up a batch are sequences like any other.
        row = row._replace(real_B=jnp.ones(1, bool))
        outputs = task.outputs(moved(layers, params, x), row.inputs)
        loss = losses(task, outputs, task.labels(row.inputs), row).sum()
        held = sum((amounts[k] * y**2).sum() for k, y in x.items())
        return copy * loss + held / 2

    half = jnp.full(len(sequences.real_B), copy)
    eps_M = jnp.concatenate([half, -half])
    return jax.vmap(jax.value_and_grad(one, 1))(one_by_one, x, eps_M)


@jax.jit(static_argnums=(0, 1))
def _kept(
    task: Task,
    layers: tuple[Layer, ...],
    params: Params,
    batch: Batch,
    count: float,
    total: tuple[Array, Matrices],
    x: Matrices,
) -> tuple[Array, Matrices]:
    """Returns a total and a batch's share of the mean divergence, with its slope."""

    def one(x: Matrices) -> Array:
        return divergence(task, params, moved(layers, params, x), batch).sum()

    found = jax.vmap(jax.value_and_grad(one))(x)
    return jax.tree.map(lambda y, z: y + z / count, total, found)


def moved(layers: Sequence[Layer], params: Params, x: Matrices) -> Params:
    """Returns parameters, the layers' matrices moved by `x`, `[*stack, O, I]`."""
    leaves = covered(params, layers)
    along = tangent(layers, leaves, x)
    return with_leaves(params, {k: y + along[k] for k, y in leaves.items()})
