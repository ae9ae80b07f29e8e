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

from influence.attribution.forms import Compress, Compressed, Dense, Form, Reform
from influence.attribution.gradients import coordinates, gradients, readable
from influence.attribution.measurements import Measurement
from influence.attribution.scores import labelled
from influence.curvature.operator import Curvature
from influence.curvature.solvers import Eigenbasis, Solver, Taken
from influence.linalg.kronecker import Kronecker
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
    if isinstance(solver, Eigenbasis) and readable(measurements, curvature.layers):
        found, values = coordinates(curvature, params, measurements)
        taken = solver.taken_in_basis(curvature, found)
    else:
        found, values = gradients(curvature.layers, params, measurements)
        taken = solver.taken(curvature, params, found)
    facts = {"value": values}
    return posed(curvature, taken, facts, measurements, solver.about(), compress)


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
    solution, own = taken
    forms, kept = _compressed(curvature, solution.solved, compress)
    said = {
        "layers": " ".join(x.name for x in curvature.layers),
        **about,
        "curvature": curvature.about,
        "curvature_sequences": curvature.sequences,
        "query_rank": "full" if compress is None else str(compress),
    }
    facts = {**facts, "self": tuple(own.tolist()), **solution.facts, **kept}
    return Query(
        curvature.layers,
        tuple(names),
        forms,
        tuple(facts.items()),
        tuple(said.items()),
    )


def _check_rank(curvature: Curvature, compress: Compress | None) -> None:
    sides = [min(x.outputs, x.columns) for x in curvature.layers]
    if compress is not None and compress.rank > max(sides):
        raise ValueError(
            f"The rank {compress.rank} is above that of every layer: the largest has "
            f"{max(sides)}, and nothing would be compressed. Give a lower one, or none."
        )


def _compressed(
    curvature: Curvature, solved: dict[str, Array], compress: Compress | None
) -> tuple[dict[str, Form], dict[str, tuple[float, ...]]]:
    """Returns queries by layer, axis `Q` behind the stack, and the share kept.

    Each layer's are taken out of their dictionary: two of each would be too many.
    """
    forms, energy, kept = {}, [], []
    for x in curvature.layers:
        h_QxOxI = jnp.moveaxis(solved.pop(x.name), 0, len(x.stack))
        if compress is None:
            forms[x.name] = Dense(h_QxOxI)
            continue
        block = curvature.blocks[x.name]
        found = _compress(compress, len(x.stack), block, h_QxOxI)
        # Work that is only under way would hold on to what it compresses.
        forms[x.name] = jax.block_until_ready(found.form)
        stack = tuple(range(len(x.stack)))
        energy.append(found.energy_Q.sum(stack))
        kept.append(found.kept_Q.sum(stack))
    if compress is None:
        return forms, {}
    share = np.asarray(sum(kept) / sum(energy), float)
    return forms, {"energy_kept": tuple(share.tolist())}


@jax.jit(static_argnums=(0, 1))
def _compress(
    compress: Compress, stack: int, block: Kronecker, h_QxOxI: Array
) -> Compressed:
    """Returns a layer's queries, compressed; the first axes are a stack."""
    act = compress
    for _ in range(stack):
        act = jax.vmap(act)
    return act(block, h_QxOxI)
