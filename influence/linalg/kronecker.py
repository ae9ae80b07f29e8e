"""One layer's curvature as a value: `Q diag(λ) Qᵀ` with `Q = Q_S ⊗ Q_A`.

A matrix gradient `V_OxI` is a vector to this operator. In the eigenbasis it is
`Q_Sᵀ V Q_A`, where the operator only scales entries, so that multiplying and solving
cost four matrix products each (Grosse et al. 2023, arXiv 2308.03296; the
eigenbasis and refitted eigenvalues are George et al. 2018, arXiv 1806.03884).

Every array may stand behind stack axes, `lam_OxI` as `[*stack, O, I]`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from influence.linalg.basis import Basis, turn
from influence.linalg.damping import Inverse


class Kronecker(NamedTuple):
    """The operator `Q diag(λ) Qᵀ` on matrices `V_OxI`.

    Attributes:
      inputs: the basis of the input side, `Q_A`.
      outputs: the basis of the output side, `Q_S`.
      lam_OxI: eigenvalues, one for each pair of basis vectors.
    """

    inputs: Basis
    outputs: Basis
    lam_OxI: Array

    def rotate(self, v_OxI: Array) -> Array:
        """Returns `Q_Sᵀ V Q_A`."""
        return turn(v_OxI, self.outputs, self.inputs)

    def unrotate(self, v_OxI: Array) -> Array:
        """Returns `Q_S V Q_Aᵀ`."""
        return self.outputs.out_of(self.inputs.out_of(v_OxI), axis=-2)

    def factors(self, left_OxR: Array, right_IxR: Array) -> tuple[Array, Array]:
        """Returns `Q_S left` and `Q_A right`: of `left rightᵀ` turned back, factors."""
        left, right = self.outputs.out_of(left_OxR.mT), self.inputs.out_of(right_IxR.mT)
        return left.mT, right.mT

    def multiply(self, v_OxI: Array) -> Array:
        """Returns `Q diag(λ) Qᵀ v`."""
        return self.unrotate(self.lam_OxI * self.rotate(v_OxI))

    def solve(self, v_OxI: Array, inverse: Inverse) -> Array:
        """Returns `Q diag(inverse(λ)) Qᵀ v`: the damped inverse applied to `v`."""
        return self.unrotate(inverse(self.lam_OxI) * self.rotate(v_OxI))

    def dense(self) -> Array:
        """Returns the operator as `[*stack, O·I, O·I]`, for layers small enough."""
        *stack, outputs, inputs = self.lam_OxI.shape
        size = outputs * inputs
        q_out, q_in = self.outputs.dense(outputs), self.inputs.dense(inputs)
        q = jnp.einsum("...ab,...cd->...acbd", q_out, q_in)
        q = jnp.broadcast_to(q.reshape(*q.shape[:-4], size, size), (*stack, size, size))
        lam = self.lam_OxI.reshape(*stack, 1, size)
        return (q * lam) @ jnp.matrix_transpose(q)
