"""What to do about eigenvalues that are small: damped inverses.

An inverse is a function of a layer's eigenvalues, `lam_OxI -> what to multiply by`. Two
kinds: *dampings* add something to the curvature, so that any solver can use them;
*filters* are other functions of the eigenvalues, for solving in the eigenbasis alone.
"Relative" ones are relative to the mean eigenvalue of each matrix.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

Inverse = Callable[[Array], Array]
"""`lam_OxI -> 1 / (lam + damping)`, or another inverse that is safe near zero."""


class Damping(abc.ABC):
    """Adds a multiple of the identity to each matrix's curvature."""

    @abc.abstractmethod
    def amount(self, lam_OxI: Array) -> Array:
        """Returns what is added, `[*stack, 1, 1]`."""

    @abc.abstractmethod
    def __str__(self) -> str:
        """Says what the damping is."""

    def __call__(self, lam_OxI: Array) -> Array:
        """Returns `1 / (lam + amount)`."""
        return 1 / (lam_OxI + self.amount(lam_OxI))


@dataclass(frozen=True)
class Relative(Damping):
    """Damps each matrix by `factor` times its mean eigenvalue, 0.1 in the 2023 paper.

    Raises:
      ValueError: if `factor` is negative.

    Example:
      >>> lam_OxI = jnp.array([[3.0, 1.0], [0.0, 0.0]])  # mean 1
      >>> print(influence.Relative(1.0)(lam_OxI))
      [[0.25 0.5 ]
       [1.   1.  ]]
      >>> print(influence.Relative())
      0.1 × mean eigenvalue of each matrix
    """

    factor: float = 0.1

    def __post_init__(self) -> None:
        """Raises if the damping is negative."""
        _check(self.factor)

    def amount(self, lam_OxI: Array) -> Array:
        """Returns `factor · mean(lam)`."""
        return self.factor * _mean(lam_OxI)

    def __str__(self) -> str:
        """Says what the damping is."""
        return f"{self.factor:g} × mean eigenvalue of each matrix"


@dataclass(frozen=True)
class Absolute(Damping):
    """Damps every matrix by the same number, in the units of the curvature.

    Raises:
      ValueError: if `damping` is negative.

    Example:
      >>> lam_OxI = jnp.array([[3.0, 1.0], [0.0, 0.0]])  # mean 1
      >>> print(influence.Absolute(1.0)(lam_OxI))
      [[0.25 0.5 ]
       [1.   1.  ]]
    """

    damping: float

    def __post_init__(self) -> None:
        """Raises if the damping is negative."""
        _check(self.damping)

    def amount(self, lam_OxI: Array) -> Array:
        """Returns `damping`."""
        return jnp.full_like(_mean(lam_OxI), self.damping)

    def __str__(self) -> str:
        """Says what the damping is."""
        return f"{self.damping:g}"


def implied(rate: float, steps: int, momentum: float = 0.0) -> Absolute:
    """Returns the damping that training itself implies, `1 / (η K)`.

    After `K` steps of gradient descent a direction of curvature `σ` has gone
    `1 - exp(-η K σ)` of its way, as with a damped inverse (SOURCE, Bae et al. 2024).

    Args:
      rate: the mean learning rate `η`, for the loss averaged over sequences.
      steps: `K`.
      momentum: heavy-ball momentum `β`, which makes of `η` an `η / (1 - β)`.

    Example:
      >>> from influence.linalg.damping import implied
      >>> print(implied(rate=0.01, steps=400))
      0.25
    """
    return Absolute((1 - momentum) / (rate * steps))


@dataclass(frozen=True)
class Travelled:
    """How far training takes a gradient: `(1 - exp(-d λ)) / λ`, `d` where `λ = 0`.

    What `K` steps of gradient descent of rate `η` make of one gradient at their start,
    summed up, if the loss is quadratic and `d = η K` (SOURCE, Bae et al. 2024): `1 / λ`
    where there is much curvature, and no more than the steps themselves where there is
    none.

    Raises:
      ValueError: if `distance` is not positive.

    Example:
      >>> from influence.linalg.damping import Travelled
      >>> lam_OxI = jnp.array([[3.0, 1.0], [0.0, 0.0]])
      >>> [f"{x:.3f}" for x in Travelled(2.0)(lam_OxI).ravel()]
      ['0.333', '0.865', '2.000', '2.000']
    """

    distance: float

    def __post_init__(self) -> None:
        """Raises if nothing was travelled."""
        _check(self.distance, positive=True)

    def __call__(self, lam_OxI: Array) -> Array:
        """Returns the sum of what is left of a gradient after each step."""
        x = self.distance * lam_OxI
        far = jnp.where(x > 0, -jnp.expm1(-x) / jnp.where(x > 0, x, 1), 1)
        return self.distance * far

    def __str__(self) -> str:
        """Says what the inverse is."""
        return f"as far as training goes, {self.distance:g}"


