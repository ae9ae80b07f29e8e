"""Many devices as one: which of them holds what, and which examples each works on.

Devices stand in a mesh with two axes. Examples are dealt out along `data`; parameters,
statistics, curvature and queries are cut along `model`. `jax.jit` does the rest: what
has to go between devices follows from where arrays are.

    what                               along data     along model
    parameters [..., I, O]             everywhere     columns, or else rows
    covariances, Λ [*stack, O, I]      one lane each  rows, or else columns
    eigenvectors [*stack, N, N]        everywhere     columns, or else rows
    queries [*stack, Q, O, I]          everywhere     rows, or else columns
    a batch [B, …]                     examples       everywhere

An axis that the number of devices does not divide is not cut. The sums of a pass are
kept in lanes (`influence.fold.lanes`), one for each row of the mesh, and joined when
the pass ends: between two batches nothing goes along `data`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from influence.types import Batch

DATA, MODEL = "data", "model"
"""The axes of a mesh."""

MATRICES = ("lam_OxI", "h_QxOxI", "left_QxOxR", "right_QxIxR")
"""Fields of curvatures and queries whose last axes are a layer's outputs and inputs."""

Device = Any
"""One of JAX's devices."""

COLUMNS, ROWS = (-1, -2), (-2, -1)
"""Which of the last two axes is cut, the better first."""


@runtime_checkable
class Parted(Protocol):
    """Batches of which some rows alone can be read."""

    def rows(self, which: Sequence[int], done: int) -> Iterator[Batch]:
        """Walks batches, of each only some rows; those beyond its end are filled up.

        Args:
          which: the places of the rows within a batch.
          done: how many batches are left out.
        """
        ...


class Share(NamedTuple):
    """Which part of every batch a process reads.

    Attributes:
      lanes: the rows of the mesh that devices of the process are in.
      number: which of all shares it is.
      count: how many shares there are; processes may have the same.
      first: whether the process is the first of those with this share.
    """

    lanes: tuple[int, ...]
    number: int
    count: int
    first: bool


