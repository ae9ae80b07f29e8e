"""What the features of a dictionary are: where they are on, and what they say.

Two passes over sequences. The first (`survey`) keeps, for every feature, the sequences
in which it is on the most and a random draw of those in which it is on at all; the
second (`windows`) what it does around those places.

Letters: `F` features, `K` examples of a feature, `W` tokens of a window, `E` bins.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.fold import Fold
from influence.interpret.dictionary import Dictionary, encode
from influence.interpret.source import Source
from influence.model.sites import Address, addresses, replaced
from influence.model.task import LanguageModel
from influence.types import Batch, Params

BINS = 40
"""Bins of a histogram of activations, two to an octave."""

FINAL = Address("resid_final")
"""The site that the model's predictions are made from."""


class Places(NamedTuple):
    """Some places for every feature.

    Attributes:
      value_FxK: the feature's activation there; 0 where there is none.
      sequence_FxK: the place of the sequence among all.
      token_FxK: the position in it.
      order_FxK: what they were chosen by, the largest first.
    """

    value_FxK: Any
    sequence_FxK: Any
    token_FxK: Any
    order_FxK: Any


class Survey(NamedTuple):
    """Where features are on.

    Attributes:
      tokens: how many were looked at.
      on_F: at how many of them each feature is on.
      sum_F: its activations, summed.
      maximum_F: its largest activation.
      counts_FxE: its activations by size.
      edges: of the bins, one more than there are.
      top: where it is on the most, a place a sequence.
      drawn: of the sequences in which it is on, a random draw.
    """

    tokens: Any
    on_F: Any
    sum_F: Any
    maximum_F: Any
    counts_FxE: Any
    edges: Any
    top: Places
    drawn: Places

    @property
    def density_F(self) -> np.ndarray:
        """Returns the share of tokens at which each feature is on."""
        return np.asarray(self.on_F) / max(1, int(self.tokens))


class _State(NamedTuple):
    """A survey, part way, and how many sequences were seen."""

    survey: Survey
    seen: Array


def survey(
    source: Source,
    dictionary: Dictionary,
    site: Address,
    *,
    top: int = 16,
    drawn: int = 24,
    scale: float = 1.0,
    seed: int = 0,
) -> Fold:
    """Returns the pass over sequences that ends in a `Survey`.

    Args:
      source: the model.
      dictionary: the dictionary.
      site: what it reads.
      top: how many sequences of a feature's largest activations are kept.
      drawn: how many are drawn of all in which it is on.
      scale: what activations are about as large as: the middle of the histogram.
      seed: of the draw.
    """
    width, kind = dictionary.width, dictionary.encoder_DxF.dtype

    def init() -> _State:
        zeros = jnp.zeros(width, kind)
        edges = scale * 2.0 ** ((np.arange(BINS + 1) - 0.75 * BINS) / 2)
        begun = Survey(
            jnp.zeros((), jnp.int32),
            zeros,
            zeros,
            zeros,
            jnp.zeros((width, BINS), kind),
            jnp.asarray(edges, kind),
            _none(width, top, kind),
            _none(width, drawn, kind),
        )
        return _State(begun, jnp.zeros((), jnp.int32))

    @jax.jit
    def look(
        state: _State, params: Params, dictionary: Dictionary, batch: Batch
    ) -> _State:
        rows, keep = source.values((site,), params, batch)
        z = jnp.where(keep[:, None], encode(dictionary, rows[site]), 0)
        key = jax.random.fold_in(jax.random.key(seed), state.seen)
        real = jnp.asarray(batch.real_B)
        found = _surveyed(state.survey, z, keep, real, state.seen, key)
        return _State(found, state.seen + real.sum(dtype=jnp.int32))

    return Fold(
        "survey of features",
        init,
        lambda state, batch: look(state, source.params, dictionary, batch),
        lambda state: jax.tree.map(np.asarray, state.survey),
    )


