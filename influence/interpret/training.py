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

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from influence.fold import Fold
from influence.interpret.buffer import Buffer, empty, poured
from influence.interpret.dictionary import Dictionary, unit
from influence.interpret.learning import (
    Aim,
    Member,
    Schedule,
    begin,
    encoder_of,
    step,
)
from influence.interpret.source import Centre, Values
from influence.model.sites import Address
from influence.types import Batch, Params


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


def fold(
    source: Values,
    aims: Mapping[str, Aim],
    centre: Mapping[Address, Centre],
    schedule: Schedule,
    *,
    tokens: int,
    seed: int = 0,
) -> Fold:
    """Returns the pass over sequences that trains, ending in `{name: Trained}`.

    Args:
      source: the model that is read, or what it computed before.
      aims: what is trained, by name; all see the same tokens in the same order.
      centre: of every site, as `centres` found it.
      schedule: how long, and how fast.
      tokens: positions of a batch of sequences, padding included; or rows of a batch.
      seed: of the start and of the order.

    Raises:
      ValueError: if an aim can't be trained.
    """
    sites = tuple(dict.fromkeys(y for x in aims.values() for y in (x.site, x.target)))
    for name, aim in aims.items():
        _check(name, aim, centre)
    room = 2 * max(tokens + schedule.batch, 8 * schedule.batch)

    def init() -> State:
        keys = jax.random.split(jax.random.key(seed), len(aims) + 1)
        members = {
            name: begin(aim, centre, schedule, key)
            for (name, aim), key in zip(aims.items(), keys[1:], strict=True)
        }
        buffer = empty({k: centre[k] for k in sites}, room, keys[0])
        begun = State(buffer, members, jnp.zeros((), jnp.int32))
        return jax.tree.map(jnp.copy, begun)  # consumed: no array may be in it twice

    train = partial(_serve, tuple(aims.items()), schedule)

    @partial(jax.jit, donate_argnums=0)
    def update(state: State, params: Params, centre: Any, batch: Batch) -> State:
        rows, keep = source.values(sites, params, batch)
        buffer = poured(state.buffer, rows, keep, centre)
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


def _serve(
    aims: Sequence[tuple[str, Aim]], schedule: Schedule, state: State, keep: int
) -> State:
    """Returns dictionaries trained on all of the buffer but so many rows."""

    def more(state: State) -> Array:
        left = state.buffer.filled - schedule.batch
        return (left >= keep) & (state.step < schedule.steps)

    def once(state: State) -> State:
        rest = state.buffer.filled - schedule.batch
        rows = {
            k: jax.lax.dynamic_slice_in_dim(x, rest, schedule.batch)
            for k, x in state.buffer.rows.items()
        }
        members = {
            name: step(aim, schedule, state.members[name], state.step, rows)
            for name, aim in aims
        }
        return State(state.buffer._replace(filled=rest), members, state.step + 1)

    return jax.lax.while_loop(more, once, state)


def _trained(
    aim: Aim,
    centre: Mapping[Address, Centre],
    schedule: Schedule,
    state: State,
    member: Member,
) -> Trained:
    learned = {**member.learned, "encoder_DxF": encoder_of(aim, member.learned)}
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
