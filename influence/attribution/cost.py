"""What each stage of an analysis computes, moves and holds: one model of the costs.

Counted from shapes alone: the model's own passes by a walk over its traced program
(`influence.model.passes`), what is read of each layer by the counts that also choose
between algorithms (`influence.linalg.count`). Nothing is computed, and no parameter has
to exist. `docs/planning.md` derives every formula.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.curvature.covariance import Factors, PerToken
from influence.linalg.contract import wide
from influence.linalg.count import gradient, turn, turned_matrix, turned_positions
from influence.model.passes import Pass, count
from influence.model.reading import Reading
from influence.model.tangents import covered, matrices
from influence.model.task import Empirical, Labels, Sampled, Task, losses, read_loss
from influence.model.trace import select, trace
from influence.types import Batch, Layer, Params, named_leaves, with_leaves

WIDE = 8
"""Bytes of a number while eigenvectors are found: float64."""

KEPT = 0.8
"""Of the values autodiff keeps for the way back, what a compiler holds: it fuses chains
of elementwise steps and computes some anew. XLA's own figures on the CPU are 0.71 to
0.93 of the walk's (training step, reading; blocks in a Python loop or under a scan)."""


class Subject(NamedTuple):
    """A model, and what is read of it.

    Attributes:
      task: the model and its loss.
      params: its parameters, or their shapes.
      layers: those whose curvature is fitted.
      every: all that it has.
      factors: how the sides of a layer are looked at.
    """

    task: Task
    params: Params
    layers: tuple[Layer, ...]
    every: tuple[Layer, ...]
    factors: Factors = PerToken()


class Work(NamedTuple):
    """What is to be done.

    Attributes:
      context: tokens a sequence.
      batch: sequences a batch, on each device.
      samples: how many sequences the curvature is fitted to.
      sequences: how many are scanned.
      queries: how many questions are asked.
      rank: of the queries; None for matrices.
      token_sequences: how many are scanned token by token.
    """

    context: int
    batch: int
    samples: int
    sequences: int
    queries: int
    rank: int | None = None
    token_sequences: int = 0


class Passes(NamedTuple):
    """What the model's own passes over one batch take, readings left out.

    Attributes:
      step: forward and backward, gradients of all parameters: the unit.
      sampled: forward, and back to the layers, labels drawn from the model.
      given: the same with the labels of the data.
      gradient: of one sequence, gradients of the layers.
    """

    step: Pass
    sampled: Pass
    given: Pass
    gradient: Pass


def subject(
    task: Task,
    params: Params,
    layers: str | Sequence[str] = "*",
    factors: Factors = PerToken(),
) -> Subject:
    """Returns a language model as something to be planned for.

    Args:
      task: the model and its loss.
      params: its parameters, or their shapes (`jax.eval_shape`).
      layers: a glob on the layers' names, or several.
      factors: how the sides of a layer are looked at.

    Raises:
      ValueError: if a pattern matches no layer.

    Example:
      >>> from influence.attribution.cost import subject
      >>> planned = subject(task, params, "block.mlp.*")
      >>> [x.name for x in planned.layers]
      ['block.mlp.up', 'block.mlp.down']
    """
    program = trace(task.outputs, params, shapes(2, 4).inputs)
    chosen = factors.grouped(select(program, layers))
    return Subject(task, params, chosen, select(program, "*"), factors)


def shapes(examples: int, context: int) -> Batch:
    """Returns a batch of token sequences, as shapes alone."""
    shape = jax.ShapeDtypeStruct
    tokens = shape((examples, context), jnp.int32)
    inputs = {"tokens": tokens, "counts": shape((examples, context), jnp.bool_)}
    keys = shape((examples, 2), jnp.uint32)
    return _as_batch((inputs, keys, shape((examples,), jnp.bool_)))


def _as_batch(parts: Any) -> Batch:
    """Returns shapes where arrays are meant: whatever traces them does not mind."""
    return Batch(*parts)


