"""How well a language model continues a text it is given."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.model.examples import Examples
from influence.model.task import LanguageModel
from influence.types import Inputs, Params


class Continuation(NamedTuple):
    """How a model continues one prompt with one completion.

    Attributes:
      log_p: `log p(completion | prompt)`, in nats.
      unigram: the completion's log-probability by token frequencies alone, in nats.
      greedy: whether each of its tokens is the model's likeliest.
    """

    log_p: float
    unigram: float
    greedy: bool

    @property
    def gain(self) -> float:
        """Returns how much better than token frequencies the model does, in nats."""
        return self.log_p - self.unigram


def continuations(
    task: LanguageModel, params: Params, examples: Examples, frequencies_V: np.ndarray
) -> list[Continuation]:
    """Returns how the model continues each prompt.

    Args:
      task: the language model.
      params: its parameters.
      examples: prompts and completions, as `prompted` makes them.
      frequencies_V: how often each token occurs in the training data.
    """
    inputs = examples.inputs
    log_p, best = (np.asarray(x) for x in _predictions(task, params, inputs))
    counts, labels = np.asarray(task.counts(inputs)), np.asarray(task.labels(inputs))
    share = (frequencies_V + 1) / (frequencies_V + 1).sum()
    return [
        Continuation(
            float(log_p[i][counts[i]].sum()),
            float(np.log(share[labels[i][counts[i]]]).sum()),
            bool((best[i] == labels[i])[counts[i]].all()),
        )
        for i in range(len(counts))
    ]


def frequencies(tokens: Sequence[Sequence[int]], vocabulary: int) -> np.ndarray:
    """Returns how often each token id occurs, `[V]`."""
    return np.bincount(
        np.concatenate([np.asarray(x) for x in tokens]), minlength=vocabulary
    )


@jax.jit(static_argnums=0)
def _predictions(
    task: LanguageModel, params: Params, inputs: Inputs
) -> tuple[Array, Array]:
    """Returns each next token's log-probability and the likeliest one, `[B, T]`."""
    outputs = task.outputs(params, inputs)
    return -task.loss(outputs, task.labels(inputs)), jnp.argmax(outputs, -1)
