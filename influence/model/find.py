"""Which matrix products of a flat program are layers, and why the others are not.

A *layer* is a `dot_general` with exactly one operand that comes from a parameter
through casts, transposes and reshapes alone, and another that differs from example to
example. The walk follows every parameter through such equations, and through the scans
that slice it, and says of each use what it is: a product, a bias added to a product's
result, or words for what else.

To tell the examples apart it reads the same program traced twice, the second time with
twice the examples: the axis that doubled is theirs.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.extend.core import primitives as p

from influence.model import jaxprs
from influence.model.jaxprs import aval
from influence.model.product import Axes, Product, Weight, operand_axes, whole
from influence.types import Step


class Result(NamedTuple):
    """A value that is a product's result, cast, its axes moved or inserted."""

    product: Product
    axes: Axes


Value = Weight | Result | None
"""What the walk knows about a value."""


class Bias(NamedTuple):
    """A parameter added to a product's result, and its view as `[*stack, O]`."""

    name: str
    view: tuple[Step, ...]


Use = Product | Bias | str
"""What a parameter is used for: words where no reading covers it."""

HINTS = {
    "gather": "looked up row by row (`gather`), as an embedding is",
    "mul": "multiplied elementwise (`mul`), as a norm's scale is",
    "conv_general_dilated": "the kernel of a convolution",
    "slice": "cut into parts (`slice`) before its use",
    "dynamic_slice": "cut into parts (`dynamic_slice`) before its use",
    "custom_jvp_call": "used in a function with a derivative rule of its own",
    "custom_vjp_call": "used in a function with a derivative rule of its own",
}


@dataclass
class Findings:
    """What a walk has found.

    Attributes:
      uses: every use of every parameter.
      products: in the order the program carries them out.
      biases: of each product, the bias added to its result.
      early: the variables that hold rearranged parameters, computed before all else.
    """

    uses: dict[str, list[Use]] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    biases: dict[Product, Bias] = field(default_factory=dict)
    early: set[Var] = field(default_factory=set)

    def use(self, value: Value, how: Use) -> None:
        """Notes a use, if the value is a parameter."""
        if isinstance(value, Weight):
            self.uses.setdefault(value.name, []).append(how)


class Scope(NamedTuple):
    """A program, scan body or remat body, and what is known of its values.

    Attributes:
      jaxpr: the program.
      doubled: the same program, equation for equation, at twice the examples.
      examples: how many examples `jaxpr` was traced with.
      known: what the walk knows of each variable.
      count: how often each variable is used.
      findings: what the walk has found, here and elsewhere.
    """

    jaxpr: Jaxpr
    doubled: Jaxpr
    examples: int
    known: dict[Var, Value]
    count: Counter
    findings: Findings

    def value(self, atom: Var | Literal) -> Value:
        """Returns what is known of a value."""
        return None if isinstance(atom, Literal) else self.known.get(atom)


def find(
    jaxpr: Jaxpr,
    doubled: Jaxpr,
    values: Sequence[Value],
    examples: int,
    findings: Findings,
) -> Findings:
    """Walks a flat program and the scopes inside it.

    Args:
      jaxpr: the program.
      doubled: the same program, equation for equation, at twice the examples.
      values: what is known of the program's inputs.
      examples: how many examples `jaxpr` was traced with.
      findings: what was found so far; grows.
    """
    atoms = [*jaxpr.outvars, *(x for eqn in jaxpr.eqns for x in eqn.invars)]
    count = Counter(x for x in atoms if isinstance(x, Var))
    known = dict(zip(jaxpr.invars, values, strict=True))
    scope = Scope(jaxpr, doubled, examples, known, count, findings)
    for eqn, twin in zip(jaxpr.eqns, doubled.eqns, strict=True):
        if eqn.primitive in (*jaxprs.CASTS, *jaxprs.REARRANGEMENTS):
            known[eqn.outvars[0]] = _rearranged(scope, eqn)
        elif eqn.primitive is p.dot_general_p:
            known[eqn.outvars[0]] = _multiplied(scope, eqn, twin)
        elif eqn.primitive.name == "add":
            known[eqn.outvars[0]] = _added(scope, eqn)
        elif eqn.primitive is p.scan_p:
            _scanned(scope, eqn, twin)
        elif eqn.primitive is p.remat_p:
            inner, inner_twin = jaxprs.body(eqn).jaxpr, jaxprs.body(twin).jaxpr
            values = [scope.value(x) for x in eqn.invars]
            inside = [x if isinstance(x, Weight) else None for x in values]
            find(inner, inner_twin, inside, examples, findings)
        else:
            name = eqn.primitive.name
            for x in eqn.invars:
                findings.use(scope.value(x), HINTS.get(name, f"used in `{name}`"))
    for x in jaxpr.outvars:
        findings.use(scope.value(x), "handed on as it is")
    return findings


