"""Trains dictionaries on what a model computes, as one pass over sequences.

A batch of sequences runs through the model once, up to the last site that is read. The
positions that count go into a buffer on the device, which is shuffled; half of it is
served in batches of tokens to every dictionary in training, half stays to be mixed with
what comes next. Buffer, dictionaries and their optimizers are the pass's state, so that
a pass that was interrupted goes on to the same bits.

What is read is centred and scaled, `x' = s (x − μ)` with a mean square length of `D`: a
mean that is large beside the spread is what lets features die (arXiv 2605.31518). Both
are folded into the finished dictionary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from influence.fold import Fold
from influence.interpret.dictionary import Dictionary, unit
from influence.interpret.kinds import Kind, Learned
from influence.linalg.contract import wide
from influence.linalg.largest import keep_largest_of_all
from influence.model.sites import Address, read
from influence.model.task import LanguageModel
from influence.types import Batch, Batches, Params

OUTLIER = 10.0
"""A value longer than so many times the median is left out: attention sinks, mostly."""

SLOWEST = 0.05
"""How much the running mean of the least activation takes in of a step, at least."""


@dataclass(frozen=True)
class Schedule:
    """How long dictionaries are trained, and how fast.

    Attributes:
      steps: how many updates.
      batch: tokens an update.
      rate: the highest of Adam; `2e-4 / √(F / 2¹⁴)` if left out (Gao et al. 2024).
      warmup: the share of steps over which the rate rises.
      decay: the share of steps over which it falls to zero at the end.
      dead_after: tokens after which a feature that was never on counts as dead; the
        48th part of all, and ten million at most, if left out.
      auxiliary: how much weight dead features' learning from what the others leave over
        has. Gao et al. give it 1/32; in trainings of a few million tokens that leaves
        several times as many dead as this does.
      clip: the largest norm of a gradient.
    """

    steps: int
    batch: int = 2048
    rate: float | None = None
    warmup: float = 0.05
    decay: float = 0.2
    dead_after: int | None = None
    auxiliary: float = 1 / 4
    clip: float = 1.0

    @property
    def tokens(self) -> int:
        """Returns how many tokens all updates take."""
        return self.steps * self.batch

    @property
    def dead(self) -> int:
        """Returns the number of tokens after which a feature counts as dead."""
        return self.dead_after or max(self.batch, min(self.tokens // 48, 10_000_000))

    def optimizer(self, width: int) -> optax.GradientTransformation:
        """Returns Adam on the schedule."""
        highest = self.rate or 2e-4 / (width / 2**14) ** 0.5
        rising = max(1, round(self.warmup * self.steps))
        falling = max(1, round(self.decay * self.steps))
        rates = optax.join_schedules(
            [
                optax.linear_schedule(0.0, highest, rising),
                optax.linear_schedule(highest, 0.0, falling),
            ],
            [max(rising, self.steps - falling)],
        )
        return optax.chain(optax.clip_by_global_norm(self.clip), optax.adam(rates))


@dataclass(frozen=True)
class Aim:
    """What is trained.

    Attributes:
      site: what is read.
      width: how many features.
      kind: how it is made sparse.
      writes: what is to be reconstructed, if not what is read: a transcoder's.
      skip: whether a transcoder has a linear map beside its features.
      aligned: whether every feature's encoder and decoder have an inner product of 1,
        as those of a feature that reads what it writes do (arXiv 2605.18629).
    """

    site: Address
    width: int
    kind: Kind
    writes: Address | None = None
    skip: bool = False
    aligned: bool = False

    @property
    def target(self) -> Address:
        """Returns the site that is reconstructed."""
        return self.writes or self.site


class Examples(Protocol):
    """Sequences that can be taken in any order, in memory or not."""

    def __len__(self) -> int:
        """Returns how many there are."""
        ...

    def take(self, places: np.ndarray) -> "Examples":
        """Returns some of them, in an order."""
        ...

    def batches(self, size: int) -> Batches:
        """Returns them in batches."""
        ...


@dataclass(frozen=True)
class Epochs:
    """Batches of sequences, again and again, each time in another order.

    Attributes:
      examples: the sequences.
      size: how many make a batch.
      batches: how many batches in all.
      seed: of the orders.
    """

    examples: Examples
    size: int
    batches: int
    seed: int = 0

    def __len__(self) -> int:
        """Returns the number of batches."""
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        """Walks the batches; every epoch's last one may not be full."""
        whole = (self._epoch(i) for i in count())
        return islice(chain.from_iterable(whole), self.batches)

    def _epoch(self, number: int) -> Batches:
        rng = np.random.default_rng([self.seed, number])
        order = rng.permutation(len(self.examples))
        return self.examples.take(order).batches(self.size)


