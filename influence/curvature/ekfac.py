"""EK-FAC: the curvature of a model's loss, layer by layer.

    G ≈ ⊕_layers  Q diag(Λ) Qᵀ,   Q = Q_S ⊗ Q_A

with `Q_A`, `Q_S` the eigenvectors of each layer's input and gradient covariance and `Λ`
refitted along them (George et al. 2018; for language models Grosse et al. 2023).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.curvature import covariance, eigenvalues
from influence.fold import Run, run
from influence.linalg.kronecker import Inverse, Kronecker, Relative, eigenvectors
from influence.model.check import check_batches, check_params, check_taps
from influence.model.task import Labels, Sampled, Task
from influence.model.trace import select, trace
from influence.types import Batches, Layer, Params, rows

Gradients = Mapping[str, Array]
"""A matrix gradient for each layer, `[..., *stack, O, I]`, by the layer's name."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["blocks"],
    meta_fields=["layers", "positions", "sequences", "labels"],
)
@dataclass(frozen=True)
class Curvature:
    """The curvature of some layers, as a block-diagonal operator on their gradients.

    In units of squared nats per sequence: an average over sequences of squared
    gradients of the summed loss.

    Attributes:
      layers: the layers it covers.
      blocks: each layer's operator, by name.
      positions: how many counted positions the covariances were averaged over.
      sequences: how many sequences the eigenvalues were averaged over.
      labels: where the labels came from, in words.
    """

    layers: tuple[Layer, ...]
    blocks: dict[str, Kronecker]
    positions: int
    sequences: int
    labels: str

    def multiply(self, gradients: Gradients) -> dict[str, Array]:
        """Returns `G v`. Leading axes of `v`, one a query say, are kept."""
        return {k: self._on(k, Kronecker.multiply, v) for k, v in gradients.items()}

    def solve(
        self, gradients: Gradients, inverse: Inverse = Relative()
    ) -> dict[str, Array]:
        """Returns `(G + damping)⁻¹ v`. Leading axes of `v`, one a query say, are kept.

        Raises:
          ValueError: if the damped curvature of a layer has no inverse, or there is no
            curvature for one of the gradients.
        """
        solve = partial(Kronecker.solve, inverse=inverse)
        for name in gradients:
            self._check_inverse(name, inverse)
        return {k: self._on(k, solve, v) for k, v in gradients.items()}

    def dense(self) -> dict[str, Array]:
        """Returns each layer's block, `[*stack, O·I, O·I]`: for tiny models."""
        return {name: block.dense() for name, block in self.blocks.items()}

    def _on(
        self, name: str, act: Callable[[Kronecker, Array], Array], v: Array
    ) -> Array:
        block = self._block(name)
        shape = block.lam_OxI.shape
        if v.shape[v.ndim - len(shape) :] != shape:
            raise ValueError(
                f"The gradient of layer {name!r} has shape {v.shape}, which does not "
                f"end in the layer's {shape}."
            )
        on = partial(act, block)
        for _ in range(v.ndim - len(shape)):
            on = jax.vmap(on)
        return on(v)

    def _block(self, name: str) -> Kronecker:
        if name not in self.blocks:
            raise ValueError(
                f"There is no curvature for {name!r}. It was fitted for: "
                f"{', '.join(self.blocks)}."
            )
        return self.blocks[name]

    def _check_inverse(self, name: str, inverse: Inverse) -> None:
        lam = self._block(name).lam_OxI
        inverted = inverse(lam)
        if not (jnp.isfinite(inverted) & (inverted > 0)).all():
            raise ValueError(
                f"The curvature of layer {name!r} is singular with damping {inverse}: "
                f"its smallest eigenvalue is {float(lam.min()):.3g}, its mean "
                f"{float(lam.mean()):.3g}. Damp it more."
            )

    def __str__(self) -> str:
        """Returns a table: each matrix, its size and its spectrum."""
        head = f"{'layer':<40} {'O × I':>13} {'mean λ':>10} {'largest λ':>10}"
        lines = [
            f"{label:<40} {f'{x.outputs} × {x.columns}':>13} "
            f"{float(lam.mean()):>10.3g} {float(lam.max()):>10.3g}"
            for x, place, label in rows(self.layers)
            for lam in [self.blocks[x.name].lam_OxI[place]]
        ]
        said = (
            f"EK-FAC of {len(lines)} matrices, {self.sequences} sequences, "
            f"{self.positions} positions, labels {self.labels}"
        )
        return "\n".join([said, head, *lines])


def fit(
    task: Task,
    params: Params,
    batches: Batches,
    *,
    layers: str | Sequence[str] = "*",
    labels: Labels = Sampled(),
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
      run: carries out the passes.

    Raises:
      ValueError: if a pattern matches no layer, a parameter or statistic is not finite,
        a batch is not fit for the task, examples can't be told apart, or what is read
        of a layer is not its gradient.
    """
    check_params(params)
    first = check_batches(task, params, batches)
    _check_count(len(batches.ids) * task.counted(first.inputs).shape[1])
    chosen = select(trace(task.outputs, params, first.inputs), layers)
    check_taps(task, chosen, params, first)
    moments = run(covariance.fold(task, params, chosen, labels), batches)
    _check_moments(chosen, moments)
    basis = eigenvalues.Basis(
        {reads: eigenvectors(x) for reads, x in moments.inputs.items()},
        {name: eigenvectors(x) for name, x in moments.gradients.items()},
    )
    found = run(eigenvalues.fold(task, params, chosen, labels, basis), batches)
    for x in chosen:
        _check_factor(x, "eigenvalues", found.lam[x.name])
    return Curvature(
        layers=chosen,
        blocks={
            x.name: Kronecker(
                basis.inputs[x.reads], basis.gradients[x.name], found.lam[x.name]
            )
            for x in chosen
        },
        positions=max(moments.positions.values()),
        sequences=found.sequences,
        labels=str(labels),
    )


def _check_count(positions: int) -> None:
    if positions >= 2**32:
        raise ValueError(
            f"{positions} positions are more than the 32-bit counters of a pass hold. "
            "Fit on a sample: some hundred thousand sequences are plenty."
        )


def _check_moments(layers: Sequence[Layer], moments: covariance.Covariances) -> None:
    for x in layers:
        if not moments.positions[x.reads]:
            raise ValueError(
                "No position of any example counts: every label is masked out."
            )
        _check_factor(x, "covariance of inputs", moments.inputs[x.reads])
        _check_factor(x, "covariance of gradients", moments.gradients[x.name])


def _check_factor(layer: Layer, what: str, factor: Array) -> None:
    total = jnp.abs(factor).sum((-2, -1))
    for place in np.ndindex(total.shape):
        label = layer.name + "".join(f"[{i}]" for i in place)
        if not jnp.isfinite(total[place]):
            raise ValueError(
                f"The {what} of layer {label!r} is not finite. The model's activations "
                "or gradients overflow on this data: use a wider type for them."
            )
        if total[place] == 0:
            raise ValueError(
                f"The {what} of layer {label!r} is zero, so it can't be inverted: "
                "nothing that counts reaches the layer. Leave it out of `layers`."
            )
