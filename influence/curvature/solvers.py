"""How `(G + damping)⁻¹ ∇f` is solved for.

`Eigenbasis` inverts the fitted curvature itself, block by block. The others take the
fitted curvature as a preconditioner, or not at all, and solve with exact products of
the Gauss–Newton matrix on some fixed sequences, all blocks together: slower, and closer
to what retraining does where blocks are not independent.
"""

import abc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.curvature import gauss_newton
from influence.curvature.operator import Curvature, Gradients
from influence.linalg import solvers
from influence.linalg.damping import Damping, Inverse, Relative
from influence.linalg.kronecker import Kronecker
from influence.linalg.solvers import dot
from influence.model.task import Task
from influence.types import Batch, Params

DIVERGED = 1e6
"""A relative residual from which there is no way back."""


class Diverged(ValueError):
    """A series that does not converge, with the damping and rate it was given."""


class Solution(NamedTuple):
    """Solved gradients.

    Attributes:
      solved: `(G + damping)⁻¹ v`, by layer, as the gradients were.
      facts: what there is to say of each right-hand side, a number each.
    """

    solved: dict[str, Array]
    facts: dict[str, tuple[float, ...]]


class Taken(NamedTuple):
    """Gradients that were taken to be solved.

    Attributes:
      solution: of them.
      own_Q: each one's product with its solution, over all layers.
      turned: whether the solution is left in the eigenbasis, `Qᵀ h`.
    """

    solution: Solution
    own_Q: Array
    turned: bool = False


class Solver(abc.ABC):
    """Solves for gradients, a matrix `[Q, *stack, O, I]` for each layer."""

    @abc.abstractmethod
    def __call__(
        self, curvature: Curvature, params: Params, gradients: Gradients
    ) -> Solution:
        """Returns the solution."""

    @abc.abstractmethod
    def about(self) -> dict[str, str]:
        """Returns what scores have to say of the solver: its name, its damping."""

    def taken(
        self, curvature: Curvature, params: Params, gradients: dict[str, Array]
    ) -> Taken:
        """Returns the solution of gradients, which are taken out of their dictionary.

        For many queries they are most of the memory, and of no use once solved.
        """
        solution = self(curvature, params, gradients)
        own_Q = dot(gradients, solution.solved)
        gradients.clear()
        return Taken(solution, own_Q)


@dataclass(frozen=True)
class Eigenbasis(Solver):
    """Inverts the fitted curvature in its eigenbasis; four matrix products a layer.

    Attributes:
      inverse: how eigenvalues are damped and inverted.

    Example:
      >>> from influence.linalg.damping import Tikhonov
      >>> solver = influence.Eigenbasis(Tikhonov(0.1))
      >>> filtered = influence.query(curvature, params, measurements, solver=solver)
      >>> dict(filtered.about)["damping"]
      'Tikhonov filter, 0.1 × mean eigenvalue of each matrix'
    """

    inverse: Inverse = Relative()

    def __call__(
        self, curvature: Curvature, params: Params, gradients: Gradients
    ) -> Solution:
        """Returns the solution."""
        del params  # The curvature knows all it needs of them.
        return Solution(curvature.solve(gradients, self.inverse), {})

    def taken(
        self, curvature: Curvature, params: Params, gradients: dict[str, Array]
    ) -> Taken:
        """Returns the solution, in the eigenbasis.

        Each layer's gradients are gone once it is solved.
        """
        del params
        curvature.check_inverse(self.inverse, gradients)
        solved, owns = {}, []
        for name in list(gradients):
            turned = curvature.rotated({name: gradients.pop(name)})
            own = self.scaled(curvature.blocks, turned)
            # Work that is only under way would hold on to what it is made of.
            owns.append(jax.block_until_ready(dot(turned, own)))
            solved |= own
            del turned  # or it would be there beside the next layer's
        return Taken(Solution(solved, {}), sum(owns[1:], owns[0]), turned=True)

    def scaled(
        self, blocks: Mapping[str, Kronecker], turned: Gradients
    ) -> dict[str, Array]:
        """Returns the solutions of gradients `[Q, *stack, O, I]`, both in the basis."""
        scaled = partial(_scaled, self.inverse)
        return {k: scaled(blocks[k].lam_OxI, v) for k, v in turned.items()}

    def about(self) -> dict[str, str]:
        """Returns the damping."""
        return {"solver": "eigenbasis", "damping": str(self.inverse)}