def _none(width: int, count: int, kind: Any) -> Places:
    places = jnp.zeros((width, count), jnp.int32)
    none = jnp.zeros((width, count), kind)
    return Places(none, places, places, none)


def _surveyed(
    now: Survey, z_NxF: Array, keep_N: Array, real_B: Array, seen: Array, key: Array
) -> Survey:
    """Returns a survey with a batch's activations, `N = B T`, in it."""
    z = z_NxF.reshape(len(real_B), -1, z_NxF.shape[-1])
    value, token = z.max(1), z.argmax(1).astype(jnp.int32)
    sequence = seen + jnp.cumsum(real_B, dtype=jnp.int32) - 1
    lot = jax.random.uniform(key, value.shape, value.dtype, 1e-6, 1)
    place = jnp.broadcast_to(sequence[:, None], value.shape)
    here = Places(value.T, place.T, token.T, value.T)
    chance = here._replace(order_FxK=jnp.where(value > 0, lot, 0).T)
    return Survey(
        now.tokens + keep_N.sum(dtype=jnp.int32),
        now.on_F + (z_NxF > 0).sum(0).astype(z.dtype),
        now.sum_F + z_NxF.sum(0),
        jnp.maximum(now.maximum_F, z_NxF.max(0)),
        now.counts_FxE + _histogram(z_NxF, now.edges),
        now.edges,
        _best(now.top, here),
        _best(now.drawn, chance),
    )


def _best(now: Places, more: Places) -> Places:
    """Returns the places of the largest orders among some and more."""
    both = Places(*(jnp.concatenate(x, 1) for x in zip(now, more, strict=True)))
    order, at = jax.lax.top_k(both.order_FxK, now.order_FxK.shape[1])
    value, sequence, token = (jnp.take_along_axis(x, at, 1) for x in both[:3])
    return Places(value, sequence, token, order)


def _histogram(z_NxF: Array, edges: Array) -> Array:
    """Returns how many activations of each feature are in each bin, `[F, E]`.

    What is beyond the outer edges is in the outer bins; what is off is in none.
    """
    inner = edges[1:-1]

    def above(edge: Array) -> Array:
        return (z_NxF >= edge).sum(0).astype(z_NxF.dtype)

    on = (z_NxF > 0).sum(0).astype(z_NxF.dtype)
    reached = jnp.stack([on, *jax.lax.map(above, inner), jnp.zeros_like(on)])
    return (reached[:-1] - reached[1:]).T


def windows(
    source: Source,
    dictionary: Dictionary,
    site: Address,
    sequence_FxK: np.ndarray,
    token_FxK: np.ndarray,
    around: int,
) -> Fold:
    """Returns the pass that ends in what features do around places, `[F, K, W]`.

    A window is of `2 · around + 1` tokens, the place in its middle; NaN where there is
    no token. Walk over the same sequences in the same order as for the survey.

    Args:
      source: the model.
      dictionary: the dictionary.
      site: what it reads.
      sequence_FxK: the sequence of each place.
      token_FxK: the position in it.
      around: tokens to either side.
    """
    offsets = np.arange(-around, around + 1)

    @jax.jit
    def look(params: Params, dictionary: Dictionary, batch: Batch) -> Array:
        rows, keep = source.values((site,), params, batch)
        z = jnp.where(keep[:, None], encode(dictionary, rows[site]), jnp.nan)
        return z.reshape(len(batch.real_B), -1, z.shape[-1])

    def init() -> tuple[np.ndarray, int]:
        return np.full((*sequence_FxK.shape, len(offsets)), np.nan, np.float32), 0

    def update(state: tuple[np.ndarray, int], batch: Batch) -> tuple[np.ndarray, int]:
        found, seen = state
        count = int(np.asarray(batch.real_B).sum())
        here = (sequence_FxK >= seen) & (sequence_FxK < seen + count)
        if here.any():
            z = np.asarray(look(source.params, dictionary, batch))
            feature, example = np.nonzero(here)
            rows = sequence_FxK[here] - seen
            at = token_FxK[here][:, None] + offsets[None]
            inside = (at >= 0) & (at < z.shape[1])
            read = z[rows[:, None], np.clip(at, 0, z.shape[1] - 1), feature[:, None]]
            found[feature, example] = np.where(inside, read, np.nan)
        return found, seen + count

    return Fold("examples of features", init, update, lambda state: state[0])