def passes(of: Subject, context: int) -> Callable[[int], Passes]:
    """Returns what the model's passes take, as a function of the batch size.

    All of it is a part that does not depend on the size and one that grows with it, so
    that two sizes tell of every other.

    Example:
      >>> from influence.attribution.cost import passes, subject
      >>> at = passes(subject(task, params), 8)
      >>> round(at(10).step.flops / at(5).step.flops, 3)
      2.0
    """
    two, four = (_batched(of, shapes(n, context)) for n in (2, 4))
    alone = _gradient(of, shapes(1, context))

    def at(examples: int) -> Passes:
        def line(x: float, y: float) -> float:
            return x + (y - x) * (examples - 2) / 2

        step, sampled, given = (
            Pass(*map(line, x, y)) for x, y in zip(two, four, strict=True)
        )
        return Passes(step, sampled, given, alone)

    return at


def _batched(of: Subject, batch: Batch) -> tuple[Pass, Pass, Pass]:
    """Returns what the passes take that a batch of sequences goes through."""
    params = jax.eval_shape(lambda x: x, of.params)

    def read(labels: Labels, params: Params, batch: Batch) -> Any:
        return read_loss(of.task, of.layers, _NOTHING, labels, params, batch, {})

    return (
        count(jax.value_and_grad(partial(_loss, of.task)), params, batch),
        count(partial(read, Sampled()), params, batch),
        count(partial(read, Empirical()), params, batch),
    )


def _gradient(of: Subject, batch: Batch) -> Pass:
    """Returns what the gradients of the layers take."""

    def gradient(params: Params, batch: Batch) -> Any:
        def of_leaves(leaves: Any) -> Any:
            return _loss(of.task, with_leaves(params, leaves), batch)

        found = jax.value_and_grad(of_leaves)(covered(params, of.layers))
        return found[0], matrices(of.layers, found[1])

    return count(gradient, jax.eval_shape(lambda x: x, of.params), batch)


def _loss(task: Task, params: Params, batch: Batch) -> Array:
    outputs = task.outputs(params, batch.inputs)
    return losses(task, outputs, task.labels(batch.inputs), batch).sum()


def _nothing(a: Any, gs: Mapping[str, Any], given: Any, counted: Any) -> Any:
    """Returns one number a layer, so that the gradient has to be there to be read."""
    del a, given, counted
    return {k: g[0, 0, 0] for k, g in gs.items()}


def _nothing_of(ds: Mapping[str, Any], given: Any, counted: Any) -> Any:
    del given, counted
    return {k: d[0, 0, 0] for k, d in ds.items()}


_NOTHING = Reading(_nothing, _nothing_of)


class Shape(NamedTuple):
    """One layer as costs see it.

    Attributes:
      copies: how many matrices it stacks.
      stacked: whether a scan or a batched product walks over them.
      reads: the layer whose input side it shares.
      outputs: `O`.
      inputs: `I`, with the column of a bias.
      out_blocks: the lengths of the blocks of its output side; none: the diagonal.
      in_blocks: and of its input side.
      bytes: of one number of its statistics.
      diagonal: of output and input side, whether there can be no other basis.
      kind: as a layer has it.
    """

    copies: int
    stacked: bool
    reads: str
    outputs: int
    inputs: int
    out_blocks: tuple[int, ...]
    in_blocks: tuple[int, ...]
    bytes: int
    diagonal: tuple[bool, bool]
    kind: str

    @property
    def size(self) -> tuple[int, int]:
        """Returns `O` and `I`."""
        return self.outputs, self.inputs

    @property
    def turns(self) -> tuple[int, int]:
        """Returns the multiplications of turning one vector of either side."""
        return turn(self.out_blocks), turn(self.in_blocks)

    @property
    def matrix(self) -> float:
        """Returns the bytes of one copy's eigenvalues, or of a gradient."""
        return float(self.outputs * self.inputs * self.bytes)

    @property
    def weights(self) -> float:
        """Returns the bytes of all copies' eigenvalues, or of a gradient."""
        return self.copies * self.matrix


