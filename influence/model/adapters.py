"""Low-rank adapters worked into the weights they stand beside."""

from dataclasses import replace

import jax.numpy as jnp
from jax import Array

from influence.linalg.contract import contract
from influence.model.config import FUSED, Config
from influence.model.transformer import shapes
from influence.types import Params, named_leaves, with_leaves


def merged(config: Config, params: Params) -> tuple[Config, Params]:
    """Returns the decoder whose weights are `W + scale A B`, without adapters.

    It computes what the other does. Its layers are fewer: in `W + A B` neither factor
    has a gradient of its own.
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