class Centre(NamedTuple):
    """What values at a site are brought to the middle and to one size by.

    Attributes:
      mean_D: their mean.
      scale: what brings their mean square length to `D`.
      limit: the length above which a value is left out.
    """

    mean_D: Array
    scale: Array
    limit: Array


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


class Member(NamedTuple):
    """A dictionary in training.

    Attributes:
      learned: what is trained.
      optimizer: the optimizer's state.
      idle_F: tokens since each feature was last on.
      edge: the running mean of the least activation that was on.
      loss: the running mean of the share of variance that is not explained.
    """

    learned: Learned
    optimizer: Any
    idle_F: Array
    edge: Array
    loss: Array


class State(NamedTuple):
    """Dictionaries in training, and what they are about to see.

    Attributes:
      buffer: values at their sites.
      members: by name.
      step: updates so far.
    """

    buffer: Buffer
    members: dict[str, Member]
    step: Array


class Trained(NamedTuple):
    """What came of training.

    Attributes:
      dictionary: the dictionary, all that was done to values folded in.
      steps: updates it saw; fewer than planned if the sequences did not suffice.
      dead: the share of features that count as dead at the end.
      unexplained: the share of variance that was not explained lately, in training.
    """

    dictionary: Dictionary
    steps: int
    dead: float
    unexplained: float


@dataclass(frozen=True)
class Source:
    """Where values come from.

    Attributes:
      task: the language model.
      params: its parameters.
      special: token ids at which nothing is read.
    """

    task: LanguageModel
    params: Params
    special: tuple[int, ...] = ()

    def values(self, sites: Sequence[Address], params: Params, batch: Batch) -> Any:
        """Returns values at sites, `[B T, D]` each, and which rows count.

        A position counts if a label can be reached from it and it is not special.
        """
        found = read(self.task.outputs, sites)(params, batch.inputs)
        keep = self.task.counted(batch.inputs) & jnp.asarray(batch.real_B)[:, None]
        tokens = batch.inputs["tokens"]
        for id_ in self.special:
            keep = keep & (tokens != id_)
        rows = {
            k: x.reshape(-1, x.shape[-1]).astype(wide(x.dtype))
            for k, x in found.items()
        }
        return rows, keep.reshape(-1)


def centres(source: Source, sites: Sequence[Address]) -> Fold:
    """Returns the pass that finds the middle and the size of values, by site.

    A few thousand positions are enough: walk over the first batches only. The state is
    those positions.
    """

    @jax.jit
    def look(params: Params, batch: Batch) -> Any:
        return source.values(sites, params, batch)

    def update(state: list[Any], batch: Batch) -> list[Any]:
        rows, keep = look(source.params, batch)
        keep = np.asarray(keep)
        return [*state, {k: np.asarray(x)[keep] for k, x in rows.items()}]

    def finish(state: list[Any]) -> dict[Address, Centre]:
        if not state or not sum(len(x[sites[0]]) for x in state):
            raise ValueError(
                "There is no position to learn from: all tokens are padding or "
                "special. Give a corpus with text."
            )
        return {k: _centre(np.concatenate([x[k] for x in state])) for k in sites}

    return Fold("centres", list, update, finish)


def _centre(rows_NxD: np.ndarray) -> Centre:
    length = np.linalg.norm(rows_NxD, axis=1)
    if not np.isfinite(length).all():
        raise ValueError(
            f"{(~np.isfinite(length)).sum()} of {len(length)} values at a site are not "
            "finite. Does the model's own loss come out finite on this corpus?"
        )
    limit = OUTLIER * np.median(length)
    kept = rows_NxD[length <= limit]
    mean = kept.mean(0)
    square = ((kept - mean) ** 2).sum(1).mean()
    if square <= 0:
        raise ValueError(
            f"All {len(kept)} values at a site are the same: there is nothing to learn."
        )
    scale = (rows_NxD.shape[1] / square) ** 0.5
    kind = rows_NxD.dtype
    return Centre(*(jnp.asarray(np.asarray(x, kind)) for x in (mean, scale, limit)))


