"""K-FAC: eigenvalues that are products of those of the factors.

    G ≈ T · A ⊗ S

(Martens & Grosse 2015). It takes one pass where EK-FAC takes two, and assumes what
EK-FAC measures: that positions are independent, and gradients of inputs. `T`, counted
positions a sequence, brings the factors, which are averages over positions, to the
units of a sequence; kronfluence leaves it out.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from influence.curvature import covariance
from influence.curvature.begin import begin, check_moments
from influence.curvature.covariance import Moments, PerToken
from influence.curvature.operator import Curvature
from influence.fold import Run, run
from influence.linalg.basis import Basis, eigen
from influence.linalg.kronecker import Kronecker
from influence.model.task import Labels, Sampled, Task
from influence.types import Batches, Params


def kfac(
    task: Task,
    params: Params,
    batches: Batches,
    *,
    layers: str | Sequence[str] = "*",
    labels: Labels = Sampled(),
    factors: PerToken = PerToken(),
    run: Run = run,
) -> Curvature:
    """Fits K-FAC to a model and its data, in one pass.

    Args:
      task: the model and its loss.
      params: its parameters.
      batches: the data; walked once, after a look at all of it.
      layers: a glob on the layers' names, or several.
      labels: where labels come from: the model itself, or `Empirical()`.
      factors: into how many blocks the covariances are cut.
      run: carries out the pass.

    Raises:
      ValueError: as `fit` does.

    Example:
      >>> from influence.curvature.kfac import kfac
      >>> kfac(task, params, batches, layers="block.*").about
      'K-FAC, labels Sampled(seed=0, draws=1)'
    """
    chosen = factors.grouped(begin(task, params, batches, layers))
    found = run(covariance.fold(task, params, chosen, labels, factors), batches)
    check_moments(chosen, found)
    inputs = {x.reads: _eigen(found.inputs[x.reads], factors.inputs(x)) for x in chosen}
    blocks = {}
    for x in chosen:
        values_in, basis_in = inputs[x.reads]
        values_out, basis_out = _eigen(found.gradients[x.name], factors.outputs(x))
        scale = found.positions[x.reads] / found.sequences
        lam = scale * values_out[..., :, None] * values_in[..., None, :]
        blocks[x.name] = Kronecker(basis_in, basis_out, lam)
    return Curvature(
        layers=chosen,
        blocks=blocks,
        positions=max(found.positions.values()),
        sequences=found.sequences,
        labels=str(labels),
        method=f"K-FAC{factors.about}",
    )


def _eigen(moments: Moments, blocks: tuple[int, ...]) -> tuple[Array, Basis]:
    """Returns one side's eigenvalues, none negative, and its basis."""
    if not blocks:
        (variances,) = moments
        return variances, Basis(())
    pairs = [eigen(x) for x in moments]
    values = jnp.concatenate([jnp.maximum(x, 0) for x, _ in pairs], axis=-1)
    return values, Basis(tuple(q for _, q in pairs))