@dataclass(frozen=True)
class ConjugateGradients(Solver):
    """Conjugate gradients, preconditioned by the fitted curvature at the same damping.

    All queries are solved at once: each step linearises the model once per batch and
    sends every query's direction through. On a small fixed batch the Gauss–Newton
    matrix has low rank, so it wants more damping than the fitted curvature does: 10
    times the mean eigenvalue with 256 documents and 20 steps is what bergson publishes.

    Attributes:
      task: the model and its loss.
      batches: the fixed sequences the Gauss–Newton matrix is averaged over.
      damping: of each matrix.
      steps: how many at most.
      tolerance: stops where every relative residual is below it.

    Example:
      >>> solver = influence.ConjugateGradients(task, batches, steps=50)
      >>> refined = influence.query(curvature, params, measurements, solver=solver)
      >>> total = influence.scan(task, params, refined, batches).total
      >>> total["converged"].item(), total["residual"].item() < 1e-3
      (1.0, True)
    """

    task: Task
    batches: Iterable[Batch]
    damping: Damping = Relative(10.0)
    steps: int = 20
    tolerance: float = 1e-3

    def __call__(
        self, curvature: Curvature, params: Params, gradients: Gradients
    ) -> Solution:
        """Returns the solution, with each query's residual and whether it converged."""
        act = gauss_newton.operator(self.task, curvature.layers, params, self.batches)
        walk = solvers.conjugate_gradients(
            _damped(act, curvature, self.damping),
            lambda v: curvature.solve(v, self.damping),
            dict(gradients),
        )
        return _last(walk, self.steps, self.tolerance)

    def about(self) -> dict[str, str]:
        """Returns the damping and the steps."""
        return {
            "solver": f"conjugate gradients, at most {self.steps} steps to a residual "
            f"of {self.tolerance:g}",
            "damping": str(self.damping),
        }


