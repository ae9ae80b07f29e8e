"""The simplest curvatures, to compare with: a diagonal, and none at all."""

from collections.abc import Sequence

import jax.numpy as jnp

from influence.curvature import eigenvalues
from influence.curvature.begin import begin, check_factor
from influence.curvature.eigenvalues import Bases
from influence.curvature.operator import Curvature
from influence.fold import Run, run
from influence.linalg.basis import Basis
from influence.linalg.contract import wide
from influence.linalg.kronecker import Kronecker
from influence.model.task import Labels, Sampled, Task
from influence.types import Batches, Params, named_leaves


def diagonal(
    task: Task,
    params: Params,
    batches: Batches,
    *,
    layers: str | Sequence[str] = "*",
    labels: Labels = Sampled(),
    run: Run = run,
) -> Curvature:
    """Fits the diagonal of the Fisher: each parameter's mean squared gradient.

    Args:
      task: the model and its loss.
      params: its parameters.
      batches: the data; walked once, after a look at all of it.
      layers: a glob on the layers' names, or several.
      labels: where labels come from: the model itself, or `Empirical()`.
      run: carries out the pass.

    Raises:
      ValueError: as `fit` does.

    Example:
      >>> from influence.curvature.diagonal import diagonal
      >>> diagonal(task, params, batches, layers="block.*").about
      'diagonal Fisher, labels Sampled(seed=0, draws=1)'
    """
    chosen = begin(task, params, batches, layers)
    standard = Basis(())
    bases = Bases(
        {x.reads: standard for x in chosen}, {x.name: standard for x in chosen}
    )
    found = run(eigenvalues.fold(task, params, chosen, labels, bases), batches)
    for x in chosen:
        check_factor(x, "mean squared gradient", found.lam[x.name])
    return Curvature(
        layers=chosen,
        blocks={
            x.name: Kronecker(standard, standard, found.lam[x.name]) for x in chosen
        },
        positions=0,
        sequences=found.sequences,
        labels=str(labels),
        method="diagonal Fisher",
    )


def identity(
    task: Task,
    params: Params,
    batches: Batches,
    *,
    layers: str | Sequence[str] = "*",
) -> Curvature:
    """Returns no curvature, `G = I`: solved undamped, scores are gradients' products.

    Args:
      task: the model and its loss.
      params: its parameters.
      batches: the data; looked at as for a fit, and then not needed.
      layers: a glob on the layers' names, or several.

    Raises:
      ValueError: as `fit` does.

    Example:
      >>> from influence.curvature.diagonal import identity
      >>> none = identity(task, params, batches, layers="block.*")
      >>> undamped = influence.Eigenbasis(influence.Absolute(0.0))
      >>> products = influence.query(none, params, measurements, solver=undamped)
      >>> influence.scan(task, params, products, batches).layers.attrs["curvature"]
      'identity, labels none'
    """
    chosen = begin(task, params, batches, layers)
    weights = named_leaves(params)
    return Curvature(
        layers=chosen,
        blocks={
            x.name: Kronecker(
                Basis(()),
                Basis(()),
                jnp.ones(
                    (*x.stack, x.outputs, x.columns), wide(weights[x.parameter].dtype)
                ),
            )
            for x in chosen
        },
        positions=0,
        sequences=0,
        labels="none",
        method="identity",
    )
