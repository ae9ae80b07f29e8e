"""Tasks with one label an example: a class, or a number.

Inputs are `{"x": [B, …], "label": [B]}`, as `labelled` makes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.linalg.contract import wide
from influence.model.examples import Examples
from influence.model.task import Task, draw
from influence.types import Inputs, Params


@dataclass(frozen=True)
class Classification(Task):
    """One class an example, from the model's softmax.

    Attributes:
      apply: `(params, x) -> logits_BxC`.

    Example:
      >>> from influence.model.supervised import Classification, labelled
      >>> classify = Classification(lambda params, x: x @ params["w"])
      >>> points = labelled(np.eye(2, dtype=np.float32), np.array([0, 2]))
      >>> zeros = {"w": jnp.zeros((2, 3), jnp.float32)}
      >>> logits = classify.outputs(zeros, points.inputs)
      >>> print(classify.loss(logits, classify.labels(points.inputs)))
      [1.0986123 1.0986123]
    """

    apply: Callable[[Params, Array], Array]

    def outputs(self, params: Params, inputs: Inputs) -> Array:
        """Returns logits, `[B, C]`."""
        return self.apply(params, inputs["x"])

    def labels(self, inputs: Inputs) -> Array:
        """Returns the classes, `[B]`."""
        return inputs["label"]

    def counts(self, inputs: Inputs) -> Array:
        """Returns that every label counts, `[B]`."""
        return jnp.ones_like(inputs["label"], bool)

    def loss(self, outputs: Array, labels: Array) -> Array:
        """Returns `-log p(class)`, `[B]`."""
        log_p = jax.nn.log_softmax(outputs.astype(wide(outputs.dtype)), axis=-1)
        return -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]

    def sample(self, keys_B: Array, outputs: Array) -> Array:
        """Returns classes drawn from the softmax."""
        return draw(keys_B, outputs)

    def counted(self, inputs: Inputs) -> Array:
        """Returns that the one position counts, `[B, 1]`."""
        return _whole(inputs)

    def check(self, inputs: Inputs, outputs: Array, ids: Sequence[str]) -> None:
        """Raises if a class is none of the model's, or an input is not finite.

        Raises:
          ValueError: naming the example.
        """
        _check_finite(inputs["x"], ids)
        classes, label = outputs.shape[-1], np.asarray(inputs["label"])
        strange = np.flatnonzero((label < 0) | (label >= classes))
        if len(strange):
            raise ValueError(
                f"Example {ids[strange[0]]!r} is of class {label[strange[0]]}, and the "
                f"model knows 0 to {classes - 1}. Number the classes from 0."
            )


@dataclass(frozen=True)
class Regression(Task):
    """One number an example, normal around the model's output with variance one.

    The loss is half the squared error, so that its Gauss–Newton matrix is the Fisher.
    Scale the labels to say how sure the model is: in units of their noise.

    Attributes:
      apply: `(params, x) -> mean_B`.

    Example:
      >>> from influence.model.supervised import Regression, labelled
      >>> line = Regression(lambda params, x: x @ params["w"])
      >>> points = labelled(np.eye(2, dtype=np.float32), np.array([3.0, 4.0]))
      >>> mean = line.outputs({"w": jnp.zeros(2, jnp.float32)}, points.inputs)
      >>> print(line.loss(mean, line.labels(points.inputs)))
      [4.5 8. ]
    """

    apply: Callable[[Params, Array], Array]

    def outputs(self, params: Params, inputs: Inputs) -> Array:
        """Returns means, `[B]`."""
        return self.apply(params, inputs["x"])

    def labels(self, inputs: Inputs) -> Array:
        """Returns the numbers in the data, `[B]`."""
        return inputs["label"]

    def counts(self, inputs: Inputs) -> Array:
        """Returns that every label counts, `[B]`."""
        return jnp.ones_like(inputs["label"], bool)

    def loss(self, outputs: Array, labels: Array) -> Array:
        """Returns half the squared error, `[B]`."""
        return 0.5 * (outputs - labels.astype(outputs.dtype)) ** 2

    def sample(self, keys_B: Array, outputs: Array) -> Array:
        """Returns numbers drawn around the outputs."""
        noise = jax.vmap(lambda key: jax.random.normal(key, dtype=outputs.dtype))
        return outputs + noise(keys_B)

    def counted(self, inputs: Inputs) -> Array:
        """Returns that the one position counts, `[B, 1]`."""
        return _whole(inputs)

    def check(self, inputs: Inputs, outputs: Array, ids: Sequence[str]) -> None:
        """Raises if a label or an input is not finite, or outputs are not numbers.

        Raises:
          ValueError: naming the example.
        """
        if len(outputs.shape) != 1:
            raise ValueError(
                f"The model's outputs have shape {outputs.shape} where a regression "
                "needs one number an example, [B]. Drop the last axis."
            )
        _check_finite(inputs["x"], ids)
        _check_finite(inputs["label"], ids)


def labelled(
    x: np.ndarray, label: np.ndarray, ids: Sequence[str] | None = None
) -> Examples:
    """Returns inputs `[N, …]` and their labels `[N]` as examples.

    Args:
      x: what the model is given.
      label: classes from 0 on, or numbers.
      ids: the examples' names; "0", "1", … if left out.

    Raises:
      ValueError: if there are none, or not one label for each.

    Example:
      >>> from influence.model.supervised import labelled
      >>> labelled(np.eye(2), np.array([0, 1])).ids
      ('0', '1')
    """
    names = tuple(str(i) for i in range(len(label))) if ids is None else tuple(ids)
    return Examples({"x": np.asarray(x), "label": np.asarray(label)}, names)


def _whole(inputs: Inputs) -> Array:
    return jnp.ones((len(inputs["label"]), 1), bool)


def _check_finite(x: np.ndarray, ids: Sequence[str]) -> None:
    flat = np.asarray(x, float).reshape(len(ids), -1)
    bad = np.flatnonzero(~np.isfinite(flat).all(1))
    if len(bad):
        raise ValueError(
            f"Example {ids[bad[0]]!r} has a number that is NaN or infinite. Leave it "
            "out, or fill it in."
        )
