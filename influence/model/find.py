"""What a flat program uses its parameters for, and which uses are no layer's, and why.

The walk follows every parameter through casts, transposes, reshapes, cuts and
multiplication by a number, into the scans that slice it or use it anew in every step,
up to an equation that combines it with something that differs from example to example.
Of each it says what use that is, or in words why no reading covers it.

To tell the examples apart it reads the same program traced twice, the second time with
twice the examples: the axis that doubled is theirs.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.extend.core import primitives as p

from influence.model import jaxprs
from influence.model.convolution import Convolution, convolution
from influence.model.elementwise import Scale, Shift, elementwise
from influence.model.jaxprs import aval
from influence.model.lookup import lookup
from influence.model.product import Product, product
from influence.model.use import Use
from influence.model.weight import Axes, Weight, part, whole
from influence.types import Step


class Result(NamedTuple):
    """The result of a product or convolution, cast, its axes moved or inserted."""

    use: Use
    axes: Axes


Value = Weight | Result | None
"""What the walk knows about a value."""


class Bias(NamedTuple):
    """A shift of a product's result, and the view of the parameter as `[*stack, O]`."""

    use: Shift
    view: tuple[Step, ...]


COMBINED = {
    "dot_general": product,
    "conv_general_dilated": convolution,
    "gather": lookup,
    "mul": partial(elementwise, Scale),
    "add": partial(elementwise, Shift),
}
"""The equations that may use a parameter as a layer, and what tells whether they do."""

HINTS = {
    "sub": "used in `sub`: write `x - b` as `x + (-b)`",
    "dynamic_slice": "cut (`dynamic_slice`) at a place known only as the model runs",
    "custom_jvp_call": "used in a function with a derivative rule of its own",
    "custom_vjp_call": "used in a function with a derivative rule of its own",
    "ragged_dot": "used in `ragged_dot`: write experts as a batched product",
    "ragged_dot_general": "used in `ragged_dot`: write experts as a batched product",
    "shard_map": "used inside `shard_map`, whose body is not followed",
    "while": "used inside a `while` loop: write it as a `scan` of known length",
    "cond": "used inside a `cond`, of which only one branch runs",
}

TOGETHER = {
    "dot_general": (
        "multiplied with another parameter: write `x @ (A B)` as `(x @ A) @ B`, and "
        "give an einsum of three operands `optimize=[(0, 1), (0, 1)]`"
    ),
    "add": "added to another parameter",
}


@dataclass
class Findings:
    """What a walk has found.

    Attributes:
      uses: every use of every parameter, or words where no reading covers it.
      order: the uses that are covered, in the order of the program.
      biases: of each product or convolution, the bias added to its result.
      early: the variables that hold rearranged parameters, computed before all else.
      stopped: the parameters some of whose uses the model keeps gradients from.
    """

    uses: dict[str, list[Use | str]] = field(default_factory=dict)
    order: list[Use] = field(default_factory=list)
    biases: dict[Use, Bias] = field(default_factory=dict)
    early: set[Var] = field(default_factory=set)
    stopped: set[str] = field(default_factory=set)

    def use(self, value: Value, how: Use | str) -> None:
        """Notes a use, if the value is a parameter."""
        if isinstance(value, Weight):
            self.uses.setdefault(value.name, []).append(how)
            if isinstance(how, Use):
                self.order.append(how)


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
        known.update(zip(eqn.outvars, _followed(scope, eqn, twin), strict=False))
    for x in jaxpr.outvars:
        findings.use(scope.value(x), "handed on as it is")
    return findings


def _followed(scope: Scope, eqn: JaxprEqn, twin: JaxprEqn) -> Sequence[Value]:
    """Returns what is known of the first results of an equation."""
    name = eqn.primitive.name
    if eqn.primitive in (*jaxprs.CASTS, *jaxprs.REARRANGEMENTS):
        return [_rearranged(scope, eqn)]
    if name in ("slice", "split"):
        return _cut(scope, eqn)
    if name in COMBINED or name in ("sub", "div", "neg"):
        return [_scaled(scope, eqn) or _combined(scope, eqn, twin)]
    if eqn.primitive is p.scan_p:
        _scanned(scope, eqn, twin)
    elif eqn.primitive is p.remat_p:
        inner, inner_twin = jaxprs.body(eqn).jaxpr, jaxprs.body(twin).jaxpr
        values = [scope.value(x) for x in eqn.invars]
        inside = [x if isinstance(x, Weight) else None for x in values]
        find(inner, inner_twin, inside, scope.examples, scope.findings)
    elif name == "stop_gradient":
        values = [scope.value(x) for x in eqn.invars]
        scope.findings.stopped |= {x.name for x in values if isinstance(x, Weight)}
    else:
        _refused(scope, eqn, HINTS.get(name, f"used in `{name}`"))
    return []


