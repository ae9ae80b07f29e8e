"""One layer's curvature as a value: `Q diag(λ) Qᵀ` with `Q = Q_S ⊗ Q_A`.

A matrix gradient `V_OxI` is a vector to this operator. In the eigenbasis it is
`Q_Sᵀ V Q_A`, where the operator only scales entries, so that multiplying and solving
cost four matrix products each (Grosse et al. 2023, arXiv 2308.03296, section 2.3; the
eigenbasis and refitted eigenvalues are George et al. 2018, arXiv 1806.03884).

Every array may stand behind stack axes, `lam_OxI` as `[*stack, O, I]`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Inverse = Callable[[Array], Array]
"""What the inverse multiplies by: `lam_OxI -> 1 / (lam + damping)`."""


@dataclass(frozen=True)
class Relative:
    """Damps each matrix by `factor` times its mean eigenvalue, 0.1 in the paper."""

    factor: float = 0.1

    def __call__(self, lam: Array) -> Array:
        """Returns `1 / (lam + factor · mean(lam))`."""
        return 1 / (lam + self.factor * lam.mean((-2, -1), keepdims=True))

    def __str__(self) -> str:
        """Says what the damping is."""
        return f"{self.factor:g} × mean eigenvalue of each matrix"


@dataclass(frozen=True)
class Absolute:
    """Damps every matrix by the same number, in the units of the curvature."""

    damping: float

    def __call__(self, lam: Array) -> Array:
        """Returns `1 / (lam + damping)`."""
        return 1 / (lam + self.damping)

    def __str__(self) -> str:
        """Says what the damping is."""
        return f"{self.damping:g}"


class Kronecker(NamedTuple):
    """The operator `Q diag(λ) Qᵀ` on matrices `V_OxI`.

    Attributes:
      q_in_IxI: eigenvectors of the input covariance, in columns.
      q_out_OxO: eigenvectors of the gradient covariance, in columns.
      lam_OxI: eigenvalues, one for each pair of eigenvectors.
    """

    q_in_IxI: Array
    q_out_OxO: Array
    lam_OxI: Array

    def rotate(self, v_OxI: Array) -> Array:
        """Returns `Q_Sᵀ V Q_A`."""
        return jnp.matrix_transpose(self.q_out_OxO) @ v_OxI @ self.q_in_IxI

    def unrotate(self, v_OxI: Array) -> Array:
        """Returns `Q_S V Q_Aᵀ`."""
        return self.q_out_OxO @ v_OxI @ jnp.matrix_transpose(self.q_in_IxI)

    def multiply(self, v_OxI: Array) -> Array:
        """Returns `Q diag(λ) Qᵀ v`."""
        return self.unrotate(self.lam_OxI * self.rotate(v_OxI))

    def solve(self, v_OxI: Array, inverse: Inverse) -> Array:
        """Returns `Q diag(inverse(λ)) Qᵀ v`: the damped inverse applied to `v`."""
        return self.unrotate(inverse(self.lam_OxI) * self.rotate(v_OxI))

    def dense(self) -> Array:
        """Returns the operator as `[*stack, O·I, O·I]`, for layers small enough."""
        q = jnp.einsum("...ab,...cd->...acbd", self.q_out_OxO, self.q_in_IxI)
        *stack, outputs, inputs = self.lam_OxI.shape
        q = q.reshape(*stack, outputs * inputs, outputs * inputs)
        lam = self.lam_OxI.reshape(*stack, 1, outputs * inputs)
        return (q * lam) @ jnp.matrix_transpose(q)


def eigenvectors(covariance_NxN: Array) -> Array:
    """Returns the eigenvectors of a symmetric matrix, in columns, ascending.

    Computed in float64 whatever the matrix is in: directions of little variance are
    where float32 loses its digits, and where a damped inverse amplifies most.
    """
    with jax.enable_x64(True):
        wide = covariance_NxN.astype(jnp.float64)
        _, q = jnp.linalg.eigh(wide, symmetrize_input=True)
        return q.astype(covariance_NxN.dtype)
