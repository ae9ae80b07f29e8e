"""Training as a pure function of per-sequence weights.

Which sequences a model would be without is asked by giving them weight zero: same
start, same batches in the same order, same denominators, only their terms gone. So the
retrained model differs from the trained one by nothing but their influence.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from influence.fold import Fold
from influence.model.examples import Examples
from influence.model.optimizer import SGD as SGD
from influence.model.optimizer import AdamW as AdamW
from influence.model.optimizer import Optimizer
from influence.model.task import Task, token_losses
from influence.types import Batch, Inputs, Params


@dataclass(frozen=True)
class Recipe:
    """How to train, on a warmed-up cosine schedule.

    Attributes:
      steps: how many updates.
      batch: how many sequences an update takes.
      rate: the highest learning rate.
      optimizer: what an update makes of a gradient.
      warmup: the share of steps over which the highest rate is reached; with 0 training
        begins there.
      last: the rate of the last step, as a share of the highest.
    """

    steps: int
    batch: int
    rate: float
    optimizer: Optimizer = AdamW()
    warmup: float = 0.05
    last: float = 0.0

    @property
    def schedule(self) -> optax.Schedule:
        """Returns the learning rate of every step."""
        if self.warmup == 0:
            return optax.cosine_decay_schedule(self.rate, self.steps, self.last)
        return optax.warmup_cosine_decay_schedule(
            0.0,
            self.rate,
            max(1, round(self.warmup * self.steps)),
            self.steps,
            self.last * self.rate,
        )

    def distance(self, start: int, stop: int, labels: float) -> float:
        """Returns how far updates go, for a loss averaged over sequences.

        The sum of their learning rates times the optimizer's reach; over the labels a
        sequence has, for training's loss is a mean over labels. An adaptive optimizer
        does not see what the loss is divided by.

        Args:
          start: the first update.
          stop: the one after the last.
          labels: how many a sequence has.
        """
        rates = np.array([self.schedule(i) for i in range(start, stop)])
        far = float(rates.sum()) * self.optimizer.reach
        return far if self.optimizer.adaptive else far / float(labels)

    def transformation(self) -> optax.GradientTransformation:
        """Returns the optimizer on the schedule."""
        return self.optimizer(self.schedule)


class State(NamedTuple):
    """A model in training.

    Attributes:
      params: the parameters.
      optimizer: the optimizer's state.
    """

    params: Params
    optimizer: Any


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


NONE = -1
"""The place of no sequence: an update that would take it is not made."""


@dataclass(frozen=True)
class Order:
    """Which sequences every update takes, in chunks of updates.

    Epoch after epoch all sequences in a new order, from a seed. All chunks are of one
    length, so that one program serves them: the last is filled up (`filled`).
    """

    sequences: int
    recipe: Recipe
    seed: int
    chunk: int = 25

    def __len__(self) -> int:
        """Returns the number of chunks."""
        return -(-self.recipe.steps // self.chunk)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Walks the chunks, `int32[chunk, batch]`; the last is filled up."""
        order = self.whole()
        for start in range(0, len(order), self.chunk):
            yield filled(order[start : start + self.chunk], self.chunk)

    def whole(self) -> np.ndarray:
        """Returns all of it, `int32[steps, batch]`."""
        rng = np.random.default_rng(self.seed)
        needed = self.recipe.steps * self.recipe.batch
        epochs = -(-needed // self.sequences)
        places = np.concatenate(
            [rng.permutation(self.sequences) for _ in range(epochs)]
        )
        return places[:needed].astype(np.int32).reshape(-1, self.recipe.batch)


@dataclass(frozen=True)
class Training:
    """A training run as a function of weights and a seed, and nothing else.

    Attributes:
      task: the model and its loss.
      recipe: how it is trained.
      examples: all training sequences.
      start: the parameters that training from a seed begins with.

    Example:
      >>> training = train.Training(task, recipe, examples, lambda seed: start)
      >>> again = training(np.ones(len(examples)), seed=0)
      >>> np.testing.assert_allclose(again["head"], params["head"], atol=1e-5)
    """

    task: Task
    recipe: Recipe
    examples: Examples
    start: Callable[[int], Params]

    def __call__(self, weights_N: Sequence[float] | np.ndarray, seed: int) -> Params:
        """Returns the trained parameters.

        Args:
          weights_N: how much each sequence counts: 1 as it is, 0 not at all; or how
            much each of its labels does, `[N, T]`.
          seed: of the start and of the order of sequences.
        """
        trained = self.many(np.asarray(weights_N)[None], [seed])
        return jax.tree.map(lambda x: x[0], trained)

    def many(
        self, weights_MxN: np.ndarray, seeds_M: Sequence[int], at_once: int = 1
    ) -> Params:
        """Returns the parameters of several trainings, stacked along the first axis.

        All in one program of `at_once` trainings side by side, the last ones filled up:
        what a training ends in does not depend, to the bit, on those beside it. Several
        devices share them, if there are as many for each.

        Args:
          weights_MxN: of each training, as `__call__` takes them.
          seeds_M: of each training.
          at_once: how many are trained side by side.
        """
        seeds = list(dict.fromkeys(seeds_M))
        begun = [self.start(seed) for seed in seeds]
        starts = jax.tree.map(lambda *x: jnp.stack(x), *begun)
        orders = np.stack([self.order(seed) for seed in seeds])
        which_M = np.array([seeds.index(seed) for seed in seeds_M])
        found = []
        for at in range(0, len(which_M), at_once):
            places = np.minimum(np.arange(at, at + at_once), len(which_M) - 1)
            each = (
                jax.tree.map(lambda x, p=places: x[which_M[p]], starts),
                jnp.asarray(np.asarray(weights_MxN, float)[places]),
                jnp.asarray(orders[which_M[places]]),
            )
            trained = _trained(self.task, self.recipe, self.data, *_spread(each))
            real = min(at_once, len(which_M) - at)
            found.append(jax.tree.map(lambda x, n=real: x[:n], trained))
        return jax.tree.map(lambda *x: jnp.concatenate(x), *found)

    def states(self, seed: int, after: Sequence[int] | np.ndarray) -> list[State]:
        """Returns the states after some numbers of updates, all weights one.

        Args:
          seed: of the training.
          after: numbers of updates, ascending.
        """
        state, order, ones = self.begun(seed), self.order(seed), self.ones
        stretches = np.split(order, after)[:-1]
        longest = max(map(len, stretches), default=0)
        found = []
        for stretch in stretches:
            own = filled(stretch, longest)
            state = walked(self.task, self.recipe, self.data, ones, state, own)
            found.append(state)
        return found

    def distance(self, start: int, stop: int) -> float:
        """Returns how far updates go, for a loss averaged over sequences.

        See `Recipe.distance`; sequences have as many labels as they do on average.
        """
        counts = np.asarray(self.task.counts(self.data))
        return self.recipe.distance(start, stop, counts.sum() / len(counts))

    def begun(self, seed: int) -> State:
        """Returns the state that training from a seed begins in."""
        return begin(self.recipe, self.start(seed))

    @property
    def ones(self) -> Array:
        """Returns the weights of training as it is, `[N]`."""
        return jnp.ones(len(self.examples))

    def order(self, seed: int) -> np.ndarray:
        """Returns which sequences every update takes, `int32[steps, batch]`."""
        return Order(len(self.examples), self.recipe, seed).whole()

    @property
    def data(self) -> Inputs:
        """Returns the training sequences on the device."""
        return jax.tree.map(jnp.asarray, self.examples.inputs)


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
    weights = jnp.asarray(np.asarray(weights_N, float))

    def init():
        # The state is consumed step by step; the caller keeps its parameters.
        start = begin(recipe, jax.tree.map(jnp.copy, params))
        return Progress(start.params, start.optimizer, ())

    def update(progress, order):
        state = State(progress.params, progress.optimizer)
        state, loss = _steps(task, recipe, data, weights, state, order)
        return Progress(state.params, state.optimizer, (*progress.losses, loss))

    return Fold("training", init, update, lambda state: state)


def begin(recipe: Recipe, params: Params) -> State:
    """Returns the state that training begins in."""
    return State(params, recipe.transformation().init(params))


def step(
    task: Task, recipe: Recipe, data: Inputs, weights_N: Array, state: State, places_B
) -> tuple[State, Array]:
    """Returns the state after one update, and the mean loss per counted label.

    Differentiable in the weights, of sequences or of their labels, `[N]` or `[N, T]`;
    they do not change the denominator.
    """

    def loss(params: Params) -> Array:
        inputs = jax.tree.map(lambda x: x[places_B], data)
        n = len(places_B)
        batch = Batch(inputs, jnp.zeros((n, 2), jnp.uint32), jnp.ones(n, bool))
        outputs = task.outputs(params, inputs)
        each = token_losses(task, outputs, task.labels(inputs), batch)
        weights = weights_N[places_B].astype(each.dtype)
        weights = weights.reshape(*weights.shape, *[1] * (each.ndim - weights.ndim))
        return (weights * each).sum() / task.counts(inputs).sum().astype(each.dtype)

    value, gradient = jax.value_and_grad(loss)(state.params)
    # Optimizers mix the types of schedules, counters and parameters.
    with jax.numpy_dtype_promotion("standard"):
        updates, optimizer = recipe.transformation().update(
            gradient, state.optimizer, state.params
        )
    return State(optax.apply_updates(state.params, updates), optimizer), value


def steps(
    task: Task, recipe: Recipe, data: Inputs, weights_N: Array, state: State, order
) -> tuple[State, Array]:
    """Returns the state after the updates of an order, `[K, B]`, and their losses."""
    return jax.lax.scan(partial(step, task, recipe, data, weights_N), state, order)


def filled(order: np.ndarray, length: int) -> np.ndarray:
    """Returns an order with updates behind it that are none, `int32[length, B]`."""
    return np.pad(order, [(0, length - len(order)), (0, 0)], constant_values=NONE)


@jax.jit(static_argnums=(0, 1))
def walked(
    task: Task, recipe: Recipe, data: Inputs, weights_N: Array, state: State, order
) -> State:
    """Returns the state after the updates of an order, and keeps the one before."""
    return _walk(task, recipe, data, weights_N, state, order)[0]


def _spread(each_M: Any) -> Any:
    """Returns arrays of one training a row, spread over the devices if they divide."""
    devices, rows = jax.devices(), len(jax.tree.leaves(each_M)[0])
    if rows % len(devices):
        return each_M
    mesh = jax.sharding.Mesh(np.array(devices), ("training",))
    along = jax.sharding.PartitionSpec("training")
    return jax.device_put(each_M, jax.sharding.NamedSharding(mesh, along))


def _walk(
    task: Task, recipe: Recipe, data: Inputs, weights_N: Array, state: State, order
) -> tuple[State, Array]:
    """Returns the state after the updates of an order, and their losses' mean.

    As `steps`, but for an order that may be filled up, and without derivatives.
    """
    count = (order[:, 0] != NONE).sum()

    def one(i: Array, walked: tuple[State, Array]) -> tuple[State, Array]:
        state, total = walked
        state, loss = step(task, recipe, data, weights_N, state, order[i])
        return state, total + loss.astype(float)

    state, total = jax.lax.fori_loop(0, count, one, (state, jnp.zeros(())))
    return state, total / count.astype(float)


_steps = jax.jit(_walk, static_argnums=(0, 1), donate_argnums=4)
"""As `_walk`, and the state before is gone."""


@jax.jit(static_argnums=(0, 1))
def _trained(
    task: Task,
    recipe: Recipe,
    data: Inputs,
    start_M: Params,
    weights_MxN: Array,
    order_M: Array,
) -> Params:
    def one(start: Params, weights_N: Array, order: Array) -> Params:
        state, _ = steps(task, recipe, data, weights_N, begin(recipe, start), order)
        return state.params

    return jax.vmap(one)(start_M, weights_MxN, order_M)
