"""Values of many sequences mixed: a buffer on the device, shuffled with every pour."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from influence.interpret.source import Centre
from influence.model.sites import Address


class Buffer(NamedTuple):
    """Values at the sites, shuffled.

    Attributes:
      rows: by site, `[C, D]`, the first of them filled.
      filled: how many.
      key: of the next shuffle.
    """

    rows: dict[Address, Array]
    filled: Array
    key: Array


def empty(centre: Mapping[Address, Centre], room: int, key: Array) -> Buffer:
    """Returns a buffer for so many values at sites, none of them there yet."""
    rows = {
        k: jnp.zeros((room, len(x.mean_D)), x.mean_D.dtype) for k, x in centre.items()
    }
    return Buffer(rows, jnp.zeros((), jnp.int32), jax.random.key_data(key))


def poured(
    buffer: Buffer,
    rows: Mapping[Address, Array],
    keep: Array,
    centre: Mapping[Address, Centre],
) -> Buffer:
    """Returns the buffer with the rows that count poured in, and all shuffled."""
    for site, x in rows.items():
        keep = keep & (jnp.linalg.norm(x, axis=1) <= centre[site].limit)
    first = jnp.argsort(~keep, stable=True)
    filled = buffer.filled + keep.sum(dtype=jnp.int32)
    key, own = jax.random.split(jax.random.wrap_key_data(buffer.key))
    room = len(next(iter(buffer.rows.values())))
    lot = jax.random.uniform(own, (room,))
    lot = jnp.where(jnp.arange(room, dtype=jnp.int32) < filled, lot, 2)
    order = jnp.argsort(lot)

    def into(held: Array, x: Array, own: Centre) -> Array:
        x = own.scale * (x - own.mean_D[None])
        filled = jax.lax.dynamic_update_slice_in_dim(held, x[first], buffer.filled, 0)
        return filled[order]

    mixed = {k: into(buffer.rows[k], x, centre[k]) for k, x in rows.items()}
    return Buffer(mixed, filled, jax.random.key_data(key))
