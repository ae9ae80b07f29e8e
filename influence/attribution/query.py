"""What one asks: the gradient of a measurement, after the inverse curvature.

    h = (G + damping)⁻¹ ∇f(θ)

A measurement `f` is any function from parameters to one number: a completion's
log-probability, a contrast of two, the activation of a feature. Its gradient is plain
`jax.grad`. A query is kept dense, a matrix per layer, or factored by a truncated SVD,
which is small and lets a training token be scored without its gradient (Grosse et al.
2023, section 3.2.2).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.curvature.ekfac import Curvature
from influence.linalg.kronecker import Inverse, Relative
from influence.model.check import check_params
from influence.model.examples import prompted
from influence.model.product import matrix
from influence.model.task import LanguageModel, losses
from influence.types import Batch, Inputs, Layer, Params, named_leaves, with_leaves

Measurement = Callable[[Params], Array]
"""`params -> scalar`. One that is a pytree shares its compilation with its like."""


class Dense(NamedTuple):
    """Queries as matrices, `[*stack, Q, O, I]`."""

    h_QxOxI: Array


class Factored(NamedTuple):
    """Queries as `left rightᵀ`: `[*stack, Q, O, R]` and `[*stack, Q, I, R]`."""

    left_QxOxR: Array
    right_QxIxR: Array


Form = Callable[[Dense | Factored], Dense | Factored]
"""`dense` or `factored`."""


def dense(form: Dense | Factored) -> Dense:
    """Returns queries as matrices."""
    if isinstance(form, Dense):
        return form
    return Dense(form.left_QxOxR @ jnp.matrix_transpose(form.right_QxIxR))


def factored(form: Dense | Factored, rank: int | None = None) -> Factored:
    """Returns queries as factors of some rank, the best in the Frobenius norm.

    At full rank, the default for matrices, nothing is lost.
    """
    if isinstance(form, Factored) and rank is None:
        return form
    u, s, vt = jnp.linalg.svd(dense(form).h_QxOxI, full_matrices=False)
    u, s, vt = u[..., :rank], s[..., None, :rank], vt[..., :rank, :]
    return Factored(u * s, jnp.matrix_transpose(vt))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["forms"],
    meta_fields=["layers", "names", "values", "about"],
)
@dataclass(frozen=True)
class Query:
    """Some measurements' gradients after the inverse curvature.

    Attributes:
      layers: the layers covered.
      names: of the measurements, in the order of axis `Q`.
      values: what they measure now, at these parameters.
      forms: by layer.
      about: what every score made with this query has to say of it: damping, curvature.
    """

    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    values: tuple[float, ...]
    forms: dict[str, Dense | Factored]
    about: tuple[tuple[str, str | int], ...]

    def in_form(self, form: Form) -> "Query":
        """Returns the same queries, `dense` or `factored` in every layer."""
        return replace(self, forms={k: form(v) for k, v in self.forms.items()})


def query(
    curvature: Curvature,
    params: Params,
    measurements: Mapping[str, Measurement],
    *,
    inverse: Inverse = Relative(),
    rank: int | None = None,
) -> Query:
    """Solves for some measurements.

    Args:
      curvature: as fitted to the model.
      params: the model's parameters.
      measurements: by name.
      inverse: how the curvature is damped and inverted.
      rank: keep each layer's query as factors of this rank; None keeps matrices.

    Raises:
      ValueError: if there are no measurements, one is not a finite scalar or does not
        depend on the curvature's layers, or `rank` is not a rank.
    """
    check_params(params)
    if not measurements:
        raise ValueError("There are no measurements: name at least one.")
    if rank is not None and rank < 1:
        raise ValueError(f"A query's rank must be 1 or more, not {rank}.")
    values, found = [], []
    for name, measurement in measurements.items():
        value, gradients = _measured(name, measurement, curvature.layers, params)
        solved = curvature.solve(gradients, inverse)
        values.append(value)
        found.append({k: _kept(Dense(v), rank) for k, v in solved.items()})
    forms = {
        x.name: _stacked([each[x.name] for each in found], len(x.stack))
        for x in curvature.layers
    }
    about = {
        "damping": str(inverse),
        "curvature": f"EK-FAC, labels {curvature.labels}",
        "curvature_sequences": curvature.sequences,
        "query_rank": "full" if rank is None else rank,
    }
    return Query(
        curvature.layers,
        tuple(measurements),
        tuple(values),
        forms,
        tuple(about.items()),
    )


def _stacked(forms: Sequence[Dense | Factored], axis: int) -> Dense | Factored:
    """Returns single queries as one form, axis `Q` behind the layer's stack."""
    return jax.tree.map(lambda *each: jnp.stack(each, axis), *forms)


