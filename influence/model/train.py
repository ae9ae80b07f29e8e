"""Training as a pure function of per-sequence weights.

Which sequences a model would be without is asked by giving them weight zero: same
start, same batches in the same order, same denominators, only their terms gone. So the
retrained model differs from the trained one by nothing but their influence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from influence.fold import Fold
from influence.model.examples import Examples
from influence.model.task import Task, losses
from influence.types import Batch, Params


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW on a warmed-up cosine schedule.

    Attributes:
      steps: how many updates.
      batch: how many sequences an update takes.
      rate: the highest learning rate.
      warmup: the share of steps over which it is reached.
      decay: of the weights, as in AdamW.
      clip: the largest norm of an update's gradient.
    """

    steps: int
    batch: int
    rate: float
    warmup: float = 0.05
    decay: float = 0.01
    clip: float = 1.0

    def optimizer(self) -> optax.GradientTransformation:
        """Returns the optimizer."""
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.rate, max(1, round(self.warmup * self.steps)), self.steps
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(rate, b2=0.99, weight_decay=self.decay),
        )


class Progress(NamedTuple):
    """A training run, part way.

    Attributes:
      params: the parameters.
      optimizer: the optimizer's state.
      losses: of each chunk so far, the mean loss per counted label, in nats.
    """

    params: Params
    optimizer: Any
    losses: tuple[Array, ...]


@dataclass(frozen=True)
class Order:
    """Which sequences every update takes, in chunks of updates.

    Epoch after epoch all sequences in a new order, from a seed.
    """

    sequences: int
    recipe: Recipe
    seed: int
    chunk: int = 25

    def __len__(self) -> int:
        """Returns the number of chunks."""
        return -(-self.recipe.steps // self.chunk)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Walks the chunks, `int32[chunk, batch]`; the last may be shorter."""
        rng = np.random.default_rng(self.seed)
        needed = self.recipe.steps * self.recipe.batch
        epochs = -(-needed // self.sequences)
        places = np.concatenate(
            [rng.permutation(self.sequences) for _ in range(epochs)]
        )
        order = places[:needed].astype(np.int32).reshape(-1, self.recipe.batch)
        for start in range(0, len(order), self.chunk):
            yield order[start : start + self.chunk]


def fold(
    task: Task,
    recipe: Recipe,
    params: Params,
    examples: Examples,
    weights_N: Sequence[float] | np.ndarray,
) -> Fold:
    """Returns the pass over an `Order` that trains, ending in `Progress`.

    Args:
      task: the model and its loss.
      recipe: how to train.
      params: where to start.
      examples: all training sequences.
      weights_N: how much each counts: 1 as it is, 0 not at all.
    """
    data = jax.tree.map(jnp.asarray, examples.inputs)
    weights = jnp.asarray(weights_N, jnp.float32)

    def init():
        # The state is consumed step by step; the caller keeps its parameters.
        start = jax.tree.map(jnp.copy, params)
        return Progress(start, recipe.optimizer().init(start), ())

    def update(state, order):
        trained, optimizer, loss = _steps(
            task, recipe, state.params, state.optimizer, data, weights, order
        )
        return Progress(trained, optimizer, (*state.losses, loss))

    return Fold("training", init, update, lambda state: state)


@jax.jit(static_argnums=(0, 1), donate_argnums=(2, 3))
def _steps(
    task: Task,
    recipe: Recipe,
    params: Params,
    optimizer: Any,
    data: Any,
    weights_N: Array,
    order: Array,
) -> tuple[Params, Any, Array]:
    def loss(params, places):
        inputs = jax.tree.map(lambda x: x[places], data)
        batch = Batch(
            inputs, jnp.zeros((len(places), 2), jnp.uint32), jnp.ones(len(places), bool)
        )
        outputs = task.outputs(params, inputs)
        each = losses(task, outputs, task.labels(inputs), batch)
        return (weights_N[places] * each).sum() / task.counts(inputs).sum()

    def step(carry, places):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, places)
        updates, state = recipe.optimizer().update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, optimizer), values = jax.lax.scan(step, (params, optimizer), order)
    return params, optimizer, values.mean()
