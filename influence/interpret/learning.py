"""How one dictionary learns: from how it begins to what one update makes of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from influence.interpret.kinds import Kind, Learned
from influence.interpret.source import Centre
from influence.linalg.largest import keep_largest_of_all
from influence.model.sites import Address

SLOWEST = 0.05
"""How much the running mean of the least activation takes in of a step, at least."""


@dataclass(frozen=True)
class Schedule:
    """How long dictionaries are trained, and how fast.

    Attributes:
      steps: how many updates.
      batch: tokens an update.
      rate: the highest of Adam; the kind's if left out, divided by `√(F / 2¹⁴)`.
      warmup: the share of steps over which the rate rises.
      decay: the share of steps over which it falls to zero at the end.
      dead_after: tokens after which a feature that was never on counts as dead; the
        hundredth part of all, and ten million at most, if left out.
      auxiliary: how much weight dead features' learning from what the others leave over
        has. Gao et al. give it 1/32, with which more than half of all features stay
        dead in a training of four million tokens.
      clip: the largest norm of a gradient. Most are longer, and so count alike: that
        explains a little more in short trainings than the usual 1, perhaps because the
        long ones of the beginning would set Adam's scale.
    """

    steps: int
    batch: int = 2048
    rate: float | None = None
    warmup: float = 0.05
    decay: float = 0.7
    dead_after: int | None = None
    auxiliary: float = 1 / 2
    clip: float = 0.1

    @property
    def tokens(self) -> int:
        """Returns how many tokens all updates take."""
        return self.steps * self.batch

    @property
    def dead(self) -> int:
        """Returns the number of tokens after which a feature counts as dead."""
        return self.dead_after or max(self.batch, min(self.tokens // 100, 10_000_000))

    def optimizer(self, aim: "Aim") -> optax.GradientTransformation:
        """Returns Adam on the schedule."""
        highest = self.rate or aim.kind.rate / (aim.width / 2**14) ** 0.5
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


def begin(
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
    started = schedule.optimizer(aim).init(learned)
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


def step(
    aim: Aim,
    schedule: Schedule,
    member: Member,
    done: Array,
    rows: Mapping[Address, Array],
) -> Member:
    """Returns a dictionary after one update.

    Args:
      aim: what is trained.
      schedule: how fast.
      member: the dictionary.
      done: updates so far.
      rows: values at the sites, `[B, D]` each.
    """
    x, y = rows[aim.site], rows[aim.target]
    progress = done.astype(x.dtype) / schedule.steps
    dead = member.idle_F >= schedule.dead

    def of(learned: Learned) -> tuple[Array, tuple[Array, Array]]:
        return loss(aim, schedule, learned, x, y, progress, dead)

    (_, (z, unexplained)), gradient = jax.value_and_grad(of, has_aux=True)(
        member.learned
    )
    if aim.kind.unit:
        gradient["decoder_FxO"] = _across(
            gradient["decoder_FxO"], member.learned["decoder_FxO"]
        )
    # Optimizers mix the types of schedules, counters and parameters.
    with jax.numpy_dtype_promotion("standard"):
        updates, optimizer = schedule.optimizer(aim).update(
            gradient, member.optimizer, member.learned
        )
        learned: Any = optax.apply_updates(member.learned, updates)
    if aim.kind.unit:
        learned["decoder_FxO"] = _rows_of_one(learned["decoder_FxO"])
    idle = jnp.where((z > 0).any(0), 0, member.idle_F + len(z))
    least = jnp.where(z > 0, z, jnp.inf).min()
    lately = jnp.maximum(SLOWEST, 1 / (done.astype(x.dtype) + 1))
    return Member(
        learned,
        optimizer,
        idle,
        member.edge + lately * (jnp.where(least < jnp.inf, least, 0) - member.edge),
        member.loss + lately * (unexplained - member.loss),
    )


def loss(
    aim: Aim,
    schedule: Schedule,
    learned: Learned,
    x_BxD: Array,
    y_BxO: Array,
    progress: Array,
    dead_F: Array,
) -> tuple[Array, tuple[Array, Array]]:
    """Returns the loss, and beside it activations and the share not explained."""
    pre = x_BxD @ encoder_of(aim, learned) + learned["bias_F"][None]
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
            revival,
            lambda *_: jnp.zeros((), pre.dtype),
            pre,
            dead_F,
            left,
            learned["decoder_FxO"],
        )
    spread = jax.lax.stop_gradient(y_BxO - y_BxO.mean(0, keepdims=True))
    return total, (found.z_BxF, losses[-1] / (spread * spread).sum(1).mean())


def encoder_of(aim: Aim, learned: Learned) -> Array:
    """Returns the encoder as it is used, `[D, F]`."""
    encoder, decoder = learned["encoder_DxF"], learned["decoder_FxO"].T
    if not aim.aligned:
        return encoder
    along = (encoder * decoder).sum(0, keepdims=True)
    return encoder + (1 - along) * decoder / (decoder * decoder).sum(0, keepdims=True)


def revival(pre: Array, dead_F: Array, left: Array, decoder_FxO: Array) -> Array:
    """Returns how badly dead features explain what the others leave (AuxK).

    Gao et al. 2024, appendix A.2, the largest taken of the batch. What is left is not
    differentiated, and the decoder's bias is in it already. Weighed as the loss is, and
    less if there are fewer dead features than are taken of a token, as in SAELens: a
    few that are rare, not dead, are not bent to explain everything.
    """
    left = jax.lax.stop_gradient(left)
    pre = jnp.where(dead_F[None], jax.nn.relu(pre), 0)
    most = max(1, left.shape[1] // 2)
    z = keep_largest_of_all(pre, len(pre) * most)
    missed = left - z @ decoder_FxO
    share = (missed * missed).sum() / jnp.maximum((left * left).sum(), 1e-12)
    return left.shape[1] * share * jnp.minimum(dead_F.sum() / most, 1)


def _across(gradient_FxO: Array, rows_FxO: Array) -> Array:
    """Returns a gradient without its part along rows of length one."""
    along = (gradient_FxO * rows_FxO).sum(1, keepdims=True)
    return gradient_FxO - along * rows_FxO
