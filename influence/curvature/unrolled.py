"""What training would have made of a gradient, from the final weights alone.

    h = s ∘ f(s G s) (s ∘ ∇f),   f(σ) = (1 - exp(-d σ)) / σ

Near its end training is gradient descent on a quadratic with the Gauss–Newton matrix
`G`, in a metric `s²` that plain descent has none of and Adam makes of its second
moments: over a distance `d`, the sum of its learning rates, a gradient that is added to
all of them moves the weights by `f` of it. That is an influence function whose damping
is not chosen: SOURCE with one segment (Bae et al. 2024), but of exact products with all
layers together, where the eigenbasis has blocks.

`f` of the matrix comes from the space that as many preconditioned conjugate gradients
would search, at the same cost: the fitted curvature says where to look, and what is
found there is of the exact matrix.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.curvature import gauss_newton
from influence.curvature.operator import Curvature, Gradients
from influence.curvature.solvers import Solution, Solver
from influence.linalg import solvers
from influence.linalg.damping import Absolute, Travelled
from influence.model.task import Task
from influence.types import Batch, Params


@dataclass(frozen=True)
class Unrolled(Solver):
    """Follows training instead of inverting: exact products, no damping to choose.

    Attributes:
      task: the model and its loss.
      batches: the fixed sequences the Gauss–Newton matrix is averaged over.
      distance: `d`, how far training went: see `Training.distance`.
      scale: `s`, by layer: the root of the metric; one everywhere if empty.
      steps: how many products with the matrix.

    Example:
      >>> from influence.curvature.unrolled import Unrolled
      >>> training = train.Training(task, recipe, examples, lambda seed: start)
      >>> solver = Unrolled(task, batches, distance=1.0)
      >>> followed = influence.query(curvature, params, measurements, solver=solver)
      >>> dict(followed.about)["damping"]
      'as far as training goes, 1'
    """

    task: Task
    batches: Iterable[Batch]
    distance: float
    scale: Mapping[str, Array] = field(default_factory=dict)
    steps: int = 20

    def __call__(
        self, curvature: Curvature, params: Params, gradients: Gradients
    ) -> Solution:
        """Returns the solution, and what the last step added to it.

        Raises:
          ValueError: if the scale is of other layers, or there is no step.
        """
        if self.steps < 1:
            raise ValueError(
                f"Training is followed for 1 step or more, not {self.steps}."
            )
        strange = set(self.scale) ^ set(gradients) if self.scale else set()
        if strange:
            raise ValueError(
                f"The scale and the curvature are of different layers: only one of "
                f"them has {', '.join(sorted(strange))}. Choose the same for both."
            )
        # Plain descent has the same metric everywhere.
        scale = self.scale or {k: jnp.ones_like(x[0]) for k, x in gradients.items()}
        act = gauss_newton.operator(self.task, curvature.layers, params, self.batches)
        found = solvers.krylov(
            lambda v: _by(scale, act(_by(scale, v))),
            _preconditioner(curvature, scale, self.distance),
            Travelled(self.distance),
            _by(scale, gradients),
            self.steps,
            shift=1 / self.distance,
        )
        last = tuple(np.asarray(found.last_Q, float).tolist())
        return Solution(_by(scale, found.x), {"last_step": last})

    def about(self) -> dict[str, str]:
        """Returns how far training went, and in which metric."""
        metric = ", in the optimizer's metric" if self.scale else ""
        return {
            "solver": f"training unrolled{metric}, {self.steps} steps",
            "damping": str(Travelled(self.distance)),
        }


def _preconditioner(
    curvature: Curvature, scale: Mapping[str, Array], distance: float
) -> solvers.Operator:
    """Returns `s⁻¹ (Ĝ + mean(s⁻²) / d)⁻¹ s⁻¹`, near `(s G s + 1 / d)⁻¹`.

    In the fitted curvature's eigenbasis a metric can only be added as its mean.
    """
    inverse = {k: 1 / x for k, x in scale.items()}
    dampings = {
        k: Absolute(float((x**2).mean()) / distance) for k, x in inverse.items()
    }

    def act(v: Gradients) -> dict[str, Array]:
        found = {}
        for k, x in _by(inverse, v).items():
            found |= curvature.filtered({k: x}, dampings[k])
        return _by(inverse, found)

    return act


def _by(scale: Mapping[str, Array], v: Gradients) -> dict[str, Array]:
    """Returns each layer's gradients times its scale."""
    return {k: scale[k][None] * x for k, x in v.items()}


def adam_scale(
    diagonal: Curvature, batch: int, *, floor: float = 1e-3
) -> dict[str, Array]:
    """Returns the root of the metric Adam trains in, as the final weights tell it.

        s² = 1 / √v,   v = diag(F) / B

    Near the end of training the gradient of a batch of `B` sequences is mostly noise,
    whose second moments are the diagonal of the Fisher over `B`: what Adam divides by,
    without its state. Whatever the loss is averaged over cancels.

    Args:
      diagonal: the Fisher's diagonal, as `diagonal` fits it.
      batch: how many sequences an update took.
      floor: as a share of the mean second moment; entries that no sequence in the data
        moves have none.

    Example:
      >>> from influence.curvature.diagonal import diagonal
      >>> from influence.curvature.unrolled import adam_scale
      >>> squares = diagonal(task, params, batches, layers="block.*")
      >>> adam_scale(squares, batch=5)["block.mix"].shape
      (8, 8)
    """
    mean = np.mean([float(x.lam_OxI.mean()) for x in diagonal.blocks.values()])
    return {
        k: ((x.lam_OxI + floor * mean) / batch) ** -0.25
        for k, x in diagonal.blocks.items()
    }