@dataclass(frozen=True)
class Layout:
    """Devices in a mesh.

    Attributes:
      mesh: with the axes `data` and `model`.

    Example:
      >>> from influence.runtime.driver import Driver
      >>> from influence.runtime.mesh import layout
      >>> all_ = layout()  # or, of eight devices, layout(data=4, model=2)
      >>> here, driver = all_.shard(params), Driver(quiet, layout=all_)
      >>> fitted = influence.fit(
      ...     task, here, batches, layers="block.*", run=driver.run
      ... )
      >>> asked = all_.shard(influence.query(fitted, here, measurements))
      >>> again = influence.scan(task, here, asked, batches, run=driver.run)
      >>> np.testing.assert_allclose(again.total, scores.total, rtol=1e-3, atol=1e-3)
    """

    mesh: Mesh

    @property
    def lanes(self) -> int:
        """Returns how many examples are worked on beside one another."""
        return self.mesh.shape[DATA]

    @property
    def devices(self) -> list[Device]:
        """Returns all devices."""
        return list(self.mesh.devices.flat)

    @property
    def several(self) -> bool:
        """Returns whether devices of other processes belong to it."""
        return len({x.process_index for x in self.devices}) > 1

    @cached_property
    def share(self) -> Share:
        """Returns which part of every batch this process reads.

        Raises:
          ValueError: if processes have some but not all lanes in common.
        """
        own: dict[int, set[int]] = {}
        for lane, row in enumerate(self.mesh.devices):
            for device in row:
                own.setdefault(device.process_index, set()).add(lane)
        shares = sorted({tuple(sorted(x)) for x in own.values()})
        whole = sum(map(len, shares)) == self.lanes
        if not whole or len({*map(len, shares)}) > 1:
            raise ValueError(
                f"The rows of the mesh {dict(self.mesh.shape)} do not end where "
                f"processes do: {own}. Give a `model` axis that divides a process's "
                "devices, or is a multiple of them."
            )
        here = jax.process_index()
        mine = tuple(sorted(own[here]))
        first = min(k for k, x in own.items() if tuple(sorted(x)) == mine)
        return Share(mine, shares.index(mine), len(shares), first == here)

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Returns where an array is whose axes are cut so."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def cut(
        self, shape: Sequence[int], order: Sequence[int], *lead: str
    ) -> NamedSharding:
        """Returns how an array is cut along the model axis.

        Args:
          shape: of the array.
          order: of the last two axes, which is cut rather.
          lead: what the axes before them are cut along.
        """
        axes: list[str | None] = [*lead, *[None] * (len(shape) - len(lead))]
        size = self.mesh.shape[MODEL]
        inner = len(shape) - len(lead)
        for axis in order if inner > 1 and size > 1 else ():
            if shape[axis] and shape[axis] % size == 0:
                axes[axis] = MODEL
                break
        return self.sharding(*axes)

    def shard(self, tree: Any) -> Any:
        """Returns parameters, a curvature or queries, cut along the model axis.

        Example:
          >>> from influence.runtime.mesh import layout
          >>> where = layout().shard(params)["head"].sharding
          >>> where.mesh.axis_names
          ('data', 'model')
        """
        done: dict[int, Array] = {}

        def place(path: Any, x: Any) -> Array:
            # Layers that read one activation have one basis, and keep to one.
            if id(x) not in done:
                done[id(x)] = put(path, x)
            return done[id(x)]

        def put(path: Any, x: Any) -> Array:
            own = getattr(path[-1], "name", "") if path else ""
            order = ROWS if own in MATRICES else COLUMNS
            where = self.cut(np.shape(x), order)
            if not self.several or (
                isinstance(x, Array) and not x.is_fully_addressable
            ):
                return jax.device_put(x, where)
            # Every process has all of it, and need not ask whether others have too.
            whole = np.asarray(x)
            return jax.make_array_from_callback(whole.shape, where, whole.__getitem__)

        return jax.tree_util.tree_map_with_path(place, tree)

    def state(self, like: Any) -> Any:
        """Returns where the arrays of a state without lanes are, of their shapes."""
        return jax.tree.map(lambda x: self.cut(x.shape, ROWS), like)

    def laned(self, like: Any) -> Any:
        """Returns where the arrays of a state with lanes are, of their shapes."""
        return jax.tree.map(lambda x: self.cut(x.shape, ROWS, DATA), like)

    def parts(self, batches: Any, done: int, size: int) -> Iterator[Batch]:
        """Walks batches, of each the rows of this process's share; others are not read.

        Rows are added to a batch until lanes are equally long; they count nowhere.

        Args:
          batches: the batches.
          done: how many of them are left out.
          size: how many rows they have.
        """
        each = -(-size // self.lanes)
        own = [lane * each + i for lane in self.share.lanes for i in range(each)]
        if isinstance(batches, Parted):
            return batches.rows(own, done)
        return map(partial(_some, own), islice(iter(batches), done, None))

    def spread(self, part: Batch) -> Batch:
        """Returns a batch over all devices; of it this process has its share."""
        rows = len(part.real_B) // len(self.share.lanes) * self.lanes
        return jax.tree.map(lambda x: self._along_data(np.asarray(x), rows), part)

    def in_lanes(self, part: Batch) -> Batch:
        """Returns the same with lanes as an axis in front, `[lanes, B / lanes, …]`."""
        own = len(self.share.lanes)

        def place(x: Any) -> Array:
            x = np.asarray(x)
            lanes = x.reshape(own, len(x) // own, *x.shape[1:])
            return self._along_data(lanes, self.lanes)

        return jax.tree.map(place, part)

    def _along_data(self, x: np.ndarray, length: int) -> Array:
        where = self.sharding(DATA)
        return jax.make_array_from_process_local_data(where, x, (length, *x.shape[1:]))

    def whole(self, x: Any) -> np.ndarray:
        """Returns all of an array, in every process. All of them have to ask for it."""
        if isinstance(x, Array) and not x.is_fully_addressable:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    def own(self, x: Array) -> np.ndarray:
        """Returns those rows of an array along `data` that this process has read."""
        if not self.several:
            return np.asarray(x)
        along = jax.jit(_same, out_shardings=self.sharding(DATA))(x)
        pieces = {y.index[0].start or 0: y.data for y in along.addressable_shards}
        return np.concatenate([np.asarray(pieces[i]) for i in sorted(pieces)])

    def at(self, x: Array, device: Device) -> Array | None:
        """Returns a copy of an array on one device; None if it is another process's.

        Every process has to ask for it.
        """
        if not self.several:
            return jax.device_put(x, device)
        everywhere = jax.jit(_same, out_shardings=self.sharding())(x)
        pieces = [y.data for y in everywhere.addressable_shards if y.device == device]
        return pieces[0] if pieces else None

    def from_one(self, x: Array | None, like: Any) -> Array:
        """Returns what one device has, cut along the model axis, its columns rather.

        Args:
          x: the array; None in processes that do not have it.
          like: its shape and type.
        """
        where = self.cut(like.shape, COLUMNS)
        if not self.several:
            return jax.device_put(x, where)
        # Every device adds something, and all but one of them nothing.
        flat = Mesh(self.mesh.devices.reshape(-1), ("all",))
        ours = [y for y in self.devices if y.process_index == jax.process_index()]
        there = None if x is None else next(iter(x.devices()))
        none = np.zeros((1, *like.shape), like.dtype)
        pieces = [
            x[None] if x is not None and y == there else jax.device_put(none, y)
            for y in ours
        ]
        every = jax.make_array_from_single_device_arrays(
            (len(self.devices), *like.shape),
            NamedSharding(flat, PartitionSpec("all")),
            pieces,
        )
        return jax.jit(_total, out_shardings=where)(every)


def layout(
    data: int | None = None,
    model: int = 1,
    devices: Sequence[Device] | None = None,
) -> Layout:
    """Returns devices laid out in `data` rows of `model` each.

    Args:
      data: how many examples are worked on beside one another; as many as there are
        devices for if left out.
      model: how many devices parameters and curvature are cut over.
      devices: which; those of all processes if left out.

    Raises:
      ValueError: if there are not as many devices, or some would be left over.

    Example:
      >>> from influence.runtime.mesh import layout
      >>> layout().lanes == len(jax.devices())
      True
    """
    found = list(jax.devices() if devices is None else devices)
    rows = max(1, len(found) // max(model, 1)) if data is None else data
    if rows < 1 or model < 1 or rows * model != len(found):
        raise ValueError(
            f"A mesh of {rows} × {model} takes {rows * model} devices, and there are "
            f"{len(found)}. Give two numbers whose product is {len(found)}."
        )
    axes = (AxisType.Auto, AxisType.Auto)
    return Layout(jax.make_mesh((rows, model), (DATA, MODEL), axes, devices=found))


def laid_out(shape: tuple[int, int] | None) -> Layout | None:
    """Returns the devices of a mesh, all in rows if left out; None if there is but one.

    Raises:
      ValueError: if the mesh does not have as many devices as there are.
    """
    if shape is None and len(jax.devices()) == 1:
        return None
    return layout() if shape is None else layout(*shape)


def one_device() -> Layout:
    """Returns this process's first device as a mesh."""
    return layout(1, 1, jax.local_devices()[:1])


def gathered(layout: Layout | None, tree: Any) -> Any:
    """Returns a pytree all of whose arrays are here, in the leading process at least.

    Array by array, so that others never have more than one of them whole. All processes
    have to ask for it.
    """
    if layout is None or not layout.several:
        return tree

    def here(x: Any) -> Any:
        whole = layout.whole(x)
        return whole if jax.process_index() == 0 else np.zeros(0, whole.dtype)

    return jax.tree.map(here, tree)


def dealt(costs: Sequence[float], count: int) -> list[int]:
    """Returns to which of some workers each piece of work goes.

    The costliest first, always to whoever has least: at most a third more for any
    worker than at best (Graham 1969).

    Example:
      >>> from influence.runtime.mesh import dealt
      >>> dealt([1, 8, 1, 3, 3], 2)
      [1, 0, 1, 1, 1]
    """
    loads, found = [0.0] * count, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[i] = min(range(count), key=loads.__getitem__)
        loads[found[i]] += costs[i]
    return found


def _some(which: Sequence[int], batch: Batch) -> Batch:
    """Returns some rows of a batch; beyond its end the first, which counts nowhere."""
    rows, count = np.asarray(which), len(batch.real_B)
    if count == len(rows) and (rows == np.arange(count)).all():
        return batch
    places = np.where(rows < count, rows, 0)
    some = jax.tree.map(lambda x: np.asarray(x)[places], batch)
    return some._replace(real_B=some.real_B & (rows < count))


def _same(x: Any) -> Any:
    return x


def _total(x: Array) -> Array:
    return x.sum(0, dtype=x.dtype)
