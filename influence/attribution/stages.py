"""The stages of an analysis, each with what it computes, moves and holds.

Sizes of layers, samples and queries go in, numbers come out (`cost.py` has the words).
Formulas follow what the passes allocate: statistics beside the state they are added to,
gradients of a batch for one layer, queries multiplied out, scores on their way out.
"""

from collections.abc import Sequence

from influence.attribution.cost import (
    KEPT,
    WIDE,
    Passes,
    Shape,
    Side,
    Stage,
    Subject,
    Work,
    groups,
    layer_shapes,
    parameter_bytes,
    query_bytes,
    rotated,
    sides,
)
from influence.attribution.query_cost import query
from influence.attribution.scan import EXPANDED
from influence.linalg import count
from influence.model.passes import Pass

COPIES = 5
"""Of a matrix in float64 as it is decomposed: cast, made symmetric, the eigenvectors,
and LAPACK's workspace of two."""


def stages(of: Subject, work: Work, at: Passes) -> list[Stage]:
    """Returns the stages, in their order.

    Args:
      of: the model and its layers.
      work: what is to be done.
      at: what the model's passes over a batch of that size take.

    Example:
      >>> from influence.attribution.cost import Work, passes, subject
      >>> from influence.attribution.stages import stages
      >>> planned = subject(task, params, "block.*")
      >>> work = Work(8, batch=2, samples=10, sequences=10, queries=1)
      >>> [x.name for x in stages(planned, work, passes(planned, 8)(2))][:3]
      ['covariances', 'eigendecomposition', 'eigenvalues']
    """
    layers, held = layer_shapes(of), parameter_bytes(of.params)
    found = [
        covariances(layers, work, at.sampled, held),
        eigendecomposition(layers),
        eigenvalues(layers, work, at.sampled, held),
        query(layers, work, at, held),
        scan(layers, work, at.given, held),
    ]
    if work.token_sequences:
        found.append(scan_per_token(layers, work, at.given, held))
    shared = _exchanged(of, work)
    return [x._replace(exchanged=shared if x.batches else 0.0) for x in found]


def _exchanged(of: Subject, work: Work) -> float:
    """Returns what is handed on for a batch if every matrix is split over devices.

    Of each matrix the shorter of input and output, forward and back, and both sides of
    those that are read.
    """
    samples = work.batch * work.context
    ways = sum(2 * x.copies * min(x.outputs, x.inputs) for x in _all(of))
    read = sum(x.copies * (x.outputs + x.inputs) for x in layer_shapes(of))
    return 4.0 * samples * (ways + read)


def _all(of: Subject) -> list[Shape]:
    return layer_shapes(of._replace(layers=of.every))


def step(work: Work, at: Pass, parameters: float) -> Stage:
    """Returns a forward and backward pass, what everything is compared with."""
    memory = {
        "parameters": parameters,
        "activations": KEPT * at.held,
        "working": parameters,
    }
    return Stage("forward+backward", work.sequences / work.batch, {"model": at}, memory)


def covariances(
    layers: Sequence[Shape], work: Work, at: Pass, parameters: float
) -> Stage:
    """Returns the pass that sums covariances."""
    samples = work.batch * work.context
    all_sides = sides(layers)
    state = sum(x.covariance for x in all_sides)
    products = sum(
        x.copies * (sum(count.gram(samples, n) for n in x.blocks) or samples * x.length)
        for x in all_sides
    )
    rows = sum(x.copies * samples * x.length * x.bytes for x in all_sides)
    # Each is masked, read by strips, added to the sums.
    reading = Pass(flops=2.0 * products, moved=rows + state, made=rows + 3 * state)
    masked = max(
        samples * (g[0].inputs + sum(x.outputs for x in g)) * g[0].bytes
        for g in groups(layers)
    )
    beside = sum(x.covariance for x in sides([x for x in layers if x.stacked]))
    # At the end the means stand beside the sums, and activations are gone.
    memory = {
        "parameters": parameters,
        "curvature": state,
        "copies": max(beside, state - KEPT * at.held - masked),
        "activations": KEPT * at.held,
        "working": masked,
    }
    batches = work.samples / work.batch
    parts = {"model": at, "covariances": reading}
    return Stage("covariances", batches, parts, memory, summed=state)


def eigendecomposition(layers: Sequence[Shape]) -> Stage:
    """Returns the eigenvectors of every side."""
    all_sides = sides(layers)
    each = [x.copies * sum(map(count.eigen, x.blocks)) for x in all_sides]
    state = sum(x.covariance for x in all_sides)
    memory = {
        "curvature": state + sum(x.basis for x in all_sides),
        "working": max(map(_decomposing, all_sides)),
    }
    return Stage(
        "eigendecomposition",
        0,
        {},
        memory,
        eigen=float(sum(each)),
        largest=float(max(each)),
        summed=state,
    )