def _refused(scope: Scope, eqn: JaxprEqn, reason: str) -> None:
    for x in eqn.invars:
        scope.findings.use(scope.value(x), reason)


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


def _cut(scope: Scope, eqn: JaxprEqn) -> Sequence[Value]:
    """Returns the parts of a parameter that a `slice` or `split` takes."""
    value, options = scope.value(eqn.invars[0]), eqn.params
    if not isinstance(value, Weight):
        return []
    if eqn.primitive.name == "split":
        bounds = pairwise(accumulate(map(int, options["sizes"]), initial=0))
        cuts = [[(options["axis"], *each)] for each in bounds]
    else:
        starts, stops = options["start_indices"], options["limit_indices"]
        cuts = [list(zip(range(len(starts)), starts, stops, strict=True))]
    parts = [part(value, cut) for cut in cuts]
    if None in parts or any(step != 1 for step in options.get("strides") or ()):
        scope.findings.use(value, "cut in strides, or after it was rearranged")
        return []
    scope.findings.early.update(eqn.outvars)
    return parts


def _scaled(scope: Scope, eqn: JaxprEqn) -> Weight | None:
    """Returns a parameter times a number, or plus one, which leaves its gradient."""
    numbers = [x.val for x in eqn.invars if isinstance(x, Literal)]
    value = next((x for x in map(scope.value, eqn.invars) if x is not None), None)
    if not isinstance(value, Weight) or len(eqn.invars) != 1 + len(numbers):
        return None
    first = isinstance(eqn.invars[0], Literal)
    factors = {
        "mul": lambda: float(numbers[0]),
        "div": lambda: None if first else 1 / float(numbers[0]),
        "neg": lambda: -1.0,
        "add": lambda: 1.0,
        "sub": lambda: -1.0 if first else 1.0,
    }
    factor = factors.get(eqn.primitive.name, lambda: None)()
    if factor is None:
        return None
    scope.findings.early.add(eqn.outvars[0])
    return value._replace(factor=value.factor * factor)


def _combined(scope: Scope, eqn: JaxprEqn, twin: JaxprEqn) -> Value:
    """Notes a parameter's use; returns a product's or convolution's result as such."""
    name = eqn.primitive.name
    weights = [
        (side, x)
        for side, x in enumerate(map(scope.value, eqn.invars))
        if isinstance(x, Weight)
    ]
    if len(weights) != 1 or name not in COMBINED:
        said = HINTS.get(name, f"used in `{name}`")
        _refused(scope, eqn, TOGETHER.get(name, said))
        return None
    ((side, value),) = weights
    use = COMBINED[name](value, eqn, twin, side, scope.examples)
    scope.findings.use(value, use)
    if isinstance(use, Shift):
        _note_bias(scope, use)
    if isinstance(use, Product | Convolution):
        return Result(use, tuple(range(aval(use.out).ndim)))
    return None


def _note_bias(scope: Scope, use: Shift) -> None:
    """Notes that a shift is the bias of what it is added to, if it is one.

    A result used elsewhere as well has a second cotangent there, which the bias would
    not share.
    """
    total = scope.value(use.activation)
    if not isinstance(total, Result) or scope.count[use.activation] > 1:
        return
    view = total.use.bias_view(use.weight, total.axes)
    if view is not None and aval(use.out).shape == aval(use.activation).shape:
        scope.findings.biases[total.use] = Bias(use, view)


def _scanned(scope: Scope, eqn: JaxprEqn, twin: JaxprEqn) -> None:
    consts = eqn.params["num_consts"]
    walked = consts + eqn.params["num_carry"]
    inside: list[Value] = []
    for i, x in enumerate(eqn.invars):
        value = scope.value(x)
        if isinstance(value, Weight) and i < consts:
            value = value._replace(scans=(*value.scans, (eqn, False)))
        elif isinstance(value, Weight) and i < walked:
            scope.findings.use(value, "carried from step to step of a `scan`")
            value = None
        elif isinstance(value, Weight) and (value.view != () or value.cut):
            scope.findings.use(value, "rearranged or cut before a `scan` walks over it")
            value = None
        elif isinstance(value, Weight):
            slice_ = whole(value.name, aval(x).shape[1:], (*value.scans, (eqn, True)))
            value = slice_._replace(factor=value.factor)
        inside.append(value if isinstance(value, Weight) else None)
    inner, inner_twin = jaxprs.body(eqn).jaxpr, jaxprs.body(twin).jaxpr
    find(inner, inner_twin, inside, scope.examples, scope.findings)
