"""EK-FAC: eigenvectors of Kronecker factors, eigenvalues measured along them.

`Q_A`, `Q_S` are the eigenvectors of each layer's input and gradient covariance, and `Λ`
is refitted in their basis (George et al. 2018; for language models Grosse et al. 2023).
"""

from collections.abc import Sequence

from influence.curvature import covariance, eigenvalues, eigenvectors
from influence.curvature.begin import begin, check_factor, check_moments
from influence.curvature.covariance import Factors, PerToken
from influence.curvature.operator import Curvature
from influence.fold import Run, run
from influence.linalg.kronecker import Kronecker
from influence.model.task import Labels, Sampled, Task
from influence.types import Batches, Params


def fit(
    task: Task,
    params: Params,
    batches: Batches,
    *,
    layers: str | Sequence[str] = "*",
    labels: Labels = Sampled(),
    factors: Factors = PerToken(),
    run: Run = run,
) -> Curvature:
    """Fits EK-FAC to a model and its data, in two passes.

    Each pass costs a forward and an activation-backward pass, and for each layer
    `T (O² + I²)` multiplications an example for the covariances and as many, plus
    `T O I`, for the eigenvalues.

    Args:
      task: the model and its loss.
      params: its parameters.
      batches: the data; walked twice, after a look at all of it.
      layers: a glob on the layers' names, or several.
      labels: where labels come from: the model itself, or `Empirical()`.
      factors: whose eigenvectors are used, `PerToken()` or `PerSequence()`, and into
        how many blocks they are cut.
      run: carries out the passes, and between them one over the sides of layers, whose
        eigenvectors are found.

    Raises:
      TypeError: if the batches can't be walked twice.
      ValueError: if a pattern matches no layer, a parameter or statistic is not finite,
        a batch is not fit for the task, examples can't be told apart, or what is read
        of a layer is not its gradient.

    Example:
      >>> fitted = influence.fit(task, params, batches, layers="block.mlp.*")
      >>> list(fitted.blocks)
      ['block.mlp.up', 'block.mlp.down']
      >>> fitted.about
      'EK-FAC, labels Sampled(seed=0, draws=1)'
    """
    chosen = factors.grouped(begin(task, params, batches, layers))
    found = run(covariance.fold(task, params, chosen, labels, factors), batches)
    check_moments(chosen, found)
    bases = run(eigenvectors.fold(chosen, factors, found), eigenvectors.sides(chosen))
    lam = run(eigenvalues.fold(task, params, chosen, labels, bases), batches)
    for x in chosen:
        check_factor(x, "eigenvalues", lam.lam[x.name])
    return Curvature(
        layers=chosen,
        blocks={
            x.name: Kronecker(
                bases.inputs[x.reads], bases.outputs[x.name], lam.lam[x.name]
            )
            for x in chosen
        },
        positions=max(found.positions.values()),
        sequences=lam.sequences,
        labels=str(labels),
        method=f"EK-FAC{factors.about}",
    )
