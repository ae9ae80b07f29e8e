"""Sites: values inside a model that can be read, replaced or frozen.

A model names a value with `jax.ad_checkpoint.checkpoint_name`; the `i`-th time it does
so as it runs, the value's *address* is `name.i`: `resid.4` is what enters the fifth
block, whether blocks are a Python loop or the body of a scan. The program is walked,
not edited: a scan is carried out in pieces, and the step that holds an address by
itself, so that, compiled, what comes after the last value asked for is not computed.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun
from jax.extend.core import primitives as p

from influence.model import jaxprs

Visit = Callable[[Array], tuple[Array, Any]]
"""What happens at a site: from its value to what takes its place, and a note."""


class Address(NamedTuple):
    """A site: the `place`-th time a model names a value so, from 0."""

    name: str
    place: int = 0

    def __str__(self) -> str:
        """Returns the address as it is written."""
        return f"{self.name}.{self.place}"

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Returns the address that is written so; a name alone is its first place."""
        name, dot, place = text.rpartition(".")
        return cls(name, int(place)) if dot and place.isdecimal() else cls(text)


def visited(
    fn: Callable[..., Any], visits: Mapping[Address, Visit]
) -> Callable[..., tuple[Any, dict[Address, Any]]]:
    """Returns `fn` with something done at sites: `(*args) -> (outputs, notes)`.

    Args:
      fn: any function of arrays.
      visits: what is done, by site.

    Raises:
      ValueError: when called, if there is no such site.

    Example:
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> from influence.model.sites import Address, visited
      >>> def double(x):
      ...     return 2 * checkpoint_name(x + 1, "sum")
      ...
      >>> at = Address("sum")
      >>> out, notes = visited(double, {at: lambda x: (0 * x, x)})(jnp.array(1.0))
      >>> float(out), float(notes[at])
      (0.0, 2.0)
    """

    def run(*args: Any) -> tuple[Any, dict[Address, Any]]:
        closed, tree = jaxprs.flatten(fn, *args)
        _check(_count(closed.jaxpr), _hidden(closed.jaxpr), visits)
        out, notes = _walk(closed, jax.tree.leaves(args), dict(visits))
        return jax.tree.unflatten(tree, out), notes

    return run


def read(
    fn: Callable[..., Any], addresses: Sequence[Address]
) -> Callable[..., dict[Address, Array]]:
    """Returns a function from the arguments of `fn` to the values at some sites.

    Example:
      >>> from flax import nnx
      >>> from influence.model.sites import Address, read
      >>> from influence.model.transformer import Apply, Config, Decoder
      >>> small = Config(10, 8, width=16, hidden=24, heads=4, blocks=2)
      >>> weights = nnx.state(Decoder(small, rngs=nnx.Rngs(0)))
      >>> at = Address("resid", 1)
      >>> read(Apply(small), [at])(weights, jnp.array([[1, 2, 3]]))[at].shape
      (1, 3, 16)
    """
    run = visited(fn, {x: _noted for x in addresses})
    return lambda *args: run(*args)[1]


def replaced(
    fn: Callable[..., Any], edits: Mapping[Address, Callable[[Array], Array]]
) -> Callable[..., Any]:
    """Returns `fn` with the values at some sites replaced by functions of them."""
    run = visited(fn, {k: _replacing(f) for k, f in edits.items()})
    return lambda *args: run(*args)[0]


def frozen(fn: Callable[..., Any], addresses: Sequence[Address]) -> Callable[..., Any]:
    """Returns `fn` with no gradient flowing through some sites."""
    return replaced(fn, dict.fromkeys(addresses, jax.lax.stop_gradient))


def addresses(fn: Callable[..., Any], *args: Any) -> dict[str, int]:
    """Returns how often a function names a value so, by name."""
    return dict(_count(jaxprs.flatten(fn, *args).closed.jaxpr))


def _noted(x: Array) -> tuple[Array, Array]:
    return x, x


def _replacing(f: Callable[[Array], Array]) -> Visit:
    def visit(x: Array) -> tuple[Array, None]:
        y = f(x)
        if y.shape != x.shape:
            raise ValueError(
                f"What replaces a site's value has shape {y.shape}, the value "
                f"{x.shape}. Return an array of the same shape."
            )
        return y.astype(x.dtype), None

    return visit


def _count(jaxpr: Jaxpr) -> Counter[str]:
    """Returns how often each name is given as a program runs."""
    found: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        found += _count_of(eqn)
    return found


def _count_of(eqn: JaxprEqn) -> Counter[str]:
    if eqn.primitive is p.name_p:
        return Counter([eqn.params["name"]])
    if eqn.primitive is p.scan_p:
        inner = _count(jaxprs.body(eqn).jaxpr)
        return Counter({k: n * eqn.params["length"] for k, n in inner.items()})
    if eqn.primitive is p.remat_p:
        return _count(jaxprs.body(eqn).jaxpr)
    return Counter()


