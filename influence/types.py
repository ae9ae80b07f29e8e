"""The words every floor shares: a batch of examples, and a layer of the model.

Letters in array names, here and everywhere: `B` examples, `T` positions, `I` inputs
and `O` outputs of a layer, `V` vocabulary, `Q` queries, `N` training sequences,
`R` rank. A name such as `a_BxTxI` carries its shape.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax import Array

Params = Any
"""A pytree of arrays: the model's parameters."""

Inputs = Any
"""A pytree of arrays with a leading example axis: what a task reads of a batch."""

Step = tuple[str, tuple[int, ...]]
"""One move of a view: `("reshape", shape)`, `("transpose", permutation)` or
`("slice", (axis, start, stop))`."""

KINDS = ("matrix", "convolution", "embedding", "scale", "shift")
"""What a model may use a parameter as, in the order in which a kind names a layer."""


class Batch(NamedTuple):
    """Some examples, as arrays on their way to the device.

    Attributes:
      inputs: what the task reads; every array has a leading axis `B`.
      key_Bx2: a counter made from each example's id alone. The labels sampled for an
        example hang on it, and so on neither batch size nor order.
      real_B: False where a row only fills up the last batch; such a row counts nowhere.
    """

    inputs: Inputs
    key_Bx2: Array | np.ndarray
    real_B: Array | np.ndarray


class Batches(Protocol):
    """A corpus cut into batches of one shape; can be walked more than once."""

    @property
    def ids(self) -> Sequence[str]:
        """A stable name for every real example, in the order of the batches."""
        ...

    def __len__(self) -> int:
        """Returns the number of batches."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Walks the batches from the first."""
        ...


class Layer(NamedTuple):
    """One parameter matrix as the model uses it: `y = W a`, or `y = [W b] [a; 1]`.

    Lookups, convolutions and elementwise uses are products too: with one-hots, with
    patches, with a single 1.

    Attributes:
      name: the weight's path in the params tree, with the part of it where the model
        cuts it: `qkv.kernel[:, 0:64]`.
      bias: the path of its bias, or None.
      inputs: `I`, the length of the input `a`, without the 1 of a bias.
      outputs: `O`, the length of the output `y`.
      stack: how many copies of the matrix one array holds: the lengths of the scans
        that walk over it and of the axes its product is batched over. `()` for one
        matrix.
      reads: the first of the layers that read the same activation. They share one
        input covariance, one eigendecomposition and one rotation.
      weight_view: the steps that turn the weight into matrices `[*stack, O, I]`.
      bias_view: the steps that turn the bias into vectors `[*stack, O]`.
      kind: what the model uses it as, one of `KINDS`; of several the first in order.
      diagonal: whether the covariance of the inputs, and that of the outputs, is kept
        in the standard basis: of one-hot inputs it is diagonal, and the entries of a
        scale or shift are no mixture of one another.
    """

    name: str
    bias: str | None
    inputs: int
    outputs: int
    stack: tuple[int, ...]
    reads: str
    weight_view: tuple[Step, ...]
    bias_view: tuple[Step, ...]
    kind: str = "matrix"
    diagonal: tuple[bool, bool] = (False, False)

    @property
    def parameter(self) -> str:
        """Returns the weight's path in the params tree."""
        cut = any(kind == "slice" for kind, _ in self.weight_view)
        return self.name.rpartition("[")[0] if cut else self.name

    @property
    def columns(self) -> int:
        """Returns `I`, or `I + 1` where a bias is folded in as the last column."""
        return self.inputs + (self.bias is not None)


def rows(layers: Sequence[Layer]) -> list[tuple[Layer, tuple[int, ...], str]]:
    """Returns every single matrix in the order data passes it: layer, place, label.

    Layers stacked alike are walked together, copy by copy, so that a scan over blocks
    reads block by block: `mlp.up[0], mlp.down[0], mlp.up[1], …`.
    """
    found, start = [], 0
    while start < len(layers):
        stop, stack = start, layers[start].stack
        while stop < len(layers) and layers[stop].stack == stack:
            stop += 1
        for place in _places(stack):
            label = "".join(f"[{i}]" for i in place)
            found += [(x, place, x.name + label) for x in layers[start:stop]]
        start = stop
    return found


def _places(stack: tuple[int, ...]) -> list[tuple[int, ...]]:
    if not stack:
        return [()]
    return [(i, *rest) for i in range(stack[0]) for rest in _places(stack[1:])]


def path_name(path: jax.tree_util.KeyPath) -> str:
    """Returns a parameter's path as dotted words, `blocks.0.mlp.up.kernel`.

    Flax NNX keeps an array one level below its variable, under `value`; a user never
    writes that level, so the name leaves it out.
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns `{path: leaf}` for a pytree, in its own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def with_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """Returns the pytree with the leaves at some paths replaced."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: leaves.get(path_name(path), x), tree
    )
