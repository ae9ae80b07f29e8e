"""Flat programs: a JAX function as a list of equations that is easy to follow.

`flatten` traces a function and rewrites the result twice over: calls to jitted
functions are inlined, and a cast or rearrangement done twice to one value is done once.
After that a value has one name within a scope (the program, the body of a scan, the
body of a remat), so "these two products read the same activation" is "these two
equations have the same operand".
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.extend.core import (
    ClosedJaxpr,
    DebugInfo,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    jaxpr_as_fun,
    jaxprs_in_params,
)
from jax.extend.core import primitives as p

CASTS = (p.convert_element_type_p, p.name_p)
"""Equations whose result is their operand, value for value."""

REARRANGEMENTS = (p.transpose_p, p.reshape_p, p.squeeze_p, p.broadcast_in_dim_p)
"""Equations whose result holds the values of their operand in other places."""

Body = Callable[[Sequence[Any], Any], Sequence[Any]]
"""What runs in place of the body of a scan or remat: `(values, extra) -> outputs`."""


class Environment(dict[Var, Any]):
    """The value of every variable of one scope."""

    def read(self, atoms: Sequence[Var | Literal]) -> list[Any]:
        """Returns the values of variables and literals."""
        return [x.val if isinstance(x, Literal) else self[x] for x in atoms]

    def write(self, variables: Sequence[Var], values: Sequence[Any]) -> None:
        """Gives each variable its value."""
        self.update(zip(variables, values, strict=True))


class Flat(NamedTuple):
    """A function as one list of equations.

    Attributes:
      closed: the equations, from the leaves of the arguments to those of the result.
      tree: the structure of the result.
    """

    closed: ClosedJaxpr
    tree: Any


def flatten(fn: Callable[..., Any], *args: Any) -> Flat:
    """Returns the flat program of `fn` at the shapes of `args`."""
    closed, shapes = jax.make_jaxpr(partial(_flat, fn), return_shape=True)(*args)
    return Flat(closed, jax.tree.structure(shapes))


def flatten_once(fn: Callable[..., Any], *args: Any) -> Flat:
    """Returns what `flatten` does, traced once for a function and shapes.

    Args:
      fn: must be hashable. It is kept, with the task it is a method of; the same method
        of an equal task is traced anew.
      *args: what it is called with.
    """
    closed, shapes = _flat_once(fn, *args)
    return Flat(closed, jax.tree.structure(shapes))


def _flat(fn: Callable[..., Any], *args: Any) -> Any:
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    out = _replay(closed, jax.tree.leaves(args), {})
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


_flat_once = jax.make_jaxpr(_flat, static_argnums=0, return_shape=True)


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Walks all equations of a program, those inside scans and calls included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def aval(x: Any) -> Any:
    """Returns the shape and type of a variable's or literal's value."""
    return x.aval


def body(eqn: JaxprEqn) -> ClosedJaxpr:
    """Returns the program inside a call, scan or remat."""
    inner = eqn.params["jaxpr"]
    return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())


def bind(eqn: JaxprEqn, values: Sequence[Any]) -> Sequence[Any]:
    """Carries out one equation as it stands, custom derivatives kept."""
    named = {
        x: value
        for x, value in zip(eqn.invars, values, strict=True)
        if isinstance(x, Var)
    }
    debug = DebugInfo("bind", eqn.primitive.name, None, None)
    one = Jaxpr((), list(named), eqn.outvars, [eqn], eqn.effects, debug)
    return jaxpr_as_fun(ClosedJaxpr(one, ()))(*named.values())


def bind_scan(
    eqn: JaxprEqn, values: Sequence[Any], inside: Body, extra: Any = None
) -> Sequence[Any]:
    """Carries out a scan with another body; `extra` is walked beside its inputs."""
    n, m = eqn.params["num_consts"], eqn.params["num_consts"] + eqn.params["num_carry"]

    def step(carry, slices):
        x, extra = slices
        out = inside([*values[:n], *carry, *x], extra)
        return list(out[: m - n]), list(out[m - n :])

    options = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
    carry, ys = jax.lax.scan(
        step, list(values[n:m]), (list(values[m:]), extra), **options
    )
    return [*carry, *ys]


def bind_remat(
    eqn: JaxprEqn, values: Sequence[Any], inside: Body, extra: Any = None
) -> Sequence[Any]:
    """Carries out a rematerialised call with another body, `extra` handed to it."""
    options = {k: eqn.params[k] for k in ("policy", "prevent_cse")}
    call = jax.checkpoint(lambda xs, extra: list(inside(xs, extra)), **options)
    return call(list(values), extra)


def _replay(closed: ClosedJaxpr, args: Sequence[Any], seen: dict) -> list[Any]:
    """Runs a program, inlining calls.

    `seen` maps a cast or rearrangement of a value to `(the value, the result)`; holding
    on to the value keeps its identity from being reused.
    """
    env = Environment()
    env.write(closed.jaxpr.constvars, closed.consts)
    env.write(closed.jaxpr.invars, args)
    for eqn in closed.jaxpr.eqns:
        values = env.read(eqn.invars)
        if eqn.primitive is p.jit_p:
            out = _replay(body(eqn), values, seen)
        elif eqn.primitive is p.scan_p:
            out = bind_scan(eqn, values, _replayed(body(eqn)))
        elif eqn.primitive is p.remat_p:
            out = bind_remat(eqn, values, _replayed(body(eqn)))
        elif eqn.primitive in (*CASTS, *REARRANGEMENTS):
            key = (eqn.primitive, id(values[0]), tuple(eqn.params.items()))
            if key not in seen:
                seen[key] = (values, bind(eqn, values))
            _, out = seen[key]
        else:
            out = bind(eqn, values)
        env.write(eqn.outvars, out)
    return env.read(closed.jaxpr.outvars)


def _replayed(inner: ClosedJaxpr) -> Body:
    return lambda values, extra: _replay(inner, values, {})
