"""What a program computes, moves and holds, counted from its shapes alone.

A walk over the program as JAX has traced it, before any compiler: of every matrix
product its operations and its operands, of everything else its results, and of all
values when they are made and last read. Scans count as often as they step.
"""

from collections.abc import Callable, Iterable
from math import prod
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var, jaxprs_in_params

from influence.model.jaxprs import aval, body

FREE = ("broadcast_in_dim", "iota")
"""Equations whose results are never held: they are made anew where they are read."""

ALIASES = (
    "copy",
    "name",
    "optimization_barrier",
    "reshape",
    "squeeze",
    "stop_gradient",
)
"""Equations whose results are their operand under another shape or name."""

PRODUCTS = ("dot_general", "conv_general_dilated")


class Pass(NamedTuple):
    """What one execution of a program takes.

    Attributes:
      flops: operations of matrix products, a multiplication and an addition each.
      moved: bytes these products read and write.
      made: bytes of the results of everything else.
      held: the most bytes of values that are alive at once, arguments left out.
    """

    flops: float = 0.0
    moved: float = 0.0
    made: float = 0.0
    held: float = 0.0

    def times(self, n: float) -> "Pass":
        """Returns the same done `n` times, one after the other."""
        return Pass(self.flops * n, self.moved * n, self.made * n, self.held)

    def then(self, other: "Pass") -> "Pass":
        """Returns both, one after the other."""
        return Pass(
            self.flops + other.flops,
            self.moved + other.moved,
            self.made + other.made,
            max(self.held, other.held),
        )


def count(fn: Callable[..., Any], *args: Any) -> Pass:
    """Returns what a function takes at the shapes of its arguments; computes nothing.

    Example:
      >>> from influence.model.passes import count
      >>> a, b = jnp.ones((3, 4), jnp.float32), jnp.ones((4, 5), jnp.float32)
      >>> count(jnp.dot, a, b)
      Pass(flops=120.0, moved=188.0, made=0.0, held=60.0)
    """
    return counted(jax.make_jaxpr(fn)(*args).jaxpr)


def counted(jaxpr: Jaxpr) -> Pass:
    """Returns what a program takes."""
    needed = _needed(jaxpr)
    total = Pass()
    for eqn in needed:
        total = total.then(_one(eqn))
    return total._replace(held=_held(jaxpr, needed))


def _needed(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """Returns the equations whose results are read, in their order."""
    read = {x for x in jaxpr.outvars if isinstance(x, Var)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(x in read for x in eqn.outvars):
            kept.append(eqn)
            read |= {x for x in eqn.invars if isinstance(x, Var)}
    return kept[::-1]


def _one(eqn: JaxprEqn) -> Pass:
    """Returns what one equation takes, but for what it holds."""
    name = eqn.primitive.name
    if name == "scan":
        return counted(body(eqn).jaxpr).times(eqn.params["length"])
    inner = [counted(x) for x in jaxprs_in_params(eqn.params)]
    if name == "cond":
        return max(inner, key=lambda x: x.flops)
    if inner:
        total = Pass()
        for x in inner:
            total = total.then(x)
        return total
    made = sum(map(size, eqn.outvars))
    if name in PRODUCTS:
        flops = 2.0 * prod(aval(eqn.outvars[0]).shape) * _contracted(eqn)
        return Pass(flops=flops, moved=made + sum(map(size, eqn.invars)))
    return Pass(made=0.0 if name in (*FREE, *ALIASES) else made)


def _contracted(eqn: JaxprEqn) -> float:
    """Returns how many products each number of a result is the sum of."""
    if eqn.primitive.name == "dot_general":
        ((left, _), _) = eqn.params["dimension_numbers"]
        return prod(aval(eqn.invars[0]).shape[i] for i in left)
    kernel = aval(eqn.invars[1]).shape
    spec = eqn.params["dimension_numbers"].rhs_spec
    return prod(kernel) / kernel[spec[0]]


def _held(jaxpr: Jaxpr, eqns: Iterable[JaxprEqn]) -> float:
    """Returns the most bytes alive at once, the program's inputs left out."""
    eqns, root = list(eqns), {x: x for x in (*jaxpr.invars, *jaxpr.constvars)}
    for eqn in eqns:
        for x in eqn.outvars:
            root[x] = x
        if eqn.primitive.name in ALIASES and isinstance(eqn.invars[0], Var):
            root[eqn.outvars[0]] = root[eqn.invars[0]]
    last: dict[Any, int] = {}
    for i, eqn in enumerate(eqns):
        last |= {root[x]: i for x in eqn.invars if isinstance(x, Var)}
    last |= {root[x]: len(eqns) for x in jaxpr.outvars if isinstance(x, Var)}
    alive: dict[Any, float] = {}
    most = now = 0.0
    for i, eqn in enumerate(eqns):
        made = {x: size(x) for x in eqn.outvars if root[x] is x}
        if eqn.primitive.name in FREE:
            made = dict.fromkeys(made, 0.0)
        alive |= made
        now += sum(made.values())
        most = max(most, now + _inside(eqn))
        ended = [x for x in alive if last.get(x, i) <= i]
        now -= sum(alive.pop(x) for x in ended)
    return most


def _inside(eqn: JaxprEqn) -> float:
    """Returns what an equation holds as it runs, beyond its results."""
    inner = max((counted(x).held for x in jaxprs_in_params(eqn.params)), default=0.0)
    results = 0.0 if eqn.primitive.name == "scan" else sum(map(size, eqn.outvars))
    return max(0.0, inner - results)


def size(x: Var | Literal) -> float:
    """Returns the bytes of a variable's value."""
    kind = aval(x)
    if not hasattr(kind, "dtype"):
        return 0.0
    return float(prod(kind.shape) * kind.dtype.itemsize)