class Words(NamedTuple):
    """Which tokens features make likelier, and which less likely.

    Attributes:
      promoted_FxK: token ids, the most promoted first.
      up_FxK: by how much a unit of the feature raises their logits.
      suppressed_FxK: token ids, the most suppressed first.
      down_FxK: by how much it changes theirs.
    """

    promoted_FxK: np.ndarray
    up_FxK: np.ndarray
    suppressed_FxK: np.ndarray
    down_FxK: np.ndarray


def words(
    source: Source,
    dictionary: Dictionary,
    inputs: Mapping[str, Any],
    count: int = 10,
) -> Words | None:
    """Returns the tokens that features promote and suppress, or None.

    By the direct path: what a step along the decoder row would change if it were added
    right before the predictions are made, the last norm linearised there (the *logit
    lens*), averaged over positions and with the mean over tokens taken off.

    Args:
      source: the model; None is returned if it has no site `resid_final`.
      dictionary: whose decoder rows are followed.
      inputs: a few sequences.
      count: how many tokens either way.
    """
    outputs, params = source.task.outputs, source.params
    if FINAL.name not in addresses(outputs, params, inputs):
        return None
    final = source.values((FINAL,), params, _batch_of(inputs))[0][FINAL]
    if final.shape[-1] != dictionary.writes:
        return None
    found = [
        _promoted(
            source.task, params, inputs, final, dictionary.decoder_FxO[i : i + 64]
        )
        for i in range(0, dictionary.width, 64)
    ]
    logits = np.concatenate([np.asarray(x) for x in found])
    order = np.argsort(logits, axis=1)
    up, down = order[:, ::-1][:, :count], order[:, :count]
    return Words(
        up,
        np.take_along_axis(logits, up, 1),
        down,
        np.take_along_axis(logits, down, 1),
    )


def _batch_of(inputs: Mapping[str, Any]) -> Batch:
    count = len(inputs["tokens"])
    return Batch(dict(inputs), np.zeros((count, 2), np.uint32), np.ones(count, bool))


@partial(jax.jit, static_argnums=0)
def _promoted(
    task: LanguageModel, params: Params, inputs: Any, final_NxD: Array, rows_FxO: Array
) -> Array:
    """Returns what decoder rows do to logits, `[F, V]`."""
    shape = (*inputs["tokens"].shape, final_NxD.shape[-1])

    def logits(x: Array) -> Array:
        there = {FINAL: lambda _: x.reshape(shape)}
        return replaced(task.outputs, there)(params, inputs)

    def along(row: Array) -> Array:
        tangent = jnp.broadcast_to(row, final_NxD.shape)
        change = jax.jvp(logits, (final_NxD,), (tangent,))[1].mean((0, 1))
        return change - change.mean()

    return jax.lax.map(along, rows_FxO)


def nearest(dictionary: Dictionary, count: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Returns each feature's most similar features and their cosines, `[F, K]`."""
    rows = dictionary.decoder_FxO
    rows = rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    count = min(count, dictionary.width - 1)

    @jax.jit
    def close(part: Array, first: Array) -> tuple[Array, Array]:
        own = first + jnp.arange(len(part), dtype=first.dtype)
        cosine = (part @ rows.T).at[own - first, own].set(-2)
        return jax.lax.top_k(cosine, count)

    found = [
        close(rows[i : i + 1024], jnp.asarray(i)) for i in range(0, len(rows), 1024)
    ]
    cosines, places = (
        np.concatenate([np.asarray(x) for x in y]) for y in zip(*found, strict=True)
    )
    return places, cosines
