"""What a model is trained to do, as pure functions.

A task says what the model outputs, what the loss of one prediction is and how the model
itself would label its inputs. Masking, summing and the keys of sampled labels are the
engine's: they are where a hand-written loss goes wrong unnoticed.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.linalg.contract import wide
from influence.model.reading import Reading, read
from influence.model.trace import trace
from influence.types import Batch, Inputs, Layer, Params


class Task(abc.ABC):
    """A model and its loss.

    Subclass it for a loss of your own, as a frozen dataclass, so that equal tasks are
    equal and share what has been compiled. Leading axis of everything: examples.

    Example:
      >>> inputs = next(iter(batches)).inputs
      >>> task.outputs(params, inputs).shape
      (5, 7, 10)
      >>> task.labels(inputs).shape, task.counts(inputs).shape
      ((5, 7), (5, 7))
      >>> task.counted(inputs).shape
      (5, 7)
    """

    @abc.abstractmethod
    def outputs(self, params: Params, inputs: Inputs) -> Any:
        """Returns what the model makes of the inputs: logits, or anything else."""

    @abc.abstractmethod
    def labels(self, inputs: Inputs) -> Array:
        """Returns the labels in the data, `[B]` or `[B, T]`."""

    @abc.abstractmethod
    def counts(self, inputs: Inputs) -> Array:
        """Returns which labels count: booleans of the shape of the labels."""

    @abc.abstractmethod
    def loss(self, outputs: Any, labels: Array) -> Array:
        """Returns each label's negative log-probability, in nats."""

    @abc.abstractmethod
    def sample(self, keys_B: Array, outputs: Any) -> Array:
        """Returns labels from the model's own distribution, one key an example."""

    @abc.abstractmethod
    def counted(self, inputs: Inputs) -> Array:
        """Returns the counted positions, `[B, T]`, or `[B, 1]` if all of them are.

        A position is counted if a label that counts can be reached from it: everything
        up to the last such label in a decoder, everything but padding in an encoder.
        """

    @abc.abstractmethod
    def check(self, inputs: Inputs, outputs: Any, ids: Sequence[str]) -> None:
        """Raises if inputs would give numbers that mean nothing.

        Args:
          inputs: on the host.
          outputs: the shapes of what the model makes of them.
          ids: the examples' names, for the message.
        """


@dataclass(frozen=True)
class LanguageModel(Task):
    """Next-token prediction: position `t` predicts the token at `t + 1`.

    Inputs are `{"tokens": BxT, "counts": BxT}`, `counts` saying which tokens count as
    labels (never the first, which nothing predicts), as `sequences` makes them.

    Rows of several documents have `"segments": BxT` as well: documents numbered from 1
    on, padding 0. The model is given them, so that attention need not cross documents,
    and no token of one document is a label of another.

    Attributes:
      apply: `(params, tokens_BxT) -> logits_BxTxV`, or `(params, tokens, segments)` of
        inputs that have segments.
      context: the longest sequence the model takes, if it has a limit.

    Example:
      >>> task = influence.LanguageModel(apply)
      >>> task.outputs(params, {"tokens": jnp.array([[1, 2, 3]])}).shape
      (1, 3, 10)
    """

    apply: Callable[..., Array]
    context: int | None = None

    def outputs(self, params: Params, inputs: Inputs) -> Array:
        """Returns logits, `[B, T, V]`."""
        if "segments" in inputs:
            return self.apply(params, inputs["tokens"], inputs["segments"])
        return self.apply(params, inputs["tokens"])

    def labels(self, inputs: Inputs) -> Array:
        """Returns the next tokens, `[B, T]`; the last position has none, and a 0."""
        return _next(inputs["tokens"])

    def counts(self, inputs: Inputs) -> Array:
        """Returns whether the next token counts, `[B, T]`.

        The first token of a document is no label of the one before it.
        """
        if "segments" in inputs:
            return _next(inputs["counts"]) & ~_last(inputs["segments"])
        return _next(inputs["counts"])

    def loss(self, outputs: Array, labels: Array) -> Array:
        """Returns `-log p(next token)`, `[B, T]`."""
        log_p = jax.nn.log_softmax(outputs.astype(wide(outputs.dtype)), axis=-1)
        return -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]

    def sample(self, keys_B: Array, outputs: Array) -> Array:
        """Returns next tokens from the softmax, each from a key of its position."""
        positions = jnp.arange(outputs.shape[1])
        keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        return draw(keys(keys_B, positions), outputs)

    def counted(self, inputs: Inputs) -> Array:
        """Returns the positions at or before the last label that counts, `[B, T]`.

        With segments, the last of the position's own document.
        """
        counts = self.counts(inputs).astype(jnp.int32)
        left = jax.lax.cumsum(counts, axis=1, reverse=True)
        if "segments" in inputs:
            # Labels left at the end of a document are those of later ones; of all ends
            # from a position on, its own document's has the most.
            others = jnp.where(_last(inputs["segments"]), left - counts, 0)
            left = left - jax.lax.cummax(others, axis=1, reverse=True)
        return left > 0

    def check(self, inputs: Inputs, outputs: Any, ids: Sequence[str]) -> None:
        """Raises for ids outside the vocabulary, too long sequences, torn documents.

        Raises:
          ValueError: naming the sequence, the position and the numbers.
        """
        tokens = np.asarray(inputs["tokens"])
        *_, length, vocabulary = outputs.shape
        if self.context is not None and length > self.context:
            raise ValueError(
                f"Sequence {ids[0]!r} is {length} tokens long (padding included), the "
                f"model's context is {self.context}. Cut sequences to the context."
            )
        wrong = np.argwhere((tokens < 0) | (tokens >= vocabulary))
        if len(wrong):
            row, place = wrong[0]
            raise ValueError(
                f"Sequence {ids[row]!r} has token id {tokens[row, place]} at position "
                f"{place}, but the model's vocabulary has {vocabulary} ids, 0 to "
                f"{vocabulary - 1}. Are tokenizer and model from the same place?"
            )
        if "segments" in inputs:
            _check_segments(inputs, ids)


