"""Reading a model's layers in the backward pass.

A traced program is run with every use of a chosen layer in a wrapper that has one
extra argument, a *slot*: zeros with the shape of a statistic, ignored on the way
forward. On the way back the wrapper returns, as the slot's cotangent, what a *reading*
makes of the layer's input `a` and of the gradient `g` of its output. So

    statistics = jax.grad(loss, wrt=slots)

costs a forward and an activation-backward pass. Weight gradients are formed only by a
reading that forms them, a `remat` keeps its promise, and a scan over layers yields
statistics stacked along its axis. A layer whose weight is used several times has one
slot for all of its uses, and what they leave there adds up.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Jaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p

from influence.linalg.contract import contract, wide
from influence.model import jaxprs
from influence.model.jaxprs import aval
from influence.model.trace import Program
from influence.model.use import Contribution, Use
from influence.types import Inputs, Layer, Params, rows


class Reading(NamedTuple):
    """What to compute of layers.

    Attributes:
      at: `(a_BxTxI, {layer: g_BxTxO}, given, common) -> statistics`, where layers
        read one activation. `a` ends in a column of ones where the layers have a bias,
        so that `gᵀ a` is the gradient of `[W b]`. Uses other than products have an `a`
        and a `g` of their own (`use.py`). `given` are the arrays passed in for these
        layers, `common` those passed in for all.
      of: `({layer: d_BxOxI}, given, common) -> statistics`, the same from each
        example's gradient: for a layer whose weight is used several times, where
        gradients have to be summed over the uses first. None if the statistics of the
        uses add up.
    """

    at: Callable[[Array, Mapping[str, Array], Any, Any], Any]
    of: Callable[[Mapping[str, Array], Any, Any], Any] | None = None


def read(
    program: Program,
    layers: Sequence[Layer],
    reading: Reading,
    loss: Callable[[Any], Array],
    params: Params,
    inputs: Inputs,
    given: Mapping[str, Any],
    common: Any = None,
) -> tuple[Array, dict[str, Any]]:
    """Returns the loss, and a reading of every activation the layers read.

    Args:
      program: the model, traced at the shapes of `params` and `inputs`.
      layers: the layers to read, as `select` returns them.
      reading: what to compute.
      loss: of the model's outputs, a scalar whose gradient is read; or several,
        each of which takes a backward pass, and the mean of their readings is returned.
      params: the model's parameters.
      inputs: a batch.
      given: by the layers' `reads`, arrays for the reading, behind their stacks.
      common: arrays handed to every reading.

    Returns:
      The loss, or losses, and `{layer.reads: statistics}`, the statistics behind the
      layers' stacks.

    Raises:
      ValueError: if the model does not have one of the layers, or the statistics of a
        layer's uses differ in shape.
    """
    whole = {x.name: x for x in layers if reading.of and program.several(x.name)}
    taps = _taps(program, layers, reading, whole)
    here = {
        tap.name: None if tap.name in whole else given.get(tap.name) for tap in taps
    }
    slots = _slots(taps, here, common)
    values = [*program.closed.consts, *jax.tree.leaves((params, inputs))]

    def run(slots):
        extra = {name: (slots[name], here[name]) for name in slots}
        by_result = {use.out: tap for tap in taps for use in tap.uses}
        evaluation = _Evaluation(program.early, by_result, common)
        out = evaluation(program.closed.jaxpr, values, extra)
        return jax.tree.unflatten(program.tree, out)

    def one(cotangent):
        (found,) = pull(cotangent)
        for name, layer in whole.items():
            of = _stacked(reading.of, layer.stack, (0, 0, None))
            found[name] = of(found[name], given.get(name), common)
        return found

    outputs, pull = jax.vjp(run, slots)
    value, back = jax.vjp(loss, outputs)
    if value.ndim == 0:
        return value, one(*back(jnp.ones_like(value)))
    cotangents = jax.vmap(back)(jnp.eye(len(value), dtype=value.dtype))
    found = jax.lax.map(one, *cotangents)
    return value, jax.tree.map(lambda x: x.mean(0), found)


def by_layer(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what a reading made of each layer, out of the groups `read` returns."""
    return {name: x for group in found.values() for name, x in group.items()}


