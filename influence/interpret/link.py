"""Features and influence, joined in three ways.

1. *Data → features*: which features are on more often in a query's most influential
   sequences than in their like, in which as much goes on (`enriched`), and which
   kinds of token carry the influence (`pooled`).
2. *Feature → data*: a feature's pre-activation on chosen tokens is a measurement like
   any other (`Activity`): the engine ranks sequences for it.
3. *Query ↔ features ↔ data*: with `g = ∂q/∂x` at a site and `x = Σ z_f d_f + …`, the
   part of a query's gradient that goes through feature `f` is that of
   `Σ_t (g_t · d_f) z_ft`, the weights held fixed (`through`): a measurement as well, of
   which each sequence's score is the influence that goes through the feature.

Letters: `N` sequences, `F` features, `P` permutations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.attribution.measurements import Likelihood
from influence.fold import Fold
from influence.interpret.dictionary import Dictionary, encode, pre_activations
from influence.interpret.source import Source
from influence.model.sites import Address, read, replaced
from influence.model.task import LanguageModel
from influence.types import Batch, Inputs, Params

AT_ONCE = 1 << 26
"""Numbers that are gathered at a time for permutations."""


class Activities(NamedTuple):
    """How much each feature is on in each sequence.

    Attributes:
      on_NxF: at how many tokens.
      sum_NxF: its activations times the length of its decoder row, summed over tokens:
        how much it writes.
      tokens_N: how many tokens count.
    """

    on_NxF: np.ndarray
    sum_NxF: np.ndarray
    tokens_N: np.ndarray

    @property
    def rate_NxF(self) -> np.ndarray:
        """Returns the share of tokens at which each feature is on."""
        return self.on_NxF / np.maximum(self.tokens_N, 1)[:, None]


def activities(source: Source, dictionary: Dictionary, site: Address) -> Fold:
    """Returns the pass over sequences that ends in their `Activities`."""

    @jax.jit
    def look(params: Params, dictionary: Dictionary, batch: Batch) -> Activities:
        rows, keep = source.values((site,), params, batch)
        z = jnp.where(keep[:, None], encode(dictionary, rows[site]), 0)
        z = z.reshape(len(batch.real_B), -1, z.shape[-1])
        tokens = keep.reshape(len(batch.real_B), -1).sum(1)
        length = jnp.linalg.norm(dictionary.decoder_FxO, axis=1)
        written = z.sum(1) * length[None]
        return Activities((z > 0).sum(1), written, tokens)  # type: ignore[arg-type]

    def update(state: list[Activities], batch: Batch) -> list[Activities]:
        found = look(source.params, dictionary, batch)
        real = np.asarray(batch.real_B)
        return [*state, Activities(*(np.asarray(x)[real] for x in found))]

    def finish(state: list[Activities]) -> Activities:
        return Activities(*(np.concatenate(x) for x in zip(*state, strict=True)))

    return Fold("activations of features", list, update, finish)


class Enrichment(NamedTuple):
    """How much more often features are on in some sequences than in their like.

    Attributes:
      rate_F: the mean share of tokens at which each feature is on in the sequences.
      base_F: the same in sequences alike.
      lift_F: the one over the other; 1 where a feature is on in neither.
      more_F: by how much more each feature writes at a token of the sequences than at
        one of sequences alike.
      p_F: how often a random choice of sequences alike stands out as much by any of
        the features: corrected for their number (Westfall and Young 1993).
    """

    rate_F: np.ndarray
    base_F: np.ndarray
    lift_F: np.ndarray
    more_F: np.ndarray
    p_F: np.ndarray

    def first(self, count: int, level: float = 1.0) -> list[int]:
        """Returns the most enriched features: by p-value, and then by what they write.

        Where several stand out from all random choices, that order puts what the
        sequences are mostly made of before what only happens to come along with it.

        Args:
          count: how many at most.
          level: of features with a larger p-value, none.
        """
        order = np.lexsort((-self.more_F, self.p_F))
        return [int(i) for i in order[:count] if self.p_F[i] <= level]


def enriched(
    activities: Activities,
    chosen: Sequence[int] | np.ndarray,
    *,
    strata: int = 10,
    permutations: int = 1000,
    seed: int = 0,
) -> Enrichment:
    """Returns which features are over-represented in some sequences.

    Against chance, as many sequences are drawn from the same strata of overall
    activity, features on a token: sequences in which much goes on have more of
    everything. For the p-values, how far a feature stands out is counted in its
    standard deviations over the permutations.

    Args:
      activities: of all sequences the chosen ones are compared with, and of them.
      chosen: places of the sequences in question.
      strata: into how many equal parts of overall activity sequences are sorted.
      permutations: how many random choices; the smallest p-value is one over one more.
      seed: of the choices.

    Raises:
      ValueError: if there is nothing to compare with.
    """
    rate, places = activities.rate_NxF, np.asarray(chosen, int)
    if not len(places) or len(rate) < 2 * len(places):
        raise ValueError(
            f"{len(places)} of {len(rate)} sequences are to be compared with the "
            "others. Choose at least one, and half of them at most."
        )
    stratum = _strata(rate.sum(1), strata)
    draws = _draws(stratum, places, permutations, np.random.default_rng(seed))
    null_PxF = _means(rate, draws)
    observed, base, spread = rate[places].mean(0), null_PxF.mean(0), null_PxF.std(0)
    spread = np.where(spread > 0, spread, np.inf)
    far = (observed - base) / spread
    farthest = ((null_PxF - base) / spread).max(1)
    p = (1 + (farthest[:, None] >= far).sum(0)) / (1 + permutations)
    lift = np.divide(observed, base, out=np.ones_like(base), where=base > 0)
    lift = np.where((base == 0) & (observed > 0), np.inf, lift)
    written = activities.sum_NxF / np.maximum(activities.tokens_N, 1)[:, None]
    more = written[places].mean(0) - _alike(written, stratum, places)
    return Enrichment(observed, base, lift, more, p)


def _alike(x_NxF: np.ndarray, stratum_N: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Returns the mean over random choices of as many rows from each stratum, `[F]`."""
    each = zip(*np.unique(stratum_N[places], return_counts=True), strict=True)
    parts = [count * x_NxF[stratum_N == stratum].mean(0) for stratum, count in each]
    return np.sum(parts, axis=0) / len(places)