class Labels(Protocol):
    """Where labels come from."""

    @property
    def draws(self) -> int:
        """Returns how many times each pass draws labels."""
        ...

    def __call__(self, task: Task, outputs: Any, batch: Batch, draw: Array) -> Array:
        """Returns labels; `draw` counts on from pass to pass."""
        ...


@dataclass(frozen=True)
class Sampled:
    """Labels drawn from the model's own distribution: the curvature is the true Fisher.

    The key of a label is made of the seed, the example's id, the draw and the position,
    so batch size, order and resuming change none of them.

    Attributes:
      seed: of all labels.
      draws: how often labels are drawn in each pass. Each costs a backward pass but no
        forward pass, and takes away some of the noise that sampling puts into scores.

    Raises:
      ValueError: if there are no draws.

    Example:
      >>> other = influence.Sampled(seed=1)
      >>> again = influence.fit(task, params, batches, layers="block.*", labels=other)
      >>> again.labels
      'Sampled(seed=1, draws=1)'
    """

    seed: int = 0
    draws: int = 1

    def __post_init__(self) -> None:
        """Raises if there are no draws."""
        if self.draws < 1:
            raise ValueError(f"Labels are drawn once or more, not {self.draws} times.")

    def __call__(self, task: Task, outputs: Any, batch: Batch, draw: Array) -> Array:
        """Returns labels, the same whenever all arguments are."""
        start = jax.random.fold_in(jax.random.key(self.seed), draw)
        keys = jax.vmap(lambda id_2: _fold(start, id_2))(batch.key_Bx2)
        return jax.lax.stop_gradient(task.sample(keys, outputs))


@dataclass(frozen=True)
class Empirical:
    """The labels in the data: the curvature is the empirical Fisher.

    Example:
      >>> data = influence.Empirical()
      >>> fitted = influence.fit(task, params, batches, layers="block.*", labels=data)
      >>> fitted.labels
      'Empirical()'
    """

    @property
    def draws(self) -> int:
        """Returns 1: there is nothing to draw."""
        return 1

    def __call__(self, task: Task, outputs: Any, batch: Batch, draw: Array) -> Array:
        """Returns the labels in the data."""
        del outputs, draw
        return task.labels(batch.inputs)


def shape_of_outputs(task: Task, params: Params, inputs: Inputs) -> Any:
    """Returns shapes and types of the model's outputs, traced once for their like."""
    return _outputs.eval_shape(task, params, inputs)


