"""How good a dictionary is: every measure defined once, here.

| measure | definition |
|---|---|
| variance explained | `1 − Σ‖y − ŷ‖² / Σ‖y − ȳ‖²` over all tokens |
| L0 | features on, a token |
| cross-entropy recovered | `(CE_ablated − CE_replaced) / (CE_ablated − CE_clean)` |
| KL | of the clean model's predictions to those with `ŷ` in the place of `y`, nats |
| dead | the share of features that are on at no token |

Ablated is with zeros, or with the mean, in the place of `y`. Positions that do not
count (padding, special tokens) are left as they are in every case.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.fold import Fold
from influence.interpret.dictionary import Dictionary, decode, encode
from influence.interpret.source import Centre, Source
from influence.model.sites import Address, replaced
from influence.model.task import token_losses
from influence.types import Batch, Params


class Sums(NamedTuple):
    """What is added up over tokens.

    Attributes:
      tokens: how many count.
      labels: how many labels count.
      off_O: `Σ (y − m)`, with `m` the mean that is known.
      square: `Σ‖y − m‖²`.
      missed: `Σ‖y − ŷ‖²`.
      on_F: tokens at which each feature is on.
      maximum_F: each feature's largest activation.
      losses_4: cross-entropies: clean, replaced, with zeros, with the mean.
      kl: of all labels.
    """

    tokens: Array
    labels: Array
    off_O: Array
    square: Array
    missed: Array
    on_F: Array
    maximum_F: Array
    losses_4: Array
    kl: Array


@dataclass(frozen=True)
class Quality:
    """How good a dictionary is on some text.

    Attributes:
      tokens: how many were looked at.
      variance_explained: the share of the variance that is.
      l0: features on, a token.
      dead: the share of features that were never on.
      clean: the model's cross-entropy, nats a label.
      replaced: that with reconstructions in the site's place.
      zero: that with zeros.
      mean: that with the mean.
      kl: from the clean predictions to those with reconstructions, nats a label.
      density_F: the share of tokens at which each feature is on.
      maximum_F: each feature's largest activation.
    """

    tokens: int
    variance_explained: float
    l0: float
    dead: float
    clean: float
    replaced: float
    zero: float
    mean: float
    kl: float
    density_F: np.ndarray
    maximum_F: np.ndarray

    @property
    def recovered(self) -> float:
        """Returns the cross-entropy recovered of what zeros cost.

        NaN if they cost nothing, as in a model that is worse than no model.
        """
        return _recovered(self.clean, self.replaced, self.zero)

    @property
    def recovered_of_mean(self) -> float:
        """Returns the cross-entropy recovered of what the mean costs; NaN as above."""
        return _recovered(self.clean, self.replaced, self.mean)

    def densities(self) -> list[tuple[float, int]]:
        """Returns how many features are on how often: `(log₁₀ share, features)`.

        A bin is half a power of ten wide and named by its lower edge; features that
        are never on are not in it.
        """
        alive = np.log10(self.density_F[self.density_F > 0])
        edges = np.arange(np.floor(2 * alive.min()), 1) / 2 if len(alive) else [0.0]
        counts, _ = np.histogram(alive, [*edges, edges[-1] + 0.5])
        return [(float(x), int(n)) for x, n in zip(edges, counts, strict=True)]


def _recovered(clean: float, replaced: float, ablated: float) -> float:
    return (ablated - replaced) / (ablated - clean) if ablated > clean else float("nan")


def fold(
    source: Source,
    dictionary: Dictionary,
    centre: Centre,
    site: Address,
    writes: Address | None = None,
) -> Fold:
    """Returns the pass over sequences that ends in a dictionary's `Quality`.

    Args:
      source: the model.
      dictionary: the dictionary.
      centre: of what is reconstructed; its mean is what the mean ablation puts there.
      site: what the dictionary reads.
      writes: what it reconstructs, if not that.
    """
    target = writes or site

    @jax.jit
    def look(
        state: Sums, params: Params, dictionary: Dictionary, mean_O: Array, batch: Batch
    ) -> Sums:
        return _added(state, source, params, dictionary, mean_O, batch, site, target)

    def init() -> Sums:
        kind = dictionary.decoder_FxO.dtype
        zero, count = jnp.zeros((), kind), jnp.zeros((), jnp.int32)
        features = jnp.zeros(dictionary.width, kind)
        return Sums(
            count,
            count,
            jnp.zeros(dictionary.writes, kind),
            zero,
            zero,
            features,
            features,
            jnp.zeros(4, kind),
            zero,
        )

    def update(state: Sums, batch: Batch) -> Sums:
        return look(state, source.params, dictionary, centre.mean_D, batch)

    return Fold("quality", init, update, _finish)


def _added(
    state: Sums,
    source: Source,
    params: Params,
    dictionary: Dictionary,
    mean_O: Array,
    batch: Batch,
    site: Address,
    target: Address,
) -> Sums:
    """Returns the sums with those of a batch."""
    rows, keep = source.values((site, target), params, batch)
    x, y = rows[site], rows[target]
    z = jnp.where(keep[:, None], encode(dictionary, x), 0)
    guess = decode(dictionary, z, x)
    counts = source.task.counts(batch.inputs) & jnp.asarray(batch.real_B)[:, None]
    labels = source.task.labels(batch.inputs)

    def outputs(instead: Array | None) -> Any:
        if instead is None:
            return source.task.outputs(params, batch.inputs)
        there = jnp.broadcast_to(instead, y.shape)
        edits = {target: lambda own: _placed(own, there, keep)}
        return replaced(source.task.outputs, edits)(params, batch.inputs)

    each = [outputs(x) for x in (None, guess, jnp.zeros_like(y), mean_O[None])]
    losses = [token_losses(source.task, x, labels, batch).sum() for x in each]
    clean, other = (jax.nn.log_softmax(x.astype(guess.dtype), -1) for x in each[:2])
    kl = jnp.where(counts, (jnp.exp(clean) * (clean - other)).sum(-1), 0).sum()
    # About the mean that is known: squares of what is far from 0 would lose digits.
    own, missed = (jnp.where(keep[:, None], y - x, 0) for x in (mean_O[None], guess))
    return Sums(
        state.tokens + keep.sum(dtype=jnp.int32),
        state.labels + counts.sum(dtype=jnp.int32),
        state.off_O + own.sum(0),
        state.square + (own * own).sum(),
        state.missed + (missed * missed).sum(),
        state.on_F + (z > 0).sum(0).astype(z.dtype),
        jnp.maximum(state.maximum_F, z.max(0)),
        state.losses_4 + jnp.stack(losses).astype(z.dtype),
        state.kl + kl,
    )


def _placed(own: Array, there: Array, keep: Array) -> Array:
    """Returns a site's value with rows that count replaced."""
    flat = own.reshape(-1, own.shape[-1])
    return jnp.where(keep[:, None], there.astype(own.dtype), flat).reshape(own.shape)


def _finish(state: Sums) -> Quality:
    found = jax.tree.map(lambda x: np.asarray(x, np.float64), state)
    if not found.tokens or not found.labels:
        raise ValueError(
            "There is no position to judge a dictionary at: all tokens are padding or "
            "special. Give a corpus with text."
        )
    off = found.off_O / found.tokens
    variance = found.square - found.tokens * (off @ off)
    clean, replaced_, zero, average = found.losses_4 / found.labels
    density = found.on_F / found.tokens
    return Quality(
        tokens=int(found.tokens),
        variance_explained=float(1 - found.missed / variance),
        l0=float(density.sum()),
        dead=float((density == 0).mean()),
        clean=float(clean),
        replaced=float(replaced_),
        zero=float(zero),
        mean=float(average),
        kl=float(found.kl / found.labels),
        density_F=density,
        maximum_F=found.maximum_F,
    )


def scrambled(params: Params, seed: int) -> Params:
    """Returns a model of random weights: each array's entries in a random order.

    Dictionaries of such a model look interpretable as well (arXiv 2501.17727), so what
    is said of one has to be said beside it.
    """
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    mixed = [
        jax.random.permutation(key, x.reshape(-1)).reshape(x.shape)
        for key, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, mixed)