def by_matrix(
    layers: Sequence[Layer], found: Mapping[str, Mapping[str, Array]]
) -> Array:
    """Returns what a reading made of every single matrix, in the order of `rows`, last.

    Raises:
      ValueError: if that differs in shape from layer to layer.
    """
    flat = by_layer(found)
    parts = [flat[x.name][place] for x, place, _ in rows(layers)]
    if len({x.shape for x in parts}) > 1:
        raise ValueError(
            "The layers see different numbers of positions of a sequence, so their "
            "tokens have no common axis. Query layers that see the same ones."
        )
    return jnp.stack(parts, axis=-1)


def _taps(
    program: Program,
    layers: Sequence[Layer],
    reading: Reading,
    whole: Mapping[str, Layer],
) -> list["_Tap"]:
    """Returns the taps; of the layers in `whole` they read each example's gradient."""
    own = {x.name: x for x in program.layers}
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        if own.get(layer.name) != layer._replace(reads=layer.name):
            raise ValueError(
                f"The model has no layer {layer.name!r} of {layer.outputs} outputs and "
                f"{layer.columns} inputs, as the curvature or query has. It was made "
                "for another model."
            )
        groups.setdefault(layer.reads, []).append(layer)
    taps = []
    for name, group in groups.items():
        at = _gradient if name in whole else reading.at
        uses = zip(*(program.uses[x.name] for x in group), strict=True)
        taps += [_Tap(name, tuple(group), together, at) for together in uses]
    return taps


def _gradient(
    a_BxTxI: Array, gs: Mapping[str, Array], given: Any, common: Any
) -> dict[str, Array]:
    """Returns what one use contributes to each example's gradient, `[B, O, I]`."""
    del given, common
    return {name: contract("bto,bti->boi", g, a_BxTxI) for name, g in gs.items()}


def _slots(
    taps: Sequence["_Tap"], given: Mapping[str, Any], common: Any
) -> dict[str, Any]:
    """Returns zeros for the statistics of every tap, one slot for a layer's uses."""
    slots: dict[str, Any] = {}
    for tap in taps:
        slot = tap.slot(given[tap.name], common)
        other = slots.setdefault(tap.name, slot)
        shapes, others = (jax.tree.map(jnp.shape, x) for x in (slot, other))
        if shapes == others:
            slots[tap.name] = jax.tree.map(_wider, slot, other)
        else:
            raise ValueError(
                f"The uses of layer {tap.name!r} give statistics of different shapes, "
                f"{shapes} and {others}, which do not add up: they see different "
                "numbers of positions. Leave the layer out."
            )
    return slots


def _stacked(fn: Any, stack: Sequence[int], axes: tuple[int | None, ...]) -> Any:
    """Returns a function of one matrix as one of a stack of them."""
    for _ in stack:
        fn = jax.vmap(fn, in_axes=axes)
    return fn