@dataclass(frozen=True)
class Remaining:
    """What is left of a change after some training: `exp(-d λ)`.

    Raises:
      ValueError: if `distance` is negative.

    Example:
      >>> from influence.linalg.damping import Remaining
      >>> lam_OxI = jnp.array([[3.0, 1.0], [0.0, 0.0]])
      >>> [f"{x:.3f}" for x in Remaining(2.0)(lam_OxI).ravel()]
      ['0.002', '0.135', '1.000', '1.000']
    """

    distance: float

    def __post_init__(self) -> None:
        """Raises if training went backwards."""
        _check(self.distance)

    def __call__(self, lam_OxI: Array) -> Array:
        """Returns the share that is left."""
        return jnp.exp(-self.distance * jnp.maximum(lam_OxI, 0))

    def __str__(self) -> str:
        """Says what the function is."""
        return f"what training of {self.distance:g} leaves"


@dataclass(frozen=True)
class FactoredTikhonov:
    """Damps both Kronecker factors, `(A + π √δ) ⊗ (S + √δ / π)`, `δ = factor · mean`.

    With `π² = mean(λ_A) / mean(λ_S)` (Martens & Grosse 2015) the product
    is `Λ + √factor (row means + column means) + δ`, which needs no factor of its own.

    Raises:
      ValueError: if `factor` is negative.

    Example:
      >>> from influence.linalg.damping import FactoredTikhonov
      >>> lam_OxI = jnp.array([[3.0, 1.0], [0.0, 0.0]])  # mean 1
      >>> print(jnp.round(1 / FactoredTikhonov(1.0)(lam_OxI), 1))
      [[7.5 4.5]
       [2.5 1.5]]
    """

    factor: float = 0.1

    def __post_init__(self) -> None:
        """Raises if the damping is negative."""
        _check(self.factor)

    def __call__(self, lam_OxI: Array) -> Array:
        """Returns the inverse of the damped product."""
        sides = lam_OxI.mean(-1, keepdims=True) + lam_OxI.mean(-2, keepdims=True)
        return 1 / (lam_OxI + self.factor**0.5 * sides + self.factor * _mean(lam_OxI))

    def __str__(self) -> str:
        """Says what the inverse is."""
        return f"factored Tikhonov, {self.factor:g} × mean eigenvalue"


@dataclass(frozen=True)
class Tikhonov:
    """Filters each direction: `λ / (λ² + δ²)`, `δ = factor · mean`; none at `λ = 0`.

    Raises:
      ValueError: if `factor` is not positive.

    Example:
      >>> from influence.linalg.damping import Tikhonov
      >>> lam_OxI = jnp.array([[3.0, 1.0], [0.0, 0.0]])  # mean 1
      >>> print(jnp.round(Tikhonov(1.0)(lam_OxI), 3))
      [[0.3 0.5]
       [0.  0. ]]
    """

    factor: float = 0.1

    def __post_init__(self) -> None:
        """Raises if the damping is not positive."""
        _check(self.factor, positive=True)

    def __call__(self, lam_OxI: Array) -> Array:
        """Returns the filtered inverse."""
        return lam_OxI / (lam_OxI**2 + (self.factor * _mean(lam_OxI)) ** 2)

    def __str__(self) -> str:
        """Says what the inverse is."""
        return f"Tikhonov filter, {self.factor:g} × mean eigenvalue of each matrix"


@dataclass(frozen=True)
class Truncated:
    """The pseudo-inverse: directions below `factor · mean` are left out.

    Raises:
      ValueError: if `factor` is not positive.

    Example:
      >>> from influence.linalg.damping import Truncated
      >>> lam_OxI = jnp.array([[3.0, 1.0], [0.0, 0.0]])  # mean 1
      >>> print(jnp.round(Truncated(1.0)(lam_OxI), 3))
      [[0.333 0.   ]
       [0.    0.   ]]
    """

    factor: float = 0.1

    def __post_init__(self) -> None:
        """Raises if the cut is not positive."""
        _check(self.factor, positive=True)

    def __call__(self, lam_OxI: Array) -> Array:
        """Returns `1 / lam` of the directions that are kept."""
        kept = lam_OxI > self.factor * _mean(lam_OxI)
        return jnp.where(kept, 1 / jnp.where(kept, lam_OxI, 1), 0)

    def __str__(self) -> str:
        """Says what the inverse is."""
        return f"eigenvalues above {self.factor:g} × mean of each matrix"


def _mean(lam_OxI: Array) -> Array:
    return lam_OxI.mean((-2, -1), keepdims=True)


def _check(damping: float, *, positive: bool = False) -> None:
    """Raises for a damping that would make an inverse of the wrong sign, or none."""
    if not damping >= 0 or (positive and damping == 0):
        least = "positive" if positive else "zero or more"
        raise ValueError(f"A damping must be {least}, not {damping}.")