def _decomposing(side: Side) -> float:
    """Returns what decomposing a side holds: its copies are one after another."""
    return float(
        max((n * n for n in side.blocks), default=0) * (COPIES * WIDE + side.bytes)
    )


def eigenvalues(
    layers: Sequence[Shape], work: Work, at: Pass, parameters: float
) -> Stage:
    """Returns the pass that refits eigenvalues."""
    reading = Pass()
    for group in groups(layers):
        reading = reading.then(rotated(group, work))
    lam = sum(x.weights for x in layers)
    bases = sum(x.basis for x in sides(layers))
    gradients = max(sum(x.matrix for x in g) for g in groups(layers)) * work.batch
    beside = sum(x.weights for x in layers if x.stacked)
    memory = {
        "parameters": parameters,
        "curvature": bases + lam,
        "activations": KEPT * at.held,
        "copies": max(beside, lam - KEPT * at.held - 2 * gradients),
        "working": 2 * gradients,
    }
    batches = work.samples / work.batch
    parts = {"model": at, "eigenvalues": reading}
    return Stage("eigenvalues", batches, parts, memory, summed=lam)


def scan(layers: Sequence[Shape], work: Work, at: Pass, parameters: float) -> Stage:
    """Returns the pass that scores every sequence, through every layer."""
    samples, reading, expanded = work.batch * work.context, Pass(), 0.0
    for x in layers:
        products, whole = _scanned(x, work)
        rows = samples * (x.outputs + x.inputs) * x.bytes
        read = work.queries * query_bytes([x], work.rank)
        made = 0.0
        if whole:
            d = work.batch * x.weights
            read, made = work.queries * x.weights + d, d
        if whole and work.rank is not None:
            # Some queries of one matrix are multiplied out at a time.
            expanded = max(expanded, min(work.queries, EXPANDED) * x.matrix)
            made += work.queries * x.weights
        if not whole:
            made = 2.0 * x.copies * samples * work.queries * (work.rank or 0) * x.bytes
        one = Pass(flops=2.0 * products * x.copies, moved=rows * x.copies + read)
        reading = reading.then(one._replace(made=made))
    return _scoring("scan", layers, work, at, parameters, reading, expanded)


def _scanned(x: Shape, work: Work) -> tuple[float, bool]:
    """Returns the multiplications for one copy of a layer, and whether it is dense."""
    dense = count.dense_scan(work.batch, work.context, work.queries, *x.size)
    if work.rank is None:
        return dense, True
    rank = min(work.rank, *x.size)
    dense += count.expanded(work.queries, rank, *x.size)
    samples = work.batch * work.context
    parts = count.factored_scan(samples, work.queries, rank, *x.size)
    return min(dense, parts), dense < parts


def scan_per_token(
    layers: Sequence[Shape], work: Work, at: Pass, parameters: float
) -> Stage:
    """Returns the pass that scores every position of some sequences."""
    samples, reading = work.batch * work.context, Pass()
    for x in layers:
        if work.rank is None:
            products = count.dense_tokens(samples, work.queries, *x.size)
            made = 2.0 * samples * work.queries * min(x.size) * x.bytes
        else:
            rank = min(work.rank, *x.size)
            products = count.factored_scan(samples, work.queries, rank, *x.size)
            made = 3.0 * samples * work.queries * rank * x.bytes
        read = work.queries * query_bytes([x], work.rank) / x.copies
        one = Pass(flops=2.0 * products, moved=read + made, made=made)
        reading = reading.then(one.times(x.copies))
    stage = _scoring("scan, per token", layers, work, at, parameters, reading, 0.0)
    matrices = sum(x.copies for x in layers)
    scores = 4.0 * samples * work.queries * matrices
    ended = 4.0 * work.token_sequences * work.context * work.queries * matrices
    memory = dict(stage.memory)
    memory["working"] = memory["working"] + 2 * scores + 2 * ended
    batches = work.token_sequences / work.batch
    return stage._replace(batches=batches, memory=memory)


def _scoring(
    name: str,
    layers: Sequence[Shape],
    work: Work,
    at: Pass,
    parameters: float,
    reading: Pass,
    expanded: float,
) -> Stage:
    asked = work.queries
    gradients = max(sum(x.matrix for x in g) for g in groups(layers)) * work.batch
    memory = {
        "parameters": parameters,
        "queries": asked * query_bytes(layers, work.rank),
        "copies": expanded,
        "activations": KEPT * at.held,
        "working": 2 * gradients,
    }
    parts = {"model": at, "scores": reading}
    return Stage(name, work.sequences / work.batch, parts, memory)
