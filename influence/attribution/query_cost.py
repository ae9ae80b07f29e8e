"""What queries take: read or differentiated, solved, made small (`stages.py`)."""

from collections.abc import Mapping, Sequence

from influence.attribution.cost import (
    KEPT,
    WIDE,
    Passes,
    Shape,
    Stage,
    Work,
    groups,
    query_bytes,
    rotated,
    sides,
)
from influence.attribution.streamed import BESIDE, basis
from influence.curvature.operator import TOGETHER
from influence.linalg import count
from influence.linalg.low_rank import MORE, iterated, operations
from influence.model.passes import Pass


def query(layers: Sequence[Shape], work: Work, at: Passes, parameters: float) -> Stage:
    """Returns the queries' gradients, solved and, if a rank is given, compressed."""
    asked, one, rank = work.queries, at.gradient, work.rank
    # What one sequence's pass holds beyond its activations are gradients of weights.
    activations = min(one.held, at.given.held / work.batch)
    weights = sum(x.weights for x in layers)
    eigen = 0.0
    if rank is not None:
        short = [x for x in layers if not iterated(*x.size, rank)]
        eigen = asked * _truncated(short, rank)
    memory = {
        "parameters": parameters,
        "curvature": sum(x.basis for x in sides(layers)) + weights,
        "activations": KEPT * activations,
        **(_one_by_one if is_streamed(layers, asked) else _together)(layers, work),
    }
    memory["copies"] += KEPT * (one.held - activations)
    parts = _asked(layers, work, at)
    return Stage("query", 0, parts, memory, eigen=eigen, largest=eigen)


def is_streamed(layers: Sequence[Shape], asked: int) -> bool:
    """Returns whether log-probabilities are read in the eigenbasis, one by one.

    As the engine decides, which does not look at how factors are cut.
    """
    whole = sum(
        x.copies * x.bytes * basis(x.length, diagonal=x.diagonal) for x in sides(layers)
    )
    looked_up = any(x.kind == "embedding" for x in layers)
    return not looked_up and whole <= BESIDE * asked * sum(x.weights for x in layers)


def _one_by_one(layers: Sequence[Shape], work: Work) -> dict[str, float]:
    """Returns what is held of queries that are read, solved and kept one by one."""
    rank, weights = work.rank, sum(x.weights for x in layers)
    working = 0.0 if rank is None else max(_truncating(x, rank) for x in layers)
    return {
        "queries": work.queries * query_bytes(layers, rank),
        # A gradient, its solution and, if whole, that turned back.
        "copies": (3 if rank is None else 2) * weights,
        "working": working,
    }


def _together(layers: Sequence[Shape], work: Work) -> dict[str, float]:
    """Returns what is held of queries whose layers are solved one after another."""
    asked, rank = work.queries, work.rank
    largest = max(layers, key=lambda x: x.weights)
    # While one layer is solved it is copied in and out, and so while it is compressed;
    # its gradients go when it is.
    kept = asked * sum(x.weights for x in layers)
    # Copies of what is turned at a time, which may be several small ones.
    working = 4 * min(asked * largest.matrix, max(largest.matrix, 4.0 * TOGETHER))
    if rank is not None:
        kept += asked * query_bytes(layers, rank)
        working = max(working, asked * max(_truncating(x, rank) for x in layers))
    return {
        "queries": kept,
        "copies": 2 * asked * largest.weights,
        "working": working,
    }


def _asked(layers: Sequence[Shape], work: Work, at: Passes) -> Mapping[str, Pass]:
    """Returns gradients of log-probabilities, and what the inverse makes of them."""
    asked, weights = work.queries, sum(x.weights for x in layers)
    bases = sum(x.basis for x in sides(layers))
    products = sum(x.copies * count.turned_matrix(*x.size, *x.turns) for x in layers)
    turned = Pass(
        flops=2.0 * asked * products,
        moved=2 * asked * weights + bases * asked,
        made=3 * asked * weights,
    )
    if is_streamed(layers, asked):
        reading, single = Pass(), work._replace(batch=1)
        for group in groups(layers):
            reading = reading.then(rotated(group, single))
        model = at.given.times(asked / work.batch)
        parts = {"model": model, "reading": reading.times(asked)}
    else:
        parts = {"model": at.gradient.times(asked), "turning": turned}
    if work.rank is None:
        return {**parts, "turning back": turned}
    return {**parts, "compressing": _compressed(layers, work.rank).times(asked)}


def _compressed(layers: Sequence[Shape], rank: int) -> Pass:
    """Returns one query truncated, where that is an iteration, and its factors turned.

    Eigendecompositions are counted elsewhere.
    """
    flops = _truncated([x for x in layers if iterated(*x.size, rank)], rank)
    for x in layers:
        flops += 2.0 * x.copies * min(rank, *x.size) * sum(x.turns)
    return Pass(flops=flops)


def _truncated(layers: Sequence[Shape], rank: int) -> float:
    """Returns the operations of finding the leading directions of one query."""
    return float(sum(x.copies * operations(*x.size, rank) for x in layers))


def _truncating(x: Shape, rank: int) -> float:
    """Returns what finding the leading directions of one layer of a query holds."""
    if iterated(*x.size, rank):
        return float(x.copies * 2 * (rank + MORE) * sum(x.size) * x.bytes)
    return float(x.copies * min(x.size) ** 2 * (3 * WIDE + 4))