@dataclass(frozen=True)
class Neumann(Solver):
    """A preconditioned Neumann series with momentum, a batch a step (ASTRA).

        x ← x - rate · (P + damping)⁻¹ ((G + damping) x - v)

    (Wang et al. 2025, who damp by what training implies, see `implied`, and decay the
    rate.) At `steps = 0` it is the solution in the eigenbasis.

    Attributes:
      task: the model and its loss.
      batches: walked over and over, one a step.
      damping: of each matrix.
      steps: how many.
      rate: of the first step.
      momentum: how much of the last move is made again.
      decay: what the rate is multiplied by, every `every` steps.
      every: see `decay`.

    Example:
      >>> from influence.curvature.solvers import Neumann
      >>> solver = Neumann(task, batches, damping=influence.Relative(10.0), steps=40)
      >>> refined = influence.query(curvature, params, measurements, solver=solver)
      >>> (residual,) = dict(refined.facts)["residual"]
      >>> residual < 1
      True
    """

    task: Task
    batches: Iterable[Batch]
    damping: Damping = Relative()
    steps: int = 200
    rate: float = 0.1
    momentum: float = 0.9
    decay: float = 0.5
    every: int = 50

    def __call__(
        self, curvature: Curvature, params: Params, gradients: Gradients
    ) -> Solution:
        """Returns the solution, with each query's residual on the last batch.

        Raises:
          Diverged: if the series does, with the step and the residual.
        """
        walk = solvers.neumann(
            _one_by_one(self.task, curvature, params, self.batches, self.damping),
            lambda v: curvature.solve(v, self.damping),
            dict(gradients),
            (self.rate * self.decay ** (i // self.every) for i in count()),
            self.momentum,
        )
        return _last(walk, self.steps)

    def about(self) -> dict[str, str]:
        """Returns the damping and the schedule."""
        return {
            "solver": f"Neumann series, {self.steps} steps at {self.rate:g} × "
            f"{self.decay:g} every {self.every}, momentum {self.momentum:g}",
            "damping": str(self.damping),
        }


@dataclass(frozen=True)
class LiSSA(Solver):
    """A Neumann series without a preconditioner, a batch a step: the baseline.

    Attributes:
      task: the model and its loss.
      batches: walked over and over, one a step.
      damping: of each matrix.
      steps: how many.
      rate: of the series. By default one over the sum of the largest damped
        eigenvalues of all matrices, which bounds what they can have together.

    Example:
      >>> from influence.curvature.solvers import LiSSA
      >>> solver = LiSSA(task, batches, damping=influence.Relative(10.0), steps=40)
      >>> slow = influence.query(curvature, params, measurements, solver=solver)
      >>> (residual,) = dict(slow.facts)["residual"]
      >>> residual < 1
      True
    """

    task: Task
    batches: Iterable[Batch]
    damping: Damping = Relative()
    steps: int = 1000
    rate: float | None = None

    def __call__(
        self, curvature: Curvature, params: Params, gradients: Gradients
    ) -> Solution:
        """Returns the solution, with each query's residual on the last batch.

        Raises:
          Diverged: if the series does, with the step and the residual.
        """
        acts = _one_by_one(self.task, curvature, params, self.batches, self.damping)
        rate = _bounded(curvature, self.damping) if self.rate is None else self.rate
        walk = solvers.lissa(acts, dict(gradients), rate)
        return _last(walk, self.steps)

    def about(self) -> dict[str, str]:
        """Returns the damping and the steps."""
        return {"solver": f"LiSSA, {self.steps} steps", "damping": str(self.damping)}


@dataclass(frozen=True)
class Exact(Solver):
    """Forms the Gauss–Newton matrix and inverts it: for some thousand weights.

    Attributes:
      task: the model and its loss.
      batches: the sequences the matrix is averaged over.
      damping: of each matrix.
      largest: more parameters than this are refused; the matrix has their square.

    Example:
      >>> from influence.curvature.solvers import Exact
      >>> solver = Exact(task, batches, damping=influence.Relative(10.0))
      >>> exact = influence.query(curvature, params, measurements, solver=solver)
      >>> dict(exact.about)["solver"]
      'exact'
    """

    task: Task
    batches: Iterable[Batch]
    damping: Damping = Relative()
    largest: int = 20_000

    def __call__(
        self, curvature: Curvature, params: Params, gradients: Gradients
    ) -> Solution:
        """Returns the solution.

        Raises:
          ValueError: if the layers have too many parameters.
        """
        layers = curvature.layers
        vectors = gauss_newton.flat(layers, gradients)
        if vectors.shape[1] > self.largest:
            raise ValueError(
                f"The layers have {vectors.shape[1]:,} parameters, whose Gauss–Newton "
                f"matrix would have their square; the limit is {self.largest:,}. "
                "Choose fewer layers, or another solver."
            )
        act = gauss_newton.operator(self.task, layers, params, self.batches)
        act = _damped(act, curvature, self.damping)
        damped = gauss_newton.dense(layers, act, vectors.dtype)
        solved = jnp.linalg.solve(damped, vectors.T).T
        return Solution(gauss_newton.unflat(layers, solved), {})

    def about(self) -> dict[str, str]:
        """Returns the damping."""
        return {"solver": "exact", "damping": str(self.damping)}


@jax.jit(static_argnums=0)
def _scaled(inverse: Inverse, lam_OxI: Array, v_QxOxI: Array) -> Array:
    return inverse(lam_OxI)[None] * v_QxOxI


def _bounded(curvature: Curvature, damping: Damping) -> float:
    """Returns one over the most that all matrices together can be multiplied with."""
    _check_damping(damping)
    lams = (x.lam_OxI for x in curvature.blocks.values())
    most = sum((x + damping.amount(x)).max((-2, -1)).sum() for x in lams)
    return float(1 / most)


def _damped(
    act: solvers.Operator, curvature: Curvature, damping: Damping
) -> solvers.Operator:
    """Returns `v -> (G + damping) v`, every matrix damped by its own amount."""
    _check_damping(damping)
    amounts = {k: damping.amount(x.lam_OxI) for k, x in curvature.blocks.items()}
    return lambda v: _plus(act(v), amounts, v)


def _check_damping(damping: Damping) -> None:
    """Raises if a damping is another function of the eigenvalues.

    Raises:
      TypeError: naming it.
    """
    if not isinstance(damping, Damping):
        raise TypeError(
            f"{damping!r} is a function of the fitted eigenvalues, which only the "
            "eigenbasis has. Give this solver a damping: `Relative` or `Absolute`."
        )


@jax.jit
def _plus(
    product: Gradients, amounts: Mapping[str, Array], v: Gradients
) -> dict[str, Array]:
    return {k: x + amounts[k][None] * v[k] for k, x in product.items()}


def _one_by_one(
    task: Task,
    curvature: Curvature,
    params: Params,
    batches: Iterable[Batch],
    damping: Damping,
) -> Iterator[solvers.Operator]:
    """Yields `v -> (G + damping) v` on one batch after the other, over and over.

    Raises:
      ValueError: if there is none.
    """
    for batch in cycle(batches):
        act = gauss_newton.operator(task, curvature.layers, params, [batch])
        yield _damped(act, curvature, damping)
    raise ValueError(gauss_newton.NO_EXAMPLES)


def _last(walk: Iterator[solvers.Step], steps: int, tolerance: float = 0.0) -> Solution:
    """Returns where a solver is after some steps, or when it has converged.

    Raises:
      Diverged: if it does.
    """
    for i, step in enumerate(walk):
        residual = np.asarray(step.residual_Q, float)
        if not (residual < DIVERGED).all():
            raise Diverged(
                f"The solver diverged: after {i} steps the relative residuals are "
                f"{residual.tolist()}. Damp more, or take smaller steps (`rate`)."
            )
        if i == steps or (residual <= tolerance).all():
            facts = {"residual": tuple(residual.tolist())}
            if tolerance:
                facts["converged"] = tuple(
                    (residual <= tolerance).astype(float).tolist()
                )
            return Solution(step.x, facts)
    raise AssertionError("solvers walk for ever")