def _strata(activity_N: np.ndarray, count: int) -> np.ndarray:
    """Returns the part of sequences each is in, of parts equally large."""
    rank = np.argsort(np.argsort(activity_N, kind="stable"), kind="stable")
    return rank * count // len(rank)


def _draws(
    stratum_N: np.ndarray, places: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns choices of as many sequences from each stratum, `[P, chosen]`."""
    parts = []
    for stratum, wanted in zip(
        *np.unique(stratum_N[places], return_counts=True), strict=True
    ):
        members = np.flatnonzero(stratum_N == stratum)
        lots = rng.random((count, len(members)))
        parts.append(members[np.argpartition(lots, wanted - 1)[:, :wanted]])
    return np.concatenate(parts, axis=1)


def _means(rate_NxF: np.ndarray, draws_PxK: np.ndarray) -> np.ndarray:
    """Returns the mean of each choice of rows, `[P, F]`."""
    each = max(1, AT_ONCE // (draws_PxK.shape[1] * rate_NxF.shape[1]))
    parts = range(0, len(draws_PxK), each)
    return np.concatenate([rate_NxF[draws_PxK[i : i + each]].mean(1) for i in parts])


class Pooled(NamedTuple):
    """Influence by the features that are on at the tokens that carry it.

    Attributes:
      sum_F: the scores of all tokens at which each feature is on.
      tokens_F: how many these are.
    """

    sum_F: np.ndarray
    tokens_F: np.ndarray


def pooled(scores_NxT: np.ndarray, on_NxTxF: np.ndarray) -> Pooled:
    """Returns which kinds of token carry influence.

    Args:
      scores_NxT: each token's score; they sum to the sequence's.
      on_NxTxF: which features are on.
    """
    return Pooled(
        np.einsum("nt,ntf->f", scores_NxT, on_NxTxF.astype(scores_NxT.dtype)),
        on_NxTxF.sum((0, 1)),
    )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["encoder_D", "bias", "inputs", "weights_BxT"],
    meta_fields=["task", "site"],
)
@dataclass(frozen=True)
class Activity:
    """A measurement: a feature's pre-activation, summed over tokens with weights.

    The pre-activation, not the activation: the one's gradient is the other's where the
    feature is on, and does not vanish where it is not. All features of one site share
    one compilation.

    Attributes:
      task: the language model.
      site: what the dictionary reads.
      encoder_D: by which the feature is read.
      bias: added to it.
      inputs: the sequences.
      weights_BxT: of their tokens.
    """

    task: LanguageModel
    site: Address
    encoder_D: Array
    bias: Array
    inputs: Inputs
    weights_BxT: Array

    def __call__(self, params: Params) -> Array:
        """Returns `Σ w_t (x_t · W_enc + b_enc)`."""
        x = read(self.task.outputs, (self.site,))(params, self.inputs)[self.site]
        pre = x.astype(self.encoder_D.dtype) @ self.encoder_D + self.bias
        return (self.weights_BxT * pre).sum()


def activity(
    task: LanguageModel,
    dictionary: Dictionary,
    site: Address,
    feature: int,
    inputs: Inputs,
    weights_BxT: Array | np.ndarray,
) -> Activity:
    """Returns the measurement of a feature on tokens.

    Raises:
      ValueError: if there is no such feature, or no token has a weight.
    """
    check_feature(dictionary, feature)
    weights = jnp.asarray(weights_BxT, dictionary.encoder_DxF.dtype)
    if not jnp.abs(weights).sum() > 0:
        raise ValueError(
            f"No token is chosen to measure feature {feature} on: all weights are 0. "
            "Choose tokens at which it is on, or other features."
        )
    return Activity(
        task,
        site,
        dictionary.encoder_DxF[:, feature],
        dictionary.encoder_bias_F[feature],
        jax.tree.map(jnp.asarray, inputs),
        weights,
    )


def check_feature(dictionary: Dictionary, feature: int) -> None:
    """Raises for a feature that a dictionary does not have."""
    if not 0 <= feature < dictionary.width:
        raise ValueError(
            f"There is no feature {feature}: the dictionary has {dictionary.width}, 0 "
            f"to {dictionary.width - 1}."
        )


class Path(NamedTuple):
    """A feature that a query's influence goes through.

    Attributes:
      feature: which.
      effect: `Σ_t (g_t · d_f) z_ft`: what the query would lose, to first order, without
        the feature.
      measurement: whose scores are the influence that goes through it.
    """

    feature: int
    effect: float
    measurement: Activity


def through(
    query: Likelihood,
    params: Params,
    dictionary: Dictionary,
    site: Address,
    count: int,
) -> list[Path]:
    """Returns the features a query's influence goes through, the strongest first.

    The weights of each feature's measurement are `(g_t · d_f) ∂z_ft/∂pre_ft`, held
    fixed. Summed over all features, with what the dictionary leaves out, the gradients
    of these measurements are the part of the query's gradient that passes the site.

    Args:
      query: a completion's log-probability.
      params: the model's parameters.
      dictionary: an autoencoder of the site.
      site: where.
      count: how many features at most; only those that are on can carry anything.

    Raises:
      ValueError: if the dictionary writes elsewhere than it reads.
    """
    if dictionary.reads != dictionary.writes:
        raise ValueError(
            f"The dictionary reads {dictionary.reads} numbers and writes "
            f"{dictionary.writes}. Influence is followed through autoencoders."
        )
    task: Any = query.task
    found = _paths(task, site, query, params, dictionary)
    effect = np.asarray(found.effect_F)
    order = [int(i) for i in np.argsort(-np.abs(effect))[:count] if effect[i] != 0]
    return [
        Path(
            i,
            float(effect[i]),
            activity(task, dictionary, site, i, query.inputs, found.weights_FxBxT[i]),
        )
        for i in order
    ]


class _Paths(NamedTuple):
    effect_F: Array
    weights_FxBxT: Array


@jax.jit(static_argnums=(0, 1))
def _paths(
    task: LanguageModel,
    site: Address,
    query: Likelihood,
    params: Params,
    dictionary: Dictionary,
) -> _Paths:
    x = read(task.outputs, (site,))(params, query.inputs)[site]
    g = jax.grad(lambda x: _from_site(query, site, params, x))(x)
    x, g = (
        x.astype(dictionary.encoder_DxF.dtype),
        g.astype(dictionary.encoder_DxF.dtype),
    )
    pre = pre_activations(dictionary, x)
    z, slope = jax.jvp(dictionary.activation, (pre,), (jnp.ones_like(pre),))
    along = g @ dictionary.decoder_FxO.T
    weights = jnp.moveaxis(along * slope, -1, 0)
    return _Paths((along * z).sum((0, 1)), weights)


def _from_site(query: Likelihood, site: Address, params: Params, x: Array) -> Array:
    """Returns the query's value with something in the place of a site's value."""
    task: Any = query.task
    edited = replace(task, apply=replaced(task.apply, {site: lambda _: x}))
    return Likelihood(edited, query.inputs)(params)
