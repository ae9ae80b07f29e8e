"""Continuing token sequences with what a model predicts."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.model.task import draw
from influence.types import Params


def generate(
    apply: Callable[[Params, Array], Array],
    params: Params,
    prompts: Sequence[Sequence[int]],
    length: int,
    *,
    stop: int | None = None,
    temperature: float = 0.0,
    key: Array | None = None,
) -> list[list[int]]:
    """Returns what the model makes of each prompt, the prompt left out.

    Every step runs the model on whole sequences: slower than keeping keys and values,
    and the same for any model that looks only back, edited in whatever way.

    Args:
      apply: the model.
      params: its parameters.
      prompts: token ids, of any lengths.
      length: how many tokens are added at most.
      stop: the token after which a sequence ends.
      temperature: what logits are divided by before a token is drawn; 0 takes the
        likeliest token.
      key: of the draws, if there are any.

    Raises:
      ValueError: if a prompt is empty, or tokens are to be drawn without a key.

    Example:
      >>> from influence.model.generate import generate
      >>> generate(apply, params, [[1, 2], [7, 6, 5]], 3)
      [[3, 4, 5], [4, 3, 2]]
    """
    lengths = np.array([len(x) for x in prompts])
    if not len(lengths) or not lengths.min():
        raise ValueError(
            "A prompt is empty, or there is none: a model continues one token or more. "
            "Give the start-of-text token."
        )
    if temperature and key is None:
        raise ValueError(
            f"Tokens can't be drawn at temperature {temperature} without a key. Pass "
            "`key=jax.random.key(0)`, or temperature 0."
        )
    tokens = np.zeros((len(lengths), lengths.max() + length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    keys = None
    if temperature and key is not None:
        keys = jax.random.split(key, len(lengths))
    start = jnp.asarray(lengths)
    run = partial(_generate, apply, length, temperature)
    made = np.asarray(run(params, jnp.asarray(tokens), start, keys))
    cut = [row[n : n + length].tolist() for row, n in zip(made, lengths, strict=True)]
    return [x[: x.index(stop) + 1] if stop in x else x for x in cut]


@jax.jit(static_argnums=(0, 1, 2))
def _generate(
    apply: Callable[[Params, Array], Array],
    length: int,
    temperature: float,
    params: Params,
    tokens_BxT: Array,
    start_B: Array,
    keys_B: Array | None,
) -> Array:
    """Returns the tokens with `length` more of each row in their places."""
    row = jnp.arange(len(tokens_BxT))

    def step(i: Array, tokens: Array) -> Array:
        logits_BxV = apply(params, tokens)[row, start_B + i - 1]
        if keys_B is None:
            new = jnp.argmax(logits_BxV, axis=-1)
        else:
            own = jax.vmap(jax.random.fold_in, (0, None))(keys_B, i)
            new = draw(own, logits_BxV / temperature)
        return tokens.at[row, start_B + i].set(new.astype(tokens.dtype))

    return jax.lax.fori_loop(0, length, step, tokens_BxT)