@jax.jit(static_argnums=0)
def _outputs(task: Task, params: Params, inputs: Inputs) -> Any:
    return task.outputs(params, inputs)


def losses(task: Task, outputs: Any, labels: Array, batch: Batch) -> Array:
    """Returns each example's loss, `[B]`: its labels that count, summed, in nats."""
    each = token_losses(task, outputs, labels, batch)
    return each.sum(tuple(range(1, each.ndim)))


def token_losses(task: Task, outputs: Any, labels: Array, batch: Batch) -> Array:
    """Returns each label's loss, zero where it does not count, in nats."""
    each = task.loss(outputs, labels)
    real = jnp.asarray(batch.real_B).reshape(-1, *[1] * (each.ndim - 1))
    return jnp.where(task.counts(batch.inputs) & real, each, 0)


def read_loss(
    task: Task,
    layers: Sequence[Layer],
    reading: Reading,
    labels: Labels,
    params: Params,
    batch: Batch,
    given: Mapping[str, Any],
    passes: int = 0,
) -> dict[str, Any]:
    """Returns a reading of the layers in the gradient of the examples' summed losses.

    Averaged over the draws of labels. The reading's `common` is the counted positions
    of the batch, `[B, T]` or `[B, 1]`.

    Args:
      task: the model and its loss.
      layers: the layers to read.
      reading: what to compute.
      labels: where labels come from.
      params: the model's parameters.
      batch: some examples.
      given: by the layers' `reads`, arrays for the reading.
      passes: how many passes drew labels before, so that this one draws others.
    """
    program = trace(task.outputs, params, batch.inputs)
    counted = task.counted(batch.inputs) & batch.real_B[:, None]

    start, draws = passes * labels.draws, jnp.arange(labels.draws, dtype=jnp.uint32)

    def drawn(outputs, draw):
        found = labels(task, outputs, batch, start + draw)
        return losses(task, outputs, found, batch).sum()

    def loss(outputs):
        if labels.draws == 1:
            return drawn(outputs, draws[0])
        return jax.vmap(drawn, (None, 0))(outputs, draws)

    inputs = batch.inputs
    _, found = read(program, layers, reading, loss, params, inputs, given, counted)
    return found


def draw(keys: Array, logits: Array) -> Array:
    """Returns one class per distribution, drawn by inverting its cumulative sum.

    One uniform number a draw, where the Gumbel trick takes one a class.

    Args:
      keys: `[...]`.
      logits: `[..., V]`.
    """
    p = jnp.cumsum(jax.nn.softmax(logits.astype(wide(logits.dtype)), axis=-1), axis=-1)
    u = jax.vmap(lambda key: jax.random.uniform(key, dtype=p.dtype))(keys.ravel())
    below = p <= u.reshape(*keys.shape, 1) * p[..., -1:]
    return jnp.minimum(below.sum(-1), logits.shape[-1] - 1)


def _check_segments(inputs: Inputs, ids: Sequence[str]) -> None:
    segments, counts = (np.asarray(inputs[k]) for k in ("segments", "counts"))
    before, after = segments[:, :-1], segments[:, 1:]
    # Documents of one number must be one stretch, and padding the last.
    torn = np.argwhere((after != 0) & ((before == 0) | (after < before)))
    if len(torn):
        row, place = torn[0]
        raise ValueError(
            f"Sequence {ids[row]!r} goes from document {segments[row, place]} to "
            f"{segments[row, place + 1]} after position {place}. Number the documents "
            "of a row from 1 on in their order; only the padding at its end is 0."
        )
    lost = np.argwhere(counts.astype(bool) & (segments == 0))
    if len(lost):
        row, place = lost[0]
        raise ValueError(
            f"Sequence {ids[row]!r} has a token that counts at position {place}, which "
            "belongs to no document. Give it a document's number, or let it not count."
        )


def _last(segments_BxT: Array) -> Array:
    """Returns which positions are the last of their document, `[B, T]`."""
    ends = segments_BxT[:, 1:] != segments_BxT[:, :-1]
    return jnp.pad(ends, ((0, 0), (0, 1)), constant_values=True)


def _fold(key: Array, words: Array) -> Array:
    for word in words:
        key = jax.random.fold_in(key, word)
    return key


def _next(x_BxT: Array) -> Array:
    return jnp.pad(x_BxT[:, 1:], ((0, 0), (0, 1)))
