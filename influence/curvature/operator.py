"""The curvature of a model's loss as a value, layer by layer.

    G ≈ ⊕_layers  Q diag(Λ) Qᵀ,   Q = Q_S ⊗ Q_A

Whatever it was fitted by (EK-FAC, K-FAC, only a diagonal), it multiplies, solves,
prints and is saved in the same way.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from influence.linalg.basis import Basis
from influence.linalg.damping import Inverse, Relative
from influence.linalg.kronecker import Kronecker
from influence.types import Layer, rows

TOGETHER = 2**19
"""How many entries of matrices a layer's operator acts on at a time, about.

Large matrices one by one: on a CPU that is a sixth faster than eight at a time, and
what is in between is a sixth of it.
"""

Gradients = Mapping[str, Array]
"""A matrix gradient for each layer, `[..., *stack, O, I]`, by the layer's name."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["blocks"],
    meta_fields=["layers", "positions", "sequences", "labels", "method"],
)
@dataclass(frozen=True)
class Curvature:
    """The curvature of some layers, as a block-diagonal operator on their gradients.

    In units of squared nats per sequence: an average over sequences of squared
    gradients of the summed loss.

    Attributes:
      layers: the layers it covers.
      blocks: each layer's operator, by name.
      positions: how many samples the covariances were averaged over.
      sequences: how many sequences the eigenvalues were averaged over.
      labels: where the labels came from, in words.
      method: what it was fitted by, in words.

    Example:
      >>> curvature.labels, curvature.sequences, curvature.positions
      ('Sampled(seed=0, draws=1)', 10, 47)
      >>> curvature.blocks["block.mlp.up"].lam_OxI.shape
      (16, 8)
    """

    layers: tuple[Layer, ...]
    blocks: Mapping[str, Kronecker]
    positions: int
    sequences: int
    labels: str
    method: str = "EK-FAC"

    def multiply(self, gradients: Gradients) -> dict[str, Array]:
        """Returns `G v`. Leading axes of `v`, one a query say, are kept.

        Example:
          >>> v = {"block.mix": jnp.ones((8, 8), jnp.float32)}
          >>> curvature.multiply(v)["block.mix"].shape
          (8, 8)
        """
        return {k: self._on(k, Kronecker.multiply, v) for k, v in gradients.items()}

    def solve(
        self, gradients: Gradients, inverse: Inverse = Relative()
    ) -> dict[str, Array]:
        """Returns `(G + damping)⁻¹ v`. Leading axes of `v`, one a query say, are kept.

        Raises:
          ValueError: if the damped curvature of a layer has no inverse, or there is no
            curvature for one of the gradients.

        Example:
          >>> v = {"block.mix": jnp.ones((8, 8), jnp.float32)}
          >>> x = curvature.solve(v, influence.Absolute(1.0))
          >>> back = curvature.multiply(x)["block.mix"] + 1.0 * x["block.mix"]
          >>> np.testing.assert_allclose(back, v["block.mix"], atol=1e-3)
        """
        self.check_inverse(inverse, gradients)
        return self.filtered(gradients, inverse)

    def filtered(
        self, gradients: Gradients, function: Callable[[Array], Array]
    ) -> dict[str, Array]:
        """Returns `Q f(Λ) Qᵀ v`, for any function of the eigenvalues.

        Example:
          >>> from influence.linalg.damping import Remaining
          >>> v = {"block.mix": jnp.ones((8, 8), jnp.float32)}
          >>> curvature.filtered(v, Remaining(2.0))["block.mix"].shape
          (8, 8)
        """
        return {
            k: self._on(k, Kronecker.solve, v, function) for k, v in gradients.items()
        }

    def rotated(self, gradients: Gradients) -> dict[str, Array]:
        """Returns `Qᵀ v`, in the eigenbasis; `unrotated` turns it back.

        Example:
          >>> v = {"block.mix": jnp.ones((8, 8), jnp.float32)}
          >>> back = curvature.unrotated(curvature.rotated(v))["block.mix"]
          >>> np.testing.assert_allclose(back, 1, rtol=1e-5)
        """
        return {k: self._on(k, Kronecker.rotate, v) for k, v in gradients.items()}

    def unrotated(self, gradients: Gradients) -> dict[str, Array]:
        """Returns `Q v`, of `v` in the eigenbasis.

        Example:
          >>> v = {"block.mix": jnp.ones((8, 8), jnp.float32)}
          >>> turned = curvature.unrotated(v)["block.mix"]
          >>> np.testing.assert_allclose((turned**2).sum(), 64, rtol=1e-4)
        """
        return {k: self._on(k, Kronecker.unrotate, v) for k, v in gradients.items()}

    def loaded(self) -> "Curvature":
        """Returns the same with all blocks in memory at once.

        What layers that read one activation share is there once. A curvature opened
        from files otherwise reads a block whenever it is asked for.

        Example:
          >>> list(curvature.loaded().blocks) == list(curvature.blocks)
          True
        """
        inputs: dict[str, Basis] = {}
        blocks = {}
        for x in self.layers:
            block = self.blocks[x.name]
            shared = inputs.setdefault(x.reads, block.inputs)
            blocks[x.name] = block._replace(inputs=shared)
        return replace(self, blocks=blocks)

    def dense(self) -> dict[str, Array]:
        """Returns each layer's block, `[*stack, O·I, O·I]`: for tiny models.

        Example:
          >>> curvature.dense()["block.mix"].shape
          (64, 64)
        """
        return {name: block.dense() for name, block in self.blocks.items()}

    def _on(
        self, name: str, act: Callable[..., Array], v: Array, *options: Any
    ) -> Array:
        block = self._block(name)
        shape = block.lam_OxI.shape
        if v.shape[v.ndim - len(shape) :] != shape:
            raise ValueError(
                f"The gradient of layer {name!r} has shape {v.shape}, which does not "
                f"end in the layer's {shape}."
            )
        return _on_each(act, options, block, v)

    def _block(self, name: str) -> Kronecker:
        if name not in self.blocks:
            raise ValueError(
                f"There is no curvature for {name!r}. It was fitted for: "
                f"{', '.join(self.blocks)}."
            )
        return self.blocks[name]

    def check_inverse(
        self, inverse: Inverse, names: Iterable[str] | None = None
    ) -> None:
        """Raises if the damped curvature of a layer has no inverse.

        Raises:
          ValueError: naming the layer, its smallest and its mean eigenvalue.
        """
        for name in self.blocks if names is None else names:
            lam = self._block(name).lam_OxI
            if not _invertible(inverse, lam):
                raise ValueError(
                    f"The curvature of layer {name!r} is singular with damping "
                    f"{inverse}: its smallest eigenvalue is {float(lam.min()):.3g}, "
                    f"its mean {float(lam.mean()):.3g}. Damp it more."
                )

    @property
    def about(self) -> str:
        """Says what it was fitted by, and to which labels."""
        return f"{self.method}, labels {self.labels}"

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
            f"{self.method} of {len(lines)} matrices, {self.sequences} sequences, "
            f"{self.positions} positions, labels {self.labels}"
        )
        return "\n".join([said, head, *lines])


@jax.jit(static_argnums=0)
def _invertible(inverse: Inverse, lam_OxI: Array) -> Array:
    """Returns whether inverted eigenvalues are finite, none below 0 and not all 0."""
    inverted = inverse(lam_OxI)
    finite = jnp.isfinite(inverted) & (inverted >= 0)
    return finite.all() & inverted.any()


@jax.jit(static_argnums=(0, 1))
def _on_each(
    act: Callable[..., Array],
    options: tuple[Any, ...],
    block: Kronecker,
    v: Array,
) -> Array:
    """Returns what a layer's operator makes of each matrix, some of them at a time.

    What is in between is several times as large as they are: all of them at once may
    be more than there is room for.
    """
    v_QxOxI = v.reshape(-1, *block.lam_OxI.shape)
    each = TOGETHER // max(1, v_QxOxI[0].size)
    # A batch of one is not the same to the compiler: it keeps a copy of all results.
    together = each if each > 1 else None
    done = jax.lax.map(lambda v: act(block, v, *options), v_QxOxI, batch_size=together)
    return done.reshape(v.shape)