def _kept(form: Dense, rank: int | None) -> Dense | Factored:
    return form if rank is None else factored(form, rank)


def measure(measurement: Measurement, params: Params) -> float:
    """Returns a measurement's value; completions of one length compile once."""
    return float(_measure(_as_tree(measurement), params))


@jax.jit
def _measure(measurement: Measurement, params: Params) -> Array:
    return measurement(params)


def _as_tree(measurement: Measurement) -> Measurement:
    """Returns a measurement that a compiled function takes as an argument."""
    if jax.tree_util.all_leaves([measurement]):
        return jax.tree_util.Partial(measurement)
    return measurement


def _measured(
    name: str, measurement: Measurement, layers: tuple[Layer, ...], params: Params
) -> tuple[float, dict[str, Array]]:
    """Returns a measurement's value and its gradient, a matrix per layer."""
    if isinstance(measurement, Completion):
        measurement.check(name, params)
    measurement = _as_tree(measurement)
    shape = jax.eval_shape(measurement, params)
    if shape.shape != ():
        raise ValueError(
            f"The measurement {name!r} returns an array of shape {shape.shape}. Return "
            "one number; name several measurements to have several."
        )
    value, gradients = _differentiate(measurement, layers, params)
    total = sum(float(jnp.abs(x).sum()) for x in gradients.values())
    if not np.isfinite([float(value), total]).all():
        raise ValueError(
            f"The measurement {name!r} is {float(value)} and its gradient sums to "
            f"{total} in absolute value: not a finite number."
        )
    if total == 0:
        raise ValueError(
            f"The measurement {name!r} does not depend on any of the curvature's "
            "layers: its gradient is zero, and so would be every score."
        )
    return float(value), gradients


@jax.jit(static_argnums=1)
def _differentiate(
    measurement: Measurement, layers: tuple[Layer, ...], params: Params
) -> tuple[Array, dict[str, Array]]:
    leaves = named_leaves(params)
    names = {x.parameter for x in layers} | {x.bias for x in layers if x.bias}
    covered = {name: leaves[name] for name in names}
    value, gradient = jax.value_and_grad(
        lambda covered: measurement(with_leaves(params, covered))
    )(covered)
    return value, {x.name: matrix(x, gradient) for x in layers}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs"],
    meta_fields=["task"],
)
@dataclass(frozen=True)
class Completion:
    """The log-probability of a completion after its prompt, in nats."""

    task: LanguageModel
    inputs: Inputs

    def __call__(self, params: Params) -> Array:
        """Returns `log p(completion | prompt)`."""
        keys, real = jnp.zeros((1, 2), jnp.uint32), jnp.ones(1, bool)
        batch = Batch(self.inputs, keys, real)
        outputs = self.task.outputs(params, self.inputs)
        return -losses(self.task, outputs, self.task.labels(self.inputs), batch).sum()

    def check(self, name: str, params: Params) -> None:
        """Raises if the tokens are not the model's."""
        outputs = jax.eval_shape(self.task.outputs, params, self.inputs)
        self.task.check(self.inputs, outputs, [name])


def completions(
    task: LanguageModel, texts: Mapping[str, tuple[Sequence[int], Sequence[int]]]
) -> dict[str, Completion]:
    """Returns measurements: the log-probabilities of completions after their prompts.

    Only the tokens of the completion count. All are padded to one length and so share
    one compilation.

    Args:
      task: the language model.
      texts: by name, the token ids of a prompt and of its completion.

    Raises:
      ValueError: if there are none, or a prompt or completion is empty, naming it.
    """
    examples = prompted(texts)
    return {
        name: Completion(
            task, jax.tree.map(lambda x, i=i: x[i : i + 1], examples.inputs)
        )
        for i, name in enumerate(examples.ids)
    }
