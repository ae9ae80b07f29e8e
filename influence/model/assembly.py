"""From the uses of parameters to layers.

A layer has the orientation of its first product, or of its first use if it has none.
Its other uses must see the same matrix, transposed or not: then each one's `left` and
`right` are the layer's, or swapped, and what they contribute adds up. A parameter one
use of which is not covered is not covered at all, never by half.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from influence.model.find import Bias, Findings
from influence.model.use import Contribution, Use
from influence.model.weight import arrangement, overlap
from influence.types import KINDS, Layer

SAID = {
    "matrix": "a matrix product",
    "convolution": "a convolution",
    "embedding": "an embedding lookup",
    "scale": "a scale",
    "shift": "a shift",
}


class Assembly(NamedTuple):
    """The layers of a program.

    Attributes:
      layers: in the order of the program.
      uses: by layer, every use of its weight.
      refused: why parameters are not covered, by name.
    """

    layers: tuple[Layer, ...]
    uses: Mapping[str, tuple[Contribution, ...]]
    refused: Mapping[str, str]


def assemble(findings: Findings, names: Sequence[str]) -> Assembly:
    """Returns the layers that the uses of some parameters make up."""
    said = {name: _refusal(findings, name) for name in names}
    refused = {name: reason for name, reason in said.items() if reason is not None}
    parts: dict[str, list[Use]] = {}
    for use in findings.order:
        if use.weight.name not in refused:
            parts.setdefault(use.weight.label, []).append(use)
    biases = {label: _bias(findings, uses, parts) for label, uses in parts.items()}
    folded = {x.use.weight.label for x in biases.values() if x is not None}
    layers = {
        _main(uses): _layer(_main(uses), biases[label])
        for label, uses in parts.items()
        if label not in folded
    }
    return Assembly(
        layers=tuple(layers[use] for use in findings.order if use in layers),
        uses={x.name: _contributions(parts[x.name]) for x in layers.values()},
        refused=refused,
    )


def _refusal(findings: Findings, name: str) -> str | None:
    """Returns why a parameter is not covered; None if all of its uses are."""
    uses = findings.uses.get(name, [])
    if not uses:
        return "its gradient is stopped" if name in findings.stopped else "not used"
    said = [x if isinstance(x, str) else SAID[x.kind] for x in uses]
    found = [x for x in uses if isinstance(x, Use)]
    if len(found) < len(uses):
        if not found:
            return "; ".join(dict.fromkeys(said))
        return f"only partly a layer, used {len(uses)} times: {'; '.join(said)}"
    if overlap(x.weight.cut for x in found):
        return f"used in parts that overlap: {', '.join(x.weight.label for x in found)}"
    if _walked_both_ways(found):
        return "walked over by a `scan`, and used whole inside the same one"
    for cut in dict.fromkeys(x.weight.cut for x in found):
        if not _contributions([x for x in found if x.weight.cut == cut]):
            return f"used as different matrices: {'; '.join(said)}"
    return None


def _walked_both_ways(uses: Sequence[Use]) -> bool:
    """Returns whether a scan walks over a weight for one use and not for another.

    What a reading makes of the weight can ride along with a scan in one way only.
    """
    ways = {way for use in uses for way in use.weight.scans}
    return len({id(eqn) for eqn, _ in ways}) < len(ways)


def _main(uses: Sequence[Use]) -> Use:
    """Returns the use that fixes the layer's orientation."""
    return min(uses, key=lambda use: KINDS.index(use.kind))


def _contributions(uses: Sequence[Use]) -> tuple[Contribution, ...]:
    """Returns uses as those of one layer; none if they are of different matrices."""
    found = [_contribution(use, _main(uses)) for use in uses]
    return tuple(x for x in found if x is not None) if None not in found else ()


def _contribution(use: Use, main: Use) -> Contribution | None:
    if use is main:
        return Contribution(use, False)
    if use.weight.stack != main.weight.stack:
        return None
    shape = main.weight.shape
    wanted = arrangement(shape, main.view())
    if arrangement(shape, use.view()) == wanted:
        return Contribution(use, False)
    n = len(use.stack)
    turn = ("transpose", (*range(n), n + 1, n))
    if arrangement(shape, (*use.view(), turn)) == wanted:
        return Contribution(use, True)
    return None


def _bias(
    findings: Findings, uses: Sequence[Use], parts: Mapping[str, Sequence[Use]]
) -> Bias | None:
    """Returns the bias that every use of a weight has, and nothing else."""
    found = [findings.biases.get(use) for use in uses]
    first = found[0]
    if first is None or any(x.turned for x in _contributions(uses)):
        return None
    label = first.use.weight.label
    if any(
        x is None or (x.use.weight.label, x.view) != (label, first.view) for x in found
    ):
        return None
    shifts = {x.use for x in found if x is not None}
    return first if set(parts.get(label, ())) == shifts else None


def _layer(use: Use, bias: Bias | None) -> Layer:
    name = use.weight.label
    return Layer(
        name=name,
        bias=bias.use.weight.name if bias else None,
        inputs=use.inputs,
        outputs=use.outputs,
        stack=(*use.weight.stack, *use.stack),
        reads=name,
        weight_view=use.weight.below(*use.view()),
        bias_view=bias.view if bias else (),
        kind=use.kind,
        diagonal=use.diagonal,
    )
