"""Which of a model's parameters are read, and why the others are not."""

from collections.abc import Sequence
from dataclasses import dataclass

from influence.model.task import Task
from influence.model.trace import Uncovered, on_request, select, trace
from influence.types import Batch, Layer, Params


@dataclass(frozen=True)
class Coverage:
    """Every parameter of a model: in a layer, or not covered and why.

    Attributes:
      layers: matrices and convolutions, in the order data passes through them.
      on_request: layers of other kinds, chosen by patterns such as `embedding:*`.
      uncovered: the other parameters.
    """

    layers: tuple[Layer, ...]
    on_request: tuple[Layer, ...]
    uncovered: tuple[Uncovered, ...]

    def __str__(self) -> str:
        """Returns a table each of layers, of those on request, and of what is left."""
        head = ("layer", "kind", "I", "O", "bias", "stack", "shared input")
        table = [head, *(_row(x, self.layers) for x in self.layers)]
        lines = _aligned(table)
        if self.on_request:
            asked = [_row(x, self.on_request) for x in self.on_request]
            asked = [(f"{kind}:{name}", kind, *x) for name, kind, *x in asked]
            lines += ["", *_aligned([("on request, as", *head[1:]), *asked])]
        if self.uncovered:
            missing = [
                (x.name, "×".join(map(str, x.shape)), x.reason) for x in self.uncovered
            ]
            lines += ["", *_aligned([("not covered", "shape", "why"), *missing])]
        return "\n".join(lines)


def layers(task: Task, params: Params, batch: Batch) -> Coverage:
    """Returns every layer of the model, and every parameter that is in none.

    Only shapes are looked at; nothing is computed.

    Args:
      task: the model.
      params: its parameters.
      batch: a batch such as it will be read on.

    Raises:
      ValueError: if the model draws random numbers, writes state, or is another program
        for another number of examples.

    Example:
      >>> print(influence.layers(task, params, next(iter(batches))))
      layer           kind    I   O   bias  stack  shared input
      block.mix       matrix  8   8
      block.mlp.up    matrix  8   16
      block.mlp.down  matrix  16  8
      head            matrix  8   10
      <BLANKLINE>
      on request, as   kind       I   O  bias  stack  shared input
      embedding:embed  embedding  10  8
      scale:norm       scale      1   8
    """
    program = trace(task.outputs, params, batch.inputs)
    asked = tuple(x for x in program.layers if on_request(x))
    usual = len(asked) < len(program.layers)
    return Coverage(select(program, "*") if usual else (), asked, program.uncovered)


def _row(layer: Layer, layers: Sequence[Layer]) -> tuple[str, ...]:
    alone = [x.reads for x in layers].count(layer.reads) == 1
    return (
        layer.name,
        layer.kind,
        str(layer.inputs),
        str(layer.outputs),
        layer.bias or "",
        "×".join(map(str, layer.stack)),
        "" if alone else layer.reads,
    )


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
