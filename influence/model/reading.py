"""Reading a model's layers in the backward pass.

A traced program is run with every product of a chosen layer in a wrapper that has one
extra argument, a *slot*: zeros with the shape of a statistic, ignored on the way
forward. On the way back the wrapper returns, as the slot's cotangent, what a *reading*
makes of the layer's input `a` and of the gradient `g` of its output. So

    statistics = jax.grad(loss, wrt=slots)

costs a forward and an activation-backward pass. Weight gradients are formed only by a
reading that forms them, a `remat` keeps its promise, and a scan over layers yields
statistics stacked along its axis.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Jaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p

from influence.model import jaxprs
from influence.model.jaxprs import aval
from influence.model.product import Product
from influence.model.trace import Program
from influence.types import Inputs, Layer, Params


class Reading(NamedTuple):
    """What to compute of layers.

    Attributes:
      at: `(a_BxTxI, {layer: g_BxTxO}, given, common) -> statistics`, where products
        read one activation. `a` ends in a column of ones where the layers have a bias,
        so that `gᵀ a` is the gradient of `[W b]`. `given` are the arrays passed in for
        these layers, `common` those passed in for all.
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
) -> dict[str, Any]:
    """Returns a reading of every activation the layers read, from one backward pass.

    Args:
      program: the model, traced at the shapes of `params` and `inputs`.
      layers: the layers to read, as `select` returns them.
      reading: what to compute.
      loss: of the model's outputs, a scalar whose gradient is read.
      params: the model's parameters.
      inputs: a batch.
      given: by the layers' `reads`, arrays for the reading, behind their stacks.
      common: arrays handed to every reading.

    Returns:
      `{layer.reads: statistics}`, the statistics behind the layers' stacks.

    Raises:
      ValueError: if the model does not have one of the layers.
    """
    taps = _taps(program, layers, reading)
    given = {tap.name: given.get(tap.name) for tap in taps}
    by_result = {product.out: tap for tap in taps for product in tap.products}
    values = [*program.closed.consts, *jax.tree.leaves((params, inputs))]

    def measured(slots):
        extra = {name: (slots[name], given[name]) for name in slots}
        run = _Evaluation(program.early, by_result, common)
        out = run(program.closed.jaxpr, values, extra)
        return loss(jax.tree.unflatten(program.tree, out))

    return jax.grad(measured)({x.name: x.slot(given[x.name], common) for x in taps})


def _taps(program: Program, layers: Sequence[Layer], reading: Reading) -> list["_Tap"]:
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
    return [
        _Tap(name, tuple(x), tuple(program.products[y.name] for y in x), reading)
        for name, x in groups.items()
    ]


class _Tap(NamedTuple):
    """The products of chosen layers that read one activation, with a reading.

    All are carried out where the first of them stands: their weights are there from the
    start, so the others can only be early.
    """

    name: str
    layers: tuple[Layer, ...]
    products: tuple[Product, ...]
    reading: Reading

    def slot(self, given: Any, common: Any) -> Any:
        """Returns zeros with the shape of the statistics, behind the layers' scans."""
        scanned = self.products[0].weight.stack
        a = aval(self.products[0].activation)
        gs = [aval(product.out) for product in self.products]
        slices = jax.tree.map(lambda x: _shape(x.shape[len(scanned) :], x.dtype), given)
        one = jax.eval_shape(self.statistics, a, gs, slices, common)
        return jax.tree.map(lambda x: jnp.zeros((*scanned, *x.shape), x.dtype), one)

    def __call__(
        self, a: Array, weights: Sequence[Array], extra: Any, common: Any
    ) -> Sequence[Array]:
        """Returns the products; the slot's cotangent will be the statistics."""

        def products(a, weights):
            pairs = zip(self.products, weights, strict=True)
            return [product.multiply(a, w) for product, w in pairs]

        @jax.custom_vjp
        def multiplied(a, weights, slot, given, common):
            del slot, given, common
            return products(a, weights)

        def forward(a, weights, slot, given, common):
            del slot
            return products(a, weights), (a, weights, given, common)

        def backward(saved, gs):
            a, weights, given, common = saved
            (pulled,) = jax.linear_transpose(lambda a: products(a, weights), a)(gs)
            return pulled, None, self.statistics(a, gs, given, common), None, None

        multiplied.defvjp(forward, backward)
        return multiplied(a, weights, *extra, common)

    def statistics(self, a: Array, gs: Sequence[Array], given: Any, common: Any) -> Any:
        """Returns the reading of one activation and the cotangents it meets."""
        first = self.products[0]
        a = first.input(a)
        if self.layers[0].bias is not None:
            a = jnp.concatenate([a, jnp.ones_like(a, shape=(*a.shape[:-1], 1))], -1)
        named = zip(self.layers, self.products, gs, strict=True)
        outputs = {layer.name: product.gradient(g) for layer, product, g in named}
        reading = self.reading.at
        for _ in first.stack:
            reading = jax.vmap(reading, in_axes=(0, 0, 0, None))
        return reading(a, outputs, given, common)


class _Evaluation(NamedTuple):
    """Runs a flat program, tapped products in their wrappers.

    Attributes:
      early: the variables that hold rearranged parameters.
      taps: the tap of each tapped product's result.
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
                (a,) = env.read([tap.products[0].activation])
                weights = env.read([x.operand for x in tap.products])
                out = tap(a, weights, extra[tap.name], self.common)
                env.write([x.out for x in tap.products], out)
        return env.read(jaxpr.outvars)

    def _bind(
        self, eqn: JaxprEqn, values: Sequence[Any], extra: Mapping[str, Any]
    ) -> Sequence[Any]:
        if eqn.primitive not in (p.scan_p, p.remat_p):
            return jaxprs.bind(eqn, values)
        inner = jaxprs.body(eqn)
        results = [x for y in jaxprs.equations(inner.jaxpr) for x in y.outvars]
        inside = {self.taps[x].name for x in results if x in self.taps}
        bind = jaxprs.bind_scan if eqn.primitive is p.scan_p else jaxprs.bind_remat
        return bind(
            eqn,
            values,
            lambda values, extra: self(inner.jaxpr, [*inner.consts, *values], extra),
            {name: extra[name] for name in inside},
        )


def _shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