def _hidden(jaxpr: Jaxpr) -> set[str]:
    """Returns names that are given where the walk does not go."""
    named = {
        x.params["name"] for x in jaxprs.equations(jaxpr) if x.primitive is p.name_p
    }
    return named - _count(jaxpr).keys()


def _check(
    known: Counter[str], hidden: set[str], wanted: Mapping[Address, Visit]
) -> None:
    for at in wanted:
        if at.place < known[at.name]:
            continue
        if at.name in hidden:
            raise ValueError(
                f"The site {at.name!r} is inside a `cond`, `while` or custom "
                "derivative, where it can't be reached. Name it outside."
            )
        listed = ", ".join(
            f"{k}.0 … {k}.{n - 1}" if n > 1 else k for k, n in sorted(known.items())
        )
        raise ValueError(
            f"The model has no site {str(at)!r}. It has: {listed or 'none at all'}. "
            "Name values with `jax.ad_checkpoint.checkpoint_name`."
        )


def _walk(
    closed: ClosedJaxpr, args: Sequence[Any], visits: Mapping[Address, Visit]
) -> tuple[list[Any], dict[Address, Any]]:
    """Carries out a program, its sites counted from 0."""
    env, seen, notes = jaxprs.Environment(), Counter[str](), {}
    env.write(closed.jaxpr.constvars, closed.consts)
    env.write(closed.jaxpr.invars, args)
    for eqn in closed.jaxpr.eqns:
        values, count = env.read(eqn.invars), _count_of(eqn)
        own = _from(visits, seen, count)
        if not own:
            out = jaxprs.bind(eqn, values)
        else:
            out, found = _visit(eqn, values, own)
            notes |= {Address(k, i + seen[k]): x for (k, i), x in found.items()}
        env.write(eqn.outvars, out)
        seen += count
    return env.read(closed.jaxpr.outvars), notes


def _from(
    visits: Mapping[Address, Visit], seen: Counter[str], count: Counter[str]
) -> dict[Address, Visit]:
    """Returns the visits to the next `count` sites, counted from the first of these."""
    return {
        Address(k, i - seen[k]): visit
        for (k, i), visit in visits.items()
        if 0 <= i - seen[k] < count[k]
    }


def _visit(
    eqn: JaxprEqn, values: Sequence[Any], visits: Mapping[Address, Visit]
) -> tuple[Sequence[Any], dict[Address, Any]]:
    if eqn.primitive is p.name_p:
        ((at, visit),) = visits.items()
        value, note = visit(jaxprs.bind(eqn, values)[0])
        return [value], {at: note}
    if eqn.primitive is p.remat_p:
        options = {k: eqn.params[k] for k in ("policy", "prevent_cse")}
        run = jax.checkpoint(lambda xs: _walk(jaxprs.body(eqn), xs, visits), **options)
        return run(list(values))
    return _visit_scan(eqn, values, visits)


def _visit_scan(
    eqn: JaxprEqn, values: Sequence[Any], visits: Mapping[Address, Visit]
) -> tuple[Sequence[Any], dict[Address, Any]]:
    """Carries out a scan in pieces, the steps that are visited by themselves."""
    inner, length = jaxprs.body(eqn), eqn.params["length"]
    each, backwards = _count(inner.jaxpr), eqn.params["reverse"]
    steps = sorted({i // each[k] for k, i in visits})
    n, m = eqn.params["num_consts"], eqn.params["num_consts"] + eqn.params["num_carry"]
    consts, carry, xs = values[:n], list(values[n:m]), list(values[m:])
    if backwards:
        xs = [jnp.flip(x, 0) for x in xs]
    pieces: list[list[Any]] = []
    notes: dict[Address, Any] = {}

    def plain(start: int, stop: int, carry: list[Any]) -> list[Any]:
        if start == stop:
            return carry

        def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            out = jaxpr_as_fun(inner)(*consts, *carry, *x)
            return list(out[: m - n]), list(out[m - n :])

        carry, ys = jax.lax.scan(step, carry, [x[start:stop] for x in xs])
        pieces.append(ys)
        return carry

    done = 0
    for step in steps:
        carry = plain(done, step, carry)
        before = Counter({k: step * count for k, count in each.items()})
        own = _from(visits, before, each)
        out, found = _walk(inner, [*consts, *carry, *(x[step] for x in xs)], own)
        notes |= {Address(k, i + before[k]): x for (k, i), x in found.items()}
        carry = list(out[: m - n])
        pieces.append([y[None] for y in out[m - n :]])
        done = step + 1
    carry = plain(done, length, carry)
    ys = [jnp.concatenate(each) for each in zip(*pieces, strict=True)]
    return [*carry, *([jnp.flip(y, 0) for y in ys] if backwards else ys)], notes