def _rearranged(scope: Scope, eqn: JaxprEqn) -> Value:
    value = scope.value(eqn.invars[0])
    axes = None if value is None else _moved(value.axes, eqn)
    if isinstance(value, Result):
        # A result used elsewhere as well has a second cotangent there, which the bias
        # further on would not share.
        alone = scope.count[eqn.invars[0]] == 1
        return value._replace(axes=axes) if axes is not None and alone else None
    if isinstance(value, Weight):
        if not jnp.issubdtype(aval(eqn.outvars[0]).dtype, jnp.inexact):
            scope.findings.use(value, "cast to whole numbers")
            return None
        scope.findings.early.add(eqn.outvars[0])
        return value._replace(view=_viewed(value.view, eqn), axes=axes)
    return None


def _viewed(view: tuple[Step, ...] | None, eqn: JaxprEqn) -> tuple[Step, ...] | None:
    """Returns a weight's view after one more equation; None if that is a broadcast."""
    before, after = aval(eqn.invars[0]), aval(eqn.outvars[0])
    if view is None or before.size != after.size:
        return None
    if eqn.primitive is p.transpose_p:
        return (*view, ("transpose", tuple(eqn.params["permutation"])))
    return view if before.shape == after.shape else (*view, ("reshape", after.shape))


def _moved(axes: Axes | None, eqn: JaxprEqn) -> Axes | None:
    """Returns where axes come from after one more equation; None if they were mixed."""
    before, after = aval(eqn.invars[0]).shape, aval(eqn.outvars[0]).shape
    if axes is None or eqn.primitive in jaxprs.CASTS:
        return axes
    if eqn.primitive is p.transpose_p:
        return tuple(axes[i] for i in eqn.params["permutation"])
    if eqn.primitive is p.broadcast_in_dim_p:
        source = dict(zip(eqn.params["broadcast_dimensions"], axes, strict=True))
        return tuple(source.get(i) for i in range(len(after)))
    kept = [axis for axis, size in zip(axes, before, strict=True) if size != 1]
    if [size for size in before if size != 1] != [size for size in after if size != 1]:
        return None
    return tuple(kept.pop(0) if size != 1 else None for size in after)


def _multiplied(scope: Scope, eqn: JaxprEqn, twin: JaxprEqn) -> Value:
    values = [scope.value(x) for x in eqn.invars]
    weights = [i for i, x in enumerate(values) if isinstance(x, Weight)]
    if len(weights) == 2:
        for value in values:
            scope.findings.use(value, "multiplied with another parameter")
    if len(weights) != 1:
        return None
    (side,) = weights
    value = values[side]
    assert isinstance(value, Weight)
    reason = _refusal(value, eqn, twin, side)
    if reason:
        scope.findings.use(value, reason)
        return None
    (example,) = _grown(eqn, twin, 1 - side)
    product = Product(eqn, side, value, example, scope.examples)
    scope.findings.use(value, product)
    scope.findings.products.append(product)
    return Result(product, tuple(range(aval(eqn.outvars[0]).ndim)))


def _refusal(value: Weight, eqn: JaxprEqn, twin: JaxprEqn, side: int) -> str | None:
    """Returns why a parameter's product is no layer."""
    if value.view is None or _grown(eqn, twin, side):
        return "broadcast before its product"
    grown = _grown(eqn, twin, 1 - side)
    if not grown:
        return "multiplied with something that is the same for every example"
    _, free, _ = operand_axes(eqn, 1 - side)
    before, after = (aval(x.invars[1 - side]).shape for x in (eqn, twin))
    axis = grown[0]
    if len(grown) > 1 or axis not in free or after[axis] != 2 * before[axis]:
        return "its product mixes the examples: they can't be told apart"
    return None


def _grown(eqn: JaxprEqn, twin: JaxprEqn, side: int) -> list[int]:
    before, after = aval(eqn.invars[side]).shape, aval(twin.invars[side]).shape
    return [i for i, size in enumerate(before) if size != after[i]]


def _added(scope: Scope, eqn: JaxprEqn) -> Value:
    for result, bias in (eqn.invars, eqn.invars[::-1]):
        total, value = scope.value(result), scope.value(bias)
        if isinstance(total, Result) and isinstance(value, Weight):
            found = total.product.bias_view(value, total.axes)
            if found is not None and scope.count[result] == 1:
                named = Bias(value.name, found)
                scope.findings.biases[total.product] = named
                scope.findings.use(value, named)
                return None
    for x in eqn.invars:
        scope.findings.use(scope.value(x), "added to something that is no layer")
    return None


def _scanned(scope: Scope, eqn: JaxprEqn, twin: JaxprEqn) -> None:
    walked = eqn.params["num_consts"] + eqn.params["num_carry"]
    inside: list[Value] = []
    for i, x in enumerate(eqn.invars):
        value = scope.value(x)
        if i < walked:
            scope.findings.use(value, "used anew in every step of a `scan`")
            value = None
        elif isinstance(value, Weight) and value.view != ():
            scope.findings.use(value, "rearranged before a `scan` walks over it")
            value = None
        elif isinstance(value, Weight):
            length, *shape = aval(x).shape
            value = whole(value.name, tuple(shape), (*value.stack, length))
        inside.append(value if isinstance(value, Weight) else None)
    inner, inner_twin = jaxprs.body(eqn).jaxpr, jaxprs.body(twin).jaxpr
    find(inner, inner_twin, inside, scope.examples, scope.findings)