def fold(
    source: Source,
    aims: Mapping[str, Aim],
    centre: Mapping[Address, Centre],
    schedule: Schedule,
    *,
    tokens: int,
    seed: int = 0,
) -> Fold:
    """Returns the pass over sequences that trains, ending in `{name: Trained}`.

    Args:
      source: the model that is read.
      aims: what is trained, by name; all see the same tokens in the same order.
      centre: of every site, as `centres` found it.
      schedule: how long, and how fast.
      tokens: positions of a batch of sequences, padding included.
      seed: of the start and of the order.

    Raises:
      ValueError: if an aim can't be trained.
    """
    sites = tuple(dict.fromkeys(y for x in aims.values() for y in (x.site, x.target)))
    for name, aim in aims.items():
        _check(name, aim, centre)
    room = 2 * max(tokens + schedule.batch, 8 * schedule.batch)

    def init() -> State:
        rows = {
            k: jnp.zeros((room, len(centre[k].mean_D)), centre[k].mean_D.dtype)
            for k in sites
        }
        keys = jax.random.split(jax.random.key(seed), len(aims) + 1)
        data = jax.random.key_data(keys[0])
        members = {
            name: _begin(aim, centre, schedule, key)
            for (name, aim), key in zip(aims.items(), keys[1:], strict=True)
        }
        zero = jnp.zeros((), jnp.int32)
        begun = State(Buffer(rows, zero, data), members, zero)
        return jax.tree.map(jnp.copy, begun)  # consumed: no array may be in it twice

    train = partial(_serve, tuple(aims.items()), schedule)

    @partial(jax.jit, donate_argnums=0)
    def update(state: State, params: Params, centre: Any, batch: Batch) -> State:
        rows, keep = source.values(sites, params, batch)
        buffer = _poured(state.buffer, rows, keep, centre)
        return train(state._replace(buffer=buffer), room // 2)

    drain = jax.jit(partial(train, keep=0))

    def finish(state: State) -> dict[str, Trained]:
        state = drain(state)
        return {
            name: _trained(aim, centre, schedule, state, state.members[name])
            for name, aim in aims.items()
        }

    return Fold(
        "dictionaries",
        init,
        lambda state, batch: update(state, source.params, dict(centre), batch),
        finish,
    )


def _check(name: str, aim: Aim, centre: Mapping[Address, Centre]) -> None:
    aim.kind.check(aim.width)
    reads, writes = (len(centre[x].mean_D) for x in (aim.site, aim.target))
    if aim.width < 1:
        raise ValueError(f"The dictionary {name!r} has {aim.width} features. Give one.")
    if aim.skip and aim.writes is None:
        raise ValueError(
            f"The dictionary {name!r} reconstructs what it reads; with a linear map "
            "beside it, it would learn nothing else. Leave `skip` to transcoders."
        )
    if aim.aligned and reads != writes:
        raise ValueError(
            f"The dictionary {name!r} reads {reads} numbers and writes {writes}: "
            "encoders and decoders can be aligned only where these are equal."
        )


def _begin(
    aim: Aim, centre: Mapping[Address, Centre], schedule: Schedule, key: Array
) -> Member:
    """Returns a dictionary as it begins: encoder and decoder the same directions."""
    reads, writes = (len(centre[x].mean_D) for x in (aim.site, aim.target))
    kind = centre[aim.site].mean_D.dtype
    one, other = jax.random.split(key)
    decoder = _rows_of_one(jax.random.normal(one, (aim.width, writes), kind))
    encoder = decoder
    if reads != writes:
        encoder = _rows_of_one(jax.random.normal(other, (aim.width, reads), kind))
    learned = {
        "encoder_DxF": encoder.T,
        "bias_F": jnp.zeros(aim.width, kind),
        "decoder_FxO": decoder if aim.kind.unit else 0.1 * decoder,
        "decoder_bias_O": jnp.zeros(writes, kind),
        **{k: x.astype(kind) for k, x in aim.kind.learned(aim.width).items()},
    }
    if aim.skip:
        learned["skip_OxD"] = jnp.zeros((writes, reads), kind)
    learned = _spread(learned)
    zero = jnp.zeros((), kind)
    started = schedule.optimizer(aim.width).init(learned)
    return Member(learned, started, jnp.zeros(aim.width, kind), zero, zero + 1)


def _spread(learned: Learned) -> Learned:
    """Returns a dictionary spread over the devices along its features."""
    devices = jax.devices()
    width = len(learned["bias_F"])
    if len(devices) == 1 or width % len(devices):
        return learned
    mesh = jax.sharding.Mesh(np.array(devices), ("features",))

    def along(name: str, x: Array) -> Array:
        axes = ["features" if letter == "F" else None for letter in _axes(name)]
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    return {name: along(name, x) for name, x in learned.items()}


def _axes(name: str) -> list[str]:
    """Returns the letters of a name's axes."""
    return name.rpartition("_")[2].split("x")


def _rows_of_one(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def _poured(
    buffer: Buffer, rows: Mapping[Address, Array], keep: Array, centre: Any
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


def _serve(
    aims: Sequence[tuple[str, Aim]], schedule: Schedule, state: State, keep: int
) -> State:
    """Returns dictionaries trained on all of the buffer but so many rows."""

    def more(state: State) -> Array:
        left = state.buffer.filled - schedule.batch
        return (left >= keep) & (state.step < schedule.steps)

    def step(state: State) -> State:
        rest = state.buffer.filled - schedule.batch
        rows = {
            k: jax.lax.dynamic_slice_in_dim(x, rest, schedule.batch)
            for k, x in state.buffer.rows.items()
        }
        members = {
            name: _step(aim, schedule, state.members[name], state.step, rows)
            for name, aim in aims
        }
        return State(state.buffer._replace(filled=rest), members, state.step + 1)

    return jax.lax.while_loop(more, step, state)


def _step(
    aim: Aim,
    schedule: Schedule,
    member: Member,
    step: Array,
    rows: Mapping[Address, Array],
) -> Member:
    """Returns a dictionary after one update."""
    x, y = rows[aim.site], rows[aim.target]
    progress = step.astype(x.dtype) / schedule.steps
    dead = member.idle_F >= schedule.dead

    def loss(learned: Learned) -> tuple[Array, tuple[Array, Array]]:
        return _loss(aim, schedule, learned, x, y, progress, dead)

    (_, (z, unexplained)), gradient = jax.value_and_grad(loss, has_aux=True)(
        member.learned
    )
    if aim.kind.unit:
        gradient["decoder_FxO"] = _across(
            gradient["decoder_FxO"], member.learned["decoder_FxO"]
        )
    # Optimizers mix the types of schedules, counters and parameters.
    with jax.numpy_dtype_promotion("standard"):
        updates, optimizer = schedule.optimizer(aim.width).update(
            gradient, member.optimizer, member.learned
        )
        learned: Any = optax.apply_updates(member.learned, updates)
    if aim.kind.unit:
        learned["decoder_FxO"] = _rows_of_one(learned["decoder_FxO"])
    idle = jnp.where((z > 0).any(0), 0, member.idle_F + len(z))
    least = jnp.where(z > 0, z, jnp.inf).min()
    lately = jnp.maximum(SLOWEST, 1 / (step.astype(x.dtype) + 1))
    return Member(
        learned,
        optimizer,
        idle,
        member.edge + lately * (jnp.where(least < jnp.inf, least, 0) - member.edge),
        member.loss + lately * (unexplained - member.loss),
    )


def _loss(
    aim: Aim,
    schedule: Schedule,
    learned: Learned,
    x_BxD: Array,
    y_BxO: Array,
    progress: Array,
    dead_F: Array,
) -> tuple[Array, tuple[Array, Array]]:
    """Returns the loss, and beside it activations and the share not explained."""
    pre = x_BxD @ _encoder(aim, learned) + learned["bias_F"][None]
    found = aim.kind.features(learned, pre, progress)
    base = learned["decoder_bias_O"][None]
    if aim.skip:
        base = base + x_BxD @ learned["skip_OxD"].T
    left, losses, start = y_BxO - base, [], 0
    for stop in aim.kind.prefixes(aim.width):
        part = found.z_BxF[:, start:stop] @ learned["decoder_FxO"][start:stop]
        left, start = left - part, stop
        losses.append((left * left).sum(1).mean())
    total = sum(losses[1:], losses[0]) / len(losses) + found.penalty
    if found.alone_BxF is not None:
        fixed = jax.lax.stop_gradient((learned["decoder_FxO"], base))
        alone = y_BxO - found.alone_BxF @ fixed[0] - fixed[1]
        total = total + (alone * alone).sum(1).mean()
    if aim.kind.revives and schedule.auxiliary:
        total = total + schedule.auxiliary * jax.lax.cond(
            dead_F.any(),
            _revival,
            lambda *_: jnp.zeros((), pre.dtype),
            pre,
            dead_F,
            left,
            learned["decoder_FxO"],
        )
    spread = jax.lax.stop_gradient(y_BxO - y_BxO.mean(0, keepdims=True))
    return total, (found.z_BxF, losses[-1] / (spread * spread).sum(1).mean())


def _encoder(aim: Aim, learned: Learned) -> Array:
    """Returns the encoder as it is used, `[D, F]`."""
    encoder, decoder = learned["encoder_DxF"], learned["decoder_FxO"].T
    if not aim.aligned:
        return encoder
    along = (encoder * decoder).sum(0, keepdims=True)
    return encoder + (1 - along) * decoder / (decoder * decoder).sum(0, keepdims=True)


def _revival(pre: Array, dead_F: Array, left: Array, decoder_FxO: Array) -> Array:
    """Returns how badly dead features explain what the others leave (AuxK).

    Gao et al. 2024, appendix A.2, the largest taken of the batch. What is left is not
    differentiated, and the decoder's bias is in it already. Weighed as the loss is.
    """
    left = jax.lax.stop_gradient(left)
    pre = jnp.where(dead_F[None], jax.nn.relu(pre), 0)
    z = keep_largest_of_all(pre, len(pre) * max(1, left.shape[1] // 2))
    missed = left - z @ decoder_FxO
    share = (missed * missed).sum() / jnp.maximum((left * left).sum(), 1e-12)
    return left.shape[1] * share


def _across(gradient_FxO: Array, rows_FxO: Array) -> Array:
    """Returns a gradient without its part along rows of length one."""
    along = (gradient_FxO * rows_FxO).sum(1, keepdims=True)
    return gradient_FxO - along * rows_FxO


def _trained(
    aim: Aim,
    centre: Mapping[Address, Centre],
    schedule: Schedule,
    state: State,
    member: Member,
) -> Trained:
    learned = {**member.learned, "encoder_DxF": _encoder(aim, member.learned)}
    made = Dictionary(
        learned["encoder_DxF"],
        learned["bias_F"],
        learned["decoder_FxO"],
        learned["decoder_bias_O"],
        aim.kind.activation(learned, member.edge),
        learned.get("skip_OxD"),
    )
    whole = unit(folded(made, centre[aim.site], centre[aim.target]))
    dead = float((member.idle_F >= schedule.dead).mean())
    return Trained(whole, int(state.step), dead, float(member.loss))


def folded(dictionary: Dictionary, reads: Centre, writes: Centre) -> Dictionary:
    """Returns a dictionary of centred and scaled values as one of values as they are.

    Its activations are the same, and its reconstructions those of `y`, not `y'`.
    """
    encoder = reads.scale * dictionary.encoder_DxF
    decoder = dictionary.decoder_FxO / writes.scale
    bias = writes.mean_D + dictionary.decoder_bias_O / writes.scale
    skip = dictionary.skip_OxD
    if skip is not None:
        skip = skip * reads.scale / writes.scale
        bias = bias - skip @ reads.mean_D
    return Dictionary(
        encoder,
        dictionary.encoder_bias_F - reads.mean_D @ encoder,
        decoder,
        bias,
        dictionary.activation,
        skip,
    )
