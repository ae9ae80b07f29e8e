"""What one asks of a model: functions from its parameters to one number.

The log-probability of a completion, the difference of two, their mean; or any function
of the user's.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.attribution.scores import PER_COPY, UNIT
from influence.model.examples import Examples, prompted
from influence.model.task import LanguageModel, Task, losses, shape_of_outputs
from influence.types import Batch, Inputs, Params

Measurement = Callable[[Params], Array]
"""`params -> scalar`. One that is a pytree shares its compilation with its like."""


def measure(measurement: Measurement, params: Params) -> float:
    """Returns a measurement's value; completions of one length compile once.

    Example:
      >>> from influence.attribution.measurements import measure
      >>> measure(measurements["3 after 1, 2"], params) > -1
      True
    """
    return float(_measure(as_tree(measurement), params))


def result_of(measurement: Measurement, params: Params) -> Any:
    """Returns shape and type of what a measurement returns, traced once for its like.

    Args:
      measurement: as `as_tree` returns it.
      params: the model's parameters.
    """
    return _measure.eval_shape(measurement, params)


@jax.jit
def _measure(measurement: Measurement, params: Params) -> Array:
    return measurement(params)


def together(measurements: Iterable[Measurement]) -> Callable[[Params], Array]:
    """Returns `params -> values_Q`, those of one kind and shape computed as a batch.

    Example:
      >>> from influence.attribution.measurements import together
      >>> pairs = {"3": ([1, 2], [3]), "7": ([1, 2], [7])}
      >>> values = together(influence.completions(task, pairs).values())
      >>> values(params).shape
      (2,)
    """
    trees = [as_tree(x) for x in measurements]
    alike: dict[Any, list[int]] = {}
    for i, tree in enumerate(trees):
        shapes = tuple((jnp.shape(x), str(x.dtype)) for x in jax.tree.leaves(tree))
        alike.setdefault((jax.tree.structure(tree), shapes), []).append(i)
    stacks = [_stacked([trees[i] for i in places]) for places in alike.values()]
    order = np.argsort(np.concatenate([*alike.values()]))

    def values(params: Params) -> Array:
        found = [jax.vmap(lambda f: f(params))(stack) for stack in stacks]
        return jnp.concatenate(found)[order]

    return values


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


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
class Likelihood:
    """The log-probability of an example's labels that count, in nats.

    Of a completion after its prompt, if that is what counts; of a normal distribution
    without its constant.

    Example:
      >>> log_p = measurements["3 after 1, 2"](params)
      >>> logits_V = apply(params, jnp.array([[1, 2]]))[0, -1]
      >>> np.testing.assert_allclose(log_p, jax.nn.log_softmax(logits_V)[3], rtol=1e-4)
    """

    task: Task
    inputs: Inputs

    def __call__(self, params: Params) -> Array:
        """Returns `log p(labels | inputs)`."""
        return self.of(self.task.outputs(params, self.inputs))

    def of(self, outputs: Any) -> Array:
        """Returns the same from the model's outputs."""
        keys, real = jnp.zeros((1, 2), jnp.uint32), jnp.ones(1, bool)
        batch = Batch(self.inputs, keys, real)
        return -losses(self.task, outputs, self.task.labels(self.inputs), batch).sum()

    def check(self, name: str, params: Params) -> None:
        """Raises if the inputs are not the model's."""
        outputs = shape_of_outputs(self.task, params, self.inputs)
        self.task.check(self.inputs, outputs, [name])


def contrast(first: Measurement, second: Measurement) -> Measurement:
    """Returns `first - second` as a measurement: why this rather than that?

    Example:
      >>> from influence.attribution.measurements import contrast
      >>> asked = influence.completions(task, {"3": ([1, 2], [3]), "7": ([1, 2], [7])})
      >>> rather = {"3 rather than 7": contrast(asked["3"], asked["7"])}
      >>> influence.query(curvature, params, rather).names
      ('3 rather than 7',)
    """
    return jax.tree_util.Partial(_difference, as_tree(first), as_tree(second))


def mean(*each: Measurement) -> Measurement:
    """Returns the mean of some measurements as one: why such things?

    Example:
      >>> from influence.attribution.measurements import mean
      >>> asked = influence.completions(task, {"3": ([1, 2], [3]), "4": ([2, 3], [4])})
      >>> both = {"counting up": mean(*asked.values())}
      >>> influence.query(curvature, params, both).names
      ('counting up',)
    """
    return jax.tree_util.Partial(_mean, *map(as_tree, each))


def unit_of(measurements: Iterable[Measurement]) -> str:
    """Returns the unit of scores of some measurements, in words.

    Nats a copy of log-probabilities, their differences and means; of anything else its
    own unit, which nobody said.

    Example:
      >>> from influence.attribution.measurements import unit_of
      >>> unit_of(measurements.values()), unit_of([lambda params: 1.0])
      ('nats per added copy', 'units of the measurement per added copy')
    """
    nats = all(map(_in_nats, measurements))
    return UNIT if nats else f"units of the measurement {PER_COPY}"


def _in_nats(measurement: Measurement) -> bool:
    if isinstance(measurement, jax.tree_util.Partial):
        known = measurement.func in (_difference, _mean)
        return known and all(map(_in_nats, measurement.args))
    return isinstance(measurement, Likelihood)


def _difference(first: Measurement, second: Measurement, params: Params) -> Array:
    return first(params) - second(params)


def _mean(*each_and_params: Any) -> Array:
    *each, params = each_and_params
    return jnp.stack([f(params) for f in each]).mean()


def likelihoods(task: Task, examples: Examples) -> dict[str, Likelihood]:
    """Returns measurements: the log-probability of each example's labels that count.

    Args:
      task: the model and its loss.
      examples: held out, or not.

    Example:
      >>> from influence.attribution.measurements import likelihoods
      >>> list(likelihoods(task, examples.take([0, 2])))
      ['up', 'down']
    """
    return {
        name: Likelihood(
            task, jax.tree.map(lambda x, i=i: x[i : i + 1], examples.inputs)
        )
        for i, name in enumerate(examples.ids)
    }


def completions(
    task: LanguageModel, texts: Mapping[str, tuple[Sequence[int], Sequence[int]]]
) -> dict[str, Likelihood]:
    """Returns measurements: the log-probabilities of completions after their prompts.

    Only the tokens of the completion count. All are padded to one length and so share
    one compilation.

    Args:
      task: the language model.
      texts: by name, the token ids of a prompt and of its completion.

    Raises:
      ValueError: if there are none, or a prompt or completion is empty, naming it.

    Example:
      >>> pairs = {"3 after 1, 2": ([1, 2], [3]), "6, 5 after 7": ([7], [6, 5])}
      >>> list(influence.completions(task, pairs))
      ['3 after 1, 2', '6, 5 after 7']
    """
    return likelihoods(task, prompted(texts))
