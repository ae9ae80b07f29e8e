"""What one asks of a model: functions from its parameters to one number.

The log-probability of a completion, the difference of two, their mean; or any function
of the user's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from influence.model.examples import prompted
from influence.model.task import LanguageModel, losses
from influence.types import Batch, Inputs, Params

Measurement = Callable[[Params], Array]
"""`params -> scalar`. One that is a pytree shares its compilation with its like."""


def measure(measurement: Measurement, params: Params) -> float:
    """Returns a measurement's value; completions of one length compile once."""
    return float(_measure(as_tree(measurement), params))


@jax.jit
def _measure(measurement: Measurement, params: Params) -> Array:
    return measurement(params)


def as_tree(measurement: Measurement) -> Measurement:
    """Returns a measurement that a compiled function takes as an argument."""
    if jax.tree_util.all_leaves([measurement]):
        return jax.tree_util.Partial(measurement)
    return measurement


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs"],
    meta_fields=["task"],
)
@dataclass(frozen=True)
class Completion:
    """The log-probability of a completion after its prompt, in nats."""

    task: LanguageModel
    inputs: Inputs

    def __call__(self, params: Params) -> Array:
        """Returns `log p(completion | prompt)`."""
        keys, real = jnp.zeros((1, 2), jnp.uint32), jnp.ones(1, bool)
        batch = Batch(self.inputs, keys, real)
        outputs = self.task.outputs(params, self.inputs)
        return -losses(self.task, outputs, self.task.labels(self.inputs), batch).sum()

    def check(self, name: str, params: Params) -> None:
        """Raises if the tokens are not the model's."""
        outputs = jax.eval_shape(self.task.outputs, params, self.inputs)
        self.task.check(self.inputs, outputs, [name])


def contrast(first: Measurement, second: Measurement) -> Measurement:
    """Returns `first - second` as a measurement: why this rather than that?"""
    return jax.tree_util.Partial(_difference, as_tree(first), as_tree(second))


def mean(*each: Measurement) -> Measurement:
    """Returns the mean of some measurements as one: why such things?"""
    return jax.tree_util.Partial(_mean, *map(as_tree, each))


def _difference(first: Measurement, second: Measurement, params: Params) -> Array:
    return first(params) - second(params)


def _mean(*each_and_params: Any) -> Array:
    *each, params = each_and_params
    return jnp.stack([f(params) for f in each]).mean()


def completions(
    task: LanguageModel, texts: Mapping[str, tuple[Sequence[int], Sequence[int]]]
) -> dict[str, Completion]:
    """Returns measurements: the log-probabilities of completions after their prompts.

    Only the tokens of the completion count. All are padded to one length and so share
    one compilation.

    Args:
      task: the language model.
      texts: by name, the token ids of a prompt and of its completion.

    Raises:
      ValueError: if there are none, or a prompt or completion is empty, naming it.
    """
    examples = prompted(texts)
    return {
        name: Completion(
            task, jax.tree.map(lambda x, i=i: x[i : i + 1], examples.inputs)
        )
        for i, name in enumerate(examples.ids)
    }
