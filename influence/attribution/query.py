"""What one asks: the gradient of a measurement, after the inverse curvature.

    h = (G + damping)⁻¹ ∇f(θ)

A measurement `f` is any function from parameters to one number: a completion's
log-probability, a contrast of two, the activation of a feature. Its gradient is plain
`jax.grad`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.attribution.forms import Compress, Dense, Form, Reform, formed, total
from influence.attribution.gradients import gradients
from influence.attribution.measurements import Measurement, unit_of
from influence.attribution.scores import labelled
from influence.attribution.streamed import readable, streamed
from influence.curvature.operator import Curvature
from influence.curvature.solvers import Eigenbasis, Solver, Taken
from influence.model.check import check_params
from influence.types import Layer, Params

if TYPE_CHECKING:
    import xarray as xr


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["forms"],
    meta_fields=["layers", "names", "facts", "about"],
)
@dataclass(frozen=True)
class Query:
    """Some measurements' gradients after the inverse curvature.

    Attributes:
      layers: the layers covered.
      names: of the measurements, in the order of axis `Q`.
      forms: by layer.
      facts: what there is to say of each query, a number each: its `value` now, how
        much of its energy a compression kept, the residual of its solution, its product
        with itself under the inverse curvature, `self`.
      about: what every score made with it has to say: damping, curvature, solver.

    Example:
      >>> query.names, dict(query.about)["damping"]
      (('3 after 1, 2',), '0.1 × mean eigenvalue of each matrix')
      >>> query.forms["block.mix"].h_QxOxI.shape
      (1, 8, 8)
    """

    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    forms: dict[str, Form]
    facts: tuple[tuple[str, tuple[float, ...]], ...]
    about: tuple[tuple[str, str | int], ...]

    def in_form(self, form: Reform) -> "Query":
        """Returns the same queries, `dense` or `factored` in every layer."""
        return replace(self, forms={k: form(v) for k, v in self.forms.items()})

    def scores(
        self,
        values: np.ndarray,
        train: Sequence[str],
        n_train: int | None,
        **rest: Sequence[Any],
    ) -> "xr.DataArray":
        """Returns scores `(query, train, …)` with what there is to say of them.

        Args:
          values: `[Q, N, …]`, not yet divided by the number of training sequences; rows
            that fill up the last batch are left out.
          train: the names of the sequences.
          n_train: how many the model was trained on, if not those.
          rest: of every further axis, its labels.
        """
        dims = {"query": list(self.names), "train": list(train), **rest}
        n_train = len(train) if n_train is None else n_train
        return labelled(values[:, : len(train)], dims, n_train, self.about, self.facts)


def query(
    curvature: Curvature,
    params: Params,
    measurements: Mapping[str, Measurement],
    *,
    solver: Solver = Eigenbasis(),
    compress: Compress | None = None,
) -> Query:
    """Solves for some measurements.

    Args:
      curvature: as fitted to the model.
      params: the model's parameters.
      measurements: by name.
      solver: what the curvature is inverted by, and its damping.
      compress: how each layer's queries are made small; None keeps matrices.

    Raises:
      ValueError: if there are no measurements, one is not a finite scalar or does not
        depend on the curvature's layers, no layer has the rank asked for, or the solver
        diverges.

    Example:
      >>> def logit(params):
      ...     return apply(params, jnp.array([[1, 2]]))[0, -1, 3]
      ...
      >>> any_function = {"the logit of 3": logit}
      >>> influence.query(curvature, params, any_function).names
      ('the logit of 3',)
    """
    check_params(params)
    _check_rank(curvature, compress)
    about = {**solver.about(), "unit": unit_of(measurements.values())}
    layers = curvature.layers
    if isinstance(solver, Eigenbasis) and readable(measurements, layers, compress):
        kept = streamed(curvature, params, measurements, solver, compress)
        facts = {"value": _numbers(kept.value), "self": _numbers(kept.own)}
        if compress is not None:
            facts |= _share(kept.energy, kept.kept)
        return _told(curvature, kept.forms, facts, measurements, about, compress)
    found, values = gradients(layers, params, measurements)
    taken = solver.taken(curvature, params, found)
    return posed(curvature, taken, {"value": values}, measurements, about, compress)


def solved(
    curvature: Curvature,
    params: Params,
    gradients: dict[str, Array],
    facts: Mapping[str, tuple[float, ...]],
    names: Iterable[str],
    solver: Solver,
    compress: Compress | None,
) -> Query:
    """Returns gradients `[Q, *stack, O, I]` as queries, solved and compressed.

    Each layer's are taken out of their dictionary once they are solved.
    """
    taken = solver.taken(curvature, params, gradients)
    return posed(curvature, taken, facts, names, solver.about(), compress)


def posed(
    curvature: Curvature,
    taken: Taken,
    facts: Mapping[str, tuple[float, ...]],
    names: Iterable[str],
    about: Mapping[str, str],
    compress: Compress | None,
) -> Query:
    """Returns gradients that are solved already as queries, compressed."""
    forms: dict[str, Form] = {}
    energy: list[Array] = []
    kept: list[Array] = []
    for x in curvature.layers:
        # Out of their dictionary: two of each would be too many.
        own = {x.name: taken.solution.solved.pop(x.name)}
        if compress is None:
            own = curvature.unrotated(own) if taken.turned else own
            forms[x.name] = Dense(jnp.moveaxis(own[x.name], 0, len(x.stack)))
        else:
            own = own if taken.turned else curvature.rotated(own)
            block = curvature.blocks[x.name]
            made = formed(compress, len(x.stack), block, own[x.name])
            forms[x.name] = made.form
            energy.append(made.energy_Q)
            kept.append(made.kept_Q)
        # Work that is only under way would hold on to what it is made of.
        jax.block_until_ready(forms[x.name])
    facts = {**facts, "self": _numbers(taken.own_Q), **taken.solution.facts}
    if compress is not None:
        facts |= _share(total(energy), total(kept))
    return _told(curvature, forms, facts, names, about, compress)


def _told(
    curvature: Curvature,
    forms: dict[str, Form],
    facts: Mapping[str, tuple[float, ...]],
    names: Iterable[str],
    about: Mapping[str, str],
    compress: Compress | None,
) -> Query:
    """Returns queries with all there is to say of them."""
    said = {
        "layers": " ".join(x.name for x in curvature.layers),
        **about,
        "curvature": curvature.about,
        "curvature_sequences": curvature.sequences,
        "query_rank": "full" if compress is None else str(compress),
    }
    return Query(
        curvature.layers,
        tuple(names),
        forms,
        tuple(facts.items()),
        tuple(said.items()),
    )


def _share(energy_Q: Array, kept_Q: Array) -> dict[str, tuple[float, ...]]:
    """Returns how much of its energy a compression kept of each query."""
    return {"energy_kept": _numbers(kept_Q / energy_Q)}


def _numbers(x_Q: Array) -> tuple[float, ...]:
    return tuple(x_Q.tolist())


def _check_rank(curvature: Curvature, compress: Compress | None) -> None:
    sides = [min(x.outputs, x.columns) for x in curvature.layers]
    if compress is not None and compress.rank > max(sides):
        raise ValueError(
            f"The rank {compress.rank} is above that of every layer: the largest has "
            f"{max(sides)}, and nothing would be compressed. Give a lower one, or none."
        )