class _Tap(NamedTuple):
    """Uses of chosen layers that are carried out together, with what reads them.

    They are products that read one activation, or one use of any kind. All are carried
    out where the first of them stands: their weights are there from the start, so the
    others can only be early.
    """

    name: str
    layers: tuple[Layer, ...]
    contributions: tuple[Contribution, ...]
    at: Callable[[Array, Mapping[str, Array], Any, Any], Any]

    @property
    def uses(self) -> list[Use]:
        """Returns the uses, in the order of the layers."""
        return [x.use for x in self.contributions]

    def walked(self, eqn: JaxprEqn) -> bool:
        """Returns whether a scan walks over the weights."""
        return (eqn, True) in self.uses[0].weight.scans

    def slot(self, given: Any, common: Any) -> Any:
        """Returns zeros with the shape of the statistics, behind the layers' scans."""
        scanned = self.uses[0].weight.stack
        a = aval(self.uses[0].activation)
        gs = [aval(use.out) for use in self.uses]
        slices = jax.tree.map(lambda x: _shape(x.shape[len(scanned) :], x.dtype), given)
        one = jax.eval_shape(self.statistics, a, gs, slices, common)
        return jax.tree.map(lambda x: jnp.zeros((*scanned, *x.shape), x.dtype), one)

    def __call__(
        self, a: Array, weights: Sequence[Array], extra: Any, common: Any
    ) -> Sequence[Array]:
        """Returns the results; the slot's cotangent will be the statistics."""
        # Another use of the layer may be of higher precision.
        kinds = jax.tree.map(lambda x: x.dtype, extra[0])

        def results(a, weights):
            pairs = zip(self.uses, weights, strict=True)
            return [use.carried_out(a, w) for use, w in pairs]

        @jax.custom_vjp
        def tapped(a, weights, slot, given, common):
            del slot, given, common
            return results(a, weights)

        def forward(a, weights, slot, given, common):
            del slot
            return results(a, weights), (a, weights, given, common)

        def backward(saved, gs):
            a, weights, given, common = saved
            pulled = self._pulled(a, weights, gs)
            found = self.statistics(a, gs, given, common)
            found = jax.tree.map(lambda x, kind: x.astype(kind), found, kinds)
            return pulled, None, found, None, None

        tapped.defvjp(forward, backward)
        return tapped(a, weights, *extra, common)

    def _pulled(
        self, a: Array, weights: Sequence[Array], gs: Sequence[Array]
    ) -> Array | None:
        """Returns the cotangent of the activation; None if it is ids."""
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            return None

        def linear(a):
            pairs = zip(self.uses, weights, strict=True)
            return [use.linear(a, w) for use, w in pairs]

        (pulled,) = jax.linear_transpose(linear, a)(gs)
        return pulled

    def statistics(self, a: Array, gs: Sequence[Array], given: Any, common: Any) -> Any:
        """Returns the reading of one activation and the cotangents it meets."""
        first = self.contributions[0]
        right = first.use.right(a)
        lefts = [
            _times(use.left(a, g), use.weight.factor)
            for use, g in zip(self.uses, gs, strict=True)
        ]
        if first.turned:
            right, lefts = lefts[0], [right]
        if self.layers[0].bias is not None:
            ones = jnp.ones_like(right, shape=(*right.shape[:-1], 1))
            right = jnp.concatenate([right, ones], -1)
        names = [layer.name for layer in self.layers]
        at = _stacked(self.at, first.use.stack, (0, 0, 0, None))
        return at(right, dict(zip(names, lefts, strict=True)), given, common)


def _wider(x: Array, y: Array) -> Array:
    """Returns whichever of two arrays of zeros has the higher precision."""
    return x if x.dtype == y.dtype else x.astype(wide(x.dtype, y.dtype))


def _times(x: Array, factor: float) -> Array:
    return x if factor == 1 else x * factor


class _Evaluation(NamedTuple):
    """Runs a flat program, tapped uses in their wrappers.

    Attributes:
      early: the variables that hold rearranged parameters.
      taps: the tap of each tapped use's result.
      common: arrays handed to every reading.
    """

    early: frozenset[Var]
    taps: Mapping[Var, _Tap]
    common: Any

    def __call__(
        self, jaxpr: Jaxpr, values: Sequence[Any], extra: Mapping[str, Any]
    ) -> list[Any]:
        """Returns the outputs; `extra` has each tap's slot and given arrays."""
        env = jaxprs.Environment()
        env.write([*jaxpr.constvars, *jaxpr.invars], values)
        for eqn in sorted(jaxpr.eqns, key=lambda x: x.outvars[0] not in self.early):
            tap = self.taps.get(eqn.outvars[0])
            if tap is None:
                env.write(eqn.outvars, self._bind(eqn, env.read(eqn.invars), extra))
            elif eqn.outvars[0] not in env:
                (a,) = env.read([tap.uses[0].activation])
                weights = env.read([use.operand for use in tap.uses])
                out = tap(a, weights, extra[tap.name], self.common)
                env.write([use.out for use in tap.uses], out)
        return env.read(jaxpr.outvars)

    def _bind(
        self, eqn: JaxprEqn, values: Sequence[Any], extra: Mapping[str, Any]
    ) -> Sequence[Any]:
        if eqn.primitive not in (p.scan_p, p.remat_p):
            return jaxprs.bind(eqn, values)
        inner = jaxprs.body(eqn)
        results = [x for y in jaxprs.equations(inner.jaxpr) for x in y.outvars]
        inside = [self.taps[x] for x in results if x in self.taps]
        own = {tap.name: extra[tap.name] for tap in inside}

        def run(values, extra):
            return self(inner.jaxpr, [*inner.consts, *values], own | extra)

        if eqn.primitive is p.remat_p:
            return jaxprs.bind_remat(eqn, values, run, own)
        walked = {tap.name for tap in inside if tap.walked(eqn)}
        return jaxprs.bind_scan(eqn, values, run, {k: own[k] for k in walked})


def _shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
