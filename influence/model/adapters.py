"""Low-rank adapters put beside a decoder's weights, and worked into them."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from influence.linalg.contract import contract
from influence.model.config import FUSED, Adapter, Config
from influence.model.transformer import shapes
from influence.types import Params, named_leaves, with_leaves


def added(
    config: Config, params: Params, adapters: Sequence[Adapter], key: Array
) -> tuple[Config, Params]:
    """Returns the decoder with new adapters beside its weights.

    It computes what the other does until they are trained: `A` is random, `B` zero.

    Args:
      config: the decoder's facts.
      params: its parameters.
      adapters: those to add.
      key: of the random factors.

    Example:
      >>> from influence.model import adapters
      >>> from influence.model.config import Adapter
      >>> wanted = [Adapter("mlp.down", rank=2, scale=1.0)]
      >>> more, beside = adapters.added(config, weights, wanted, jax.random.key(0))
      >>> beside["blocks"]["mlp"]["down"]["lora"]["a"].shape
      (2, 24, 2)
    """
    wide = replace(config, adapters=(*config.adapters, *adapters))
    leaves = dict(named_leaves(params))
    kind = leaves["norm.scale"].dtype
    for path, like in named_leaves(shapes(wide, kind)).items():
        key, own = jax.random.split(key)
        if path.endswith(".lora.a") and path not in leaves:
            scale = like.shape[-2] ** -0.5
            leaves[path] = scale * jax.random.normal(own, like.shape, kind)
        elif path not in leaves:
            leaves[path] = jnp.zeros(like.shape, kind)
    return wide, with_leaves(shapes(wide, kind), leaves)


def merged(config: Config, params: Params) -> tuple[Config, Params]:
    """Returns the decoder whose weights are `W + scale A B`, without adapters.

    It computes what the other does. Its layers are fewer: in `W + A B` neither factor
    has a gradient of its own.

    Example:
      >>> from influence.model import adapters
      >>> from influence.model.config import Adapter
      >>> wanted = [Adapter("mlp.down", rank=2, scale=1.0)]
      >>> more, beside = adapters.added(config, weights, wanted, jax.random.key(0))
      >>> plain, same = adapters.merged(more, beside)
      >>> plain == config
      True
    """
    leaves = dict(named_leaves(params))
    for adapter in config.adapters:
        place = f"blocks.{adapter.layer}"
        a, b = leaves[f"{place}.lora.a"], leaves[f"{place}.lora.b"]
        whole_LxIxO = adapter.scale * contract("lir,lro->lio", a, b)
        for module, change in _changes(config, place, whole_LxIxO).items():
            kernel = leaves[f"{module}.kernel"]
            total = kernel.astype(change.dtype) + change
            leaves[f"{module}.kernel"] = total.astype(kernel.dtype)
    plain = replace(config, adapters=())
    return plain, with_leaves(shapes(plain), leaves)


def _changes(config: Config, place: str, whole_LxIxO: Array) -> dict[str, Array]:
    """Returns what an adapter adds to each of the weights it stands beside."""
    if place != f"blocks.{FUSED}":
        return {place: whole_LxIxO}
    queries, keys = (x * config.features for x in (config.heads, config.groups))
    parts = jnp.split(whole_LxIxO, [queries, queries + keys], axis=-1)
    return {f"{place}.{x}": y for x, y in zip(("query", "key", "value"), parts)}  # noqa: B905
