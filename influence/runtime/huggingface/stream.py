"""Weights on their way from a file to a device, one tensor at a time."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.model.config import Config
from influence.runtime.huggingface.layouts import Layout
from influence.runtime.huggingface.table import Entry
from influence.runtime.huggingface.tensors import DTYPES, Stored

Place = jax.Device | jax.sharding.Sharding | None
"""Where arrays go: a device, a sharding, or wherever JAX puts them."""


def pick_dtype(wanted: Any, stored: Iterable[Stored]) -> np.dtype:
    """Returns the type of the weights here: the one wanted, or else the stored one.

    Raises:
      ValueError: if weights are stored as numbers of another kind, or in several types
        and none is wanted; or if the type is none of this device's.
    """
    odd = next((x for x in stored if x.dtype not in DTYPES), None)
    if odd is not None:
        raise ValueError(
            f"{odd.name} in {odd.path} is stored as {odd.dtype}, which can't be read "
            f"as weights. Supported are {', '.join(DTYPES)}; quantised models are not."
        )
    kinds = sorted({DTYPES[x.dtype] for x in stored})
    if wanted is None and len(kinds) > 1:
        raise ValueError(
            f"The weights are stored in several types, {', '.join(kinds)}. Say in "
            f"which to hold them: dtype={kinds[-1]!r}."
        )
    return check_dtype(kinds[0] if wanted is None else wanted)


def check_dtype(wanted: Any) -> np.dtype:
    """Returns a type of weights.

    Raises:
      ValueError: if it is none of floats, or none of this device's.
    """
    try:
        name = jnp.dtype(wanted).name
    except TypeError:
        name = str(wanted)
    if name not in DTYPES.values():
        raise ValueError(
            f"Weights can't be held as {name}. Choose one of "
            f"{', '.join(DTYPES.values())}."
        )
    if jax.dtypes.canonicalize_dtype(name) != name:
        raise ValueError(
            f"{name} does not exist on this device as JAX is set up. Take float32, or "
            "turn it on first: `jax.config.update('jax_enable_x64', True)`, or "
            "JAX_ENABLE_X64=1 in the environment."
        )
    return jnp.dtype(name)


def read(
    config: Config,
    plan: Iterable[tuple[Entry, Stored]],
    like: Mapping[str, Any],
    place: Place,
) -> dict[str, Array]:
    """Returns parameters by their paths.

    The tensors of a stack of blocks are written one by one into an array that is whole
    from the beginning.

    Args:
      config: what they are of.
      plan: which tensors to read.
      like: the shape and type of each parameter.
      place: where it goes.
    """
    arrays: dict[str, Array] = {}
    for entry, stored in plan:
        kind = like[entry.ours[0]].dtype
        tensor = jax.device_put(stored.read(), place)
        if entry.block is None:
            new = _cut(entry.layout, config, kind, tensor)
        else:
            stacks = tuple(
                arrays.pop(x)
                if x in arrays
                else jnp.zeros(like[x].shape, kind, device=place)
                for x in entry.ours
            )
            new = _put(entry.layout, config, stacks, tensor, entry.block)
        arrays.update(zip(entry.ours, new, strict=True))
        # Not to read ahead of the device, tensor after tensor.
        jax.block_until_ready(new)
    return arrays


@partial(jax.jit, static_argnums=(0, 1, 2))
def _cut(layout: Layout, config: Config, kind: Any, tensor: Array) -> tuple[Array, ...]:
    return tuple(x.astype(kind) for x in layout.cut(config, tensor))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _put(
    layout: Layout,
    config: Config,
    stacks: tuple[Array, ...],
    tensor: Array,
    block: int,
) -> tuple[Array, ...]:
    parts = layout.cut(config, tensor)
    return tuple(
        stack.at[block].set(part.astype(stack.dtype))
        for stack, part in zip(stacks, parts, strict=True)
    )


def unread(
    config: Config, plan: Iterable[Entry], leaves: Mapping[str, Array]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields tensors as a checkpoint has them, from parameters by their paths."""
    for entry in plan:
        ours = [leaves[x] for x in entry.ours]
        if entry.block is not None:
            ours = [x[entry.block] for x in ours]
        tensor = entry.layout.join(config, ours)
        yield entry.theirs, np.ascontiguousarray(np.asarray(tensor))
