"""A model whose activations are known: each token has a vector of its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from influence.fold import run
from influence.interpret.source import Centre, Source, centres
from influence.model.examples import Examples, sequences
from influence.model.sites import Address
from influence.model.task import LanguageModel

SITE = Address("value")


def apply(params: Any, tokens_BxT: Array) -> Array:
    """Returns logits: each token's vector, seen through a matrix."""
    x = checkpoint_name(params["table"][tokens_BxT], "value")
    y = checkpoint_name(jnp.tanh(x @ params["inner"]), "image")
    return (x + y) @ params["out"]


def model(table: np.ndarray, seed: int = 0) -> Source:
    """Returns the model whose tokens have the rows of a table as their vectors."""
    rng = np.random.default_rng(seed)
    vocabulary, width = table.shape
    params = {
        "table": jnp.asarray(table),
        "inner": jnp.asarray(rng.normal(size=(width, width)) / width**0.5),
        "out": jnp.asarray(rng.normal(size=(width, vocabulary)) / width),
    }
    return Source(LanguageModel(apply), params)


def sparse(
    features: int, width: int, vocabulary: int, on: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns directions, and a table of sparse positive combinations of them."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(features, width))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    z = np.zeros((vocabulary, features))
    for row in z:
        row[rng.choice(features, on, replace=False)] = rng.uniform(0.5, 1.5, on)
    return directions, z @ directions


def examples(vocabulary: int, count: int, length: int, seed: int = 0) -> Examples:
    """Returns sequences of random tokens."""
    rng = np.random.default_rng(seed)
    return sequences(rng.integers(0, vocabulary, (count, length)).tolist())


def centred(source: Source, data: Examples, *sites: Address) -> dict[Address, Centre]:
    """Returns the middle and the size of what is at sites."""
    return run(centres(source, sites or (SITE,)), data.batches(16))


def key(seed: int) -> Array:
    """Returns a key."""
    return jax.random.key(seed)