def layer_shapes(of: Subject) -> list[Shape]:
    """Returns the chosen layers as costs see them."""
    weights = named_leaves(of.params)
    return [
        Shape(
            prod(x.stack),
            bool(x.stack),
            x.reads,
            x.outputs,
            x.columns,
            of.factors.outputs(x),
            of.factors.inputs(x),
            np.dtype(wide(weights[x.parameter].dtype)).itemsize,
            (x.diagonal[1], x.diagonal[0]),
            x.kind,
        )
        for x in of.layers
    ]


class Side(NamedTuple):
    """One side of a layer: how many copies, how long, in which blocks."""

    copies: int
    length: int
    blocks: tuple[int, ...]
    bytes: int
    diagonal: bool

    @property
    def covariance(self) -> float:
        """Returns the bytes of its covariances."""
        each = sum(n * n for n in self.blocks) or self.length
        return float(self.copies * each * self.bytes)

    @property
    def basis(self) -> float:
        """Returns the bytes of its eigenvectors; none in the standard basis."""
        return self.covariance if self.blocks else 0.0


def sides(layers: Sequence[Shape]) -> list[Side]:
    """Returns every side that has a covariance of its own."""
    found, seen = [], set()
    for x in layers:
        if x.reads not in seen:
            found.append(Side(x.copies, x.inputs, x.in_blocks, x.bytes, x.diagonal[1]))
            seen.add(x.reads)
        found.append(Side(x.copies, x.outputs, x.out_blocks, x.bytes, x.diagonal[0]))
    return found


def groups(layers: Sequence[Shape]) -> list[list[Shape]]:
    """Returns the layers, those that read one activation together."""
    found: dict[str, list[Shape]] = {}
    for x in layers:
        found.setdefault(x.reads, []).append(x)
    return list(found.values())


def parameter_bytes(params: Params) -> float:
    """Returns the bytes of a model's parameters."""
    leaves = jax.tree.leaves(params)
    return float(sum(prod(x.shape) * x.dtype.itemsize for x in leaves))


def query_bytes(layers: Sequence[Shape], rank: int | None) -> float:
    """Returns the bytes of one query, as matrices or as factors."""
    if rank is None:
        return sum(x.weights for x in layers)
    return float(
        sum(x.copies * min(rank, *x.size) * sum(x.size) * x.bytes for x in layers)
    )


def rotated(group: Sequence[Shape], work: Work) -> Pass:
    """Returns a batch's gradients in the eigenbasis, of layers with one input."""
    samples, total = work.batch * work.context, Pass()
    for i, x in enumerate(group):
        turn_out, turn_in = x.turns
        first = turned_positions(work.context, turn_out, turn_in)
        whole = turned_matrix(*x.size, turn_out, turn_in)
        # The input is turned once for all layers that read it.
        turning = turned_positions(work.context, turn_out, 0 if i else turn_in)
        products = min(turning, whole) if first <= whole else whole
        products += gradient(work.context, *x.size)
        d = work.batch * x.matrix
        rows = samples * (x.outputs + x.inputs) * x.bytes
        made = d + (rows if first <= whole else 4 * d)
        one = Pass(flops=2.0 * products * work.batch, moved=rows + d, made=made)
        total = total.then(one.times(x.copies))
    return total


class Stage(NamedTuple):
    """One stage.

    Attributes:
      name: what it is.
      batches: how many it takes, all devices together; 0 if it walks over no data.
      parts: what one batch takes, by what is done; or all of it without batches.
      memory: bytes by what they hold. `parameters`, `curvature`, `queries` and
        `copies` of these can be split over devices, `activations` and `working` are
        those of one device.
      eigen: operations of eigendecompositions.
      largest: of these, those of the largest side, which one device does.
      summed: bytes of statistics that the devices add up once at the end.
      exchanged: bytes that devices which share a matrix hand each other for a batch.
    """

    name: str
    batches: float
    parts: Mapping[str, Pass]
    memory: Mapping[str, float]
    eigen: float = 0.0
    largest: float = 0.0
    summed: float = 0.0
    exchanged: float = 0.0

    @property
    def flops(self) -> float:
        """Returns all operations, on all devices."""
        each = sum(x.flops for x in self.parts.values())
        return self.eigen + each * (self.batches or 1)
