"""Steering: what a model says with a feature held up, held down, or taken out.

With `f` a feature's activation where the model is, and `d` its decoder row, an edit
adds a multiple of `d` to what the dictionary writes:

| edit | what is added |
|---|---|
| add `s` | `s d` |
| clamp to `c` | `(c − f) d` |
| scale by `s` | `(s − 1) f d` |
| ablate | `− f d`: clamped to 0 |

Only differences are added, so what the dictionary does not explain stays as it is, and
a feature clamped to the activation it has changes nothing.

Letters: `B` texts, `T` positions, `E` edits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from influence.interpret.dictionary import Dictionary, pre_activations
from influence.interpret.link import check_feature
from influence.linalg.contract import wide
from influence.model.examples import prompted
from influence.model.generate import generate
from influence.model.sites import Address, addresses, read, replaced
from influence.model.task import LanguageModel
from influence.types import Inputs, Params

PATTERN = "attention_pattern"
"""The sites at which what attention looks at can be held fixed."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["feature_E", "keep_E", "add_E", "first_E", "last_E"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Edits:
    """Edits of features: each becomes `keep · f + add`, at positions of its own.

    Arrays throughout, so that another strength compiles nothing anew.

    Attributes:
      feature_E: which features.
      keep_E: how much of the feature's own activation stays.
      add_E: what is added to that.
      first_E: the first position, counted from the end of the prompt: the first new
        token's is 0, the prompt's are negative.
      last_E: the last position, counted so.
    """

    feature_E: Array
    keep_E: Array
    add_E: Array
    first_E: Array
    last_E: Array


ALWAYS = (-(2**30), 2**30)
PROMPT = (-(2**30), -1)
GENERATED = (0, 2**30)
"""Positions: all, those of the prompt, those of what is generated."""


class Edit(NamedTuple):
    """An edit of one feature.

    Attributes:
      feature: which.
      keep: how much of its own activation stays.
      add: what is added to that.
      positions: the first and the last, counted from the end of the prompt.
    """

    feature: int
    keep: float
    add: float
    positions: tuple[int, int] = ALWAYS


def add(feature: int, strength: float, positions: tuple[int, int] = ALWAYS) -> Edit:
    """Returns an edit that adds to a feature, on or off."""
    return Edit(feature, 1.0, strength, positions)


def clamp(feature: int, value: float, positions: tuple[int, int] = ALWAYS) -> Edit:
    """Returns an edit that sets a feature's activation, whatever it is."""
    return Edit(feature, 0.0, value, positions)


def scale(feature: int, factor: float, positions: tuple[int, int] = ALWAYS) -> Edit:
    """Returns an edit that multiplies a feature where it is on."""
    return Edit(feature, factor, 0.0, positions)


def ablate(feature: int, positions: tuple[int, int] = ALWAYS) -> Edit:
    """Returns an edit that takes a feature out."""
    return Edit(feature, 0.0, 0.0, positions)


def check_edits(edits: Sequence[Edit], dictionary: Dictionary) -> None:
    """Raises if there are no edits, or one is of a feature that there is not."""
    if not edits:
        raise ValueError("Nothing is edited. Name a feature and what becomes of it.")
    for edit in edits:
        check_feature(dictionary, edit.feature)


def in_units(edits: Sequence[Edit], maximum_F: np.ndarray) -> list[Edit]:
    """Returns edits whose added strengths are multiples of features' maxima.

    Args:
      edits: with strengths in those units.
      maximum_F: each feature's largest activation on some text.

    Raises:
      ValueError: if a feature was never on, so that it has no unit.
    """
    for edit in edits:
        if edit.add and not maximum_F[edit.feature] > 0:
            raise ValueError(
                f"Feature {edit.feature} was never on in the text its dictionary was "
                "judged on: there is no largest activation to count in. Give an "
                "absolute strength."
            )
    return [x._replace(add=x.add * float(maximum_F[x.feature])) for x in edits]


def gathered(edits: Sequence[Edit], dictionary: Dictionary) -> Edits:
    """Returns edits as arrays.

    Raises:
      ValueError: if there are none, or of a feature that the dictionary does not have.
    """
    check_edits(edits, dictionary)
    kind = dictionary.decoder_FxO.dtype
    first, last = zip(*(x.positions for x in edits), strict=True)
    return Edits(
        jnp.asarray([x.feature for x in edits], jnp.int32),
        jnp.asarray([x.keep for x in edits], kind),
        jnp.asarray([x.add for x in edits], kind),
        jnp.asarray(first, jnp.int32),
        jnp.asarray(last, jnp.int32),
    )


def changed(
    dictionary: Dictionary, edits: Edits, x_BxTxD: Array, place_BxT: Array
) -> Array:
    """Returns what edits add to what the dictionary writes, `[B, T, O]`.

    Several edits of one feature see what those before them left of it; an edit does
    not see what another feature's added.

    Args:
      dictionary: the dictionary.
      edits: what becomes of features.
      x_BxTxD: what the dictionary reads.
      place_BxT: each position, counted from the end of the prompt.
    """
    pre = pre_activations(dictionary, x_BxTxD.astype(dictionary.encoder_DxF.dtype))
    z = dictionary.activation(pre)

    def step(now: Array, edit: Edits) -> tuple[Array, None]:
        own = now[..., edit.feature_E]
        inside = (place_BxT >= edit.first_E) & (place_BxT <= edit.last_E)
        new = jnp.where(inside, edit.keep_E * own + edit.add_E, own)
        return now.at[..., edit.feature_E].set(new), None

    after, _ = jax.lax.scan(step, z, edits)
    return (after - z) @ dictionary.decoder_FxO


@dataclass(frozen=True)
class Steered:
    """A model with edits, as a function of `Steering` in its parameters' place.

    Equal for equal models and sites: what was compiled for some edits serves others.

    Attributes:
      apply: the model, `(params, tokens_BxT) -> logits`; it may take segments as well.
      site: what the dictionary reads.
      writes: what it writes; the same site for an autoencoder.
      freeze_attention: whether attention looks where it would without edits.

    Example:
      >>> from flax import nnx
      >>> from influence.interpret.activations import ReLU
      >>> from influence.interpret.steering import Steered, Steering, clamp, gathered
      >>> from influence.model.sites import Address
      >>> from influence.model.transformer import Apply, Config, Decoder
      >>> small = Config(10, 8, width=16, hidden=24, heads=4, blocks=2)
      >>> weights = nnx.state(Decoder(small, rngs=nnx.Rngs(0)))
      >>> from influence.interpret.dictionary import Dictionary
      >>> rows = jnp.eye(16)
      >>> plain = Dictionary(rows, jnp.zeros(16), rows, jnp.zeros(16), ReLU())
      >>> at = Address("resid", 1)
      >>> held = Steering(weights, plain, gathered([clamp(3, 8.0)], plain))
      >>> Steered(Apply(small), at, at)(held, jnp.array([[1, 2, 3]])).shape
      (1, 3, 10)
    """

    apply: Callable[..., Array]
    site: Address
    writes: Address
    freeze_attention: bool = False

    def __call__(
        self,
        steering: "Steering",
        tokens_BxT: Array,
        segments_BxT: Array | None = None,
    ) -> Array:
        """Returns logits, `[B, T, V]`; positions are those in the row, of any document.

        Args:
          steering: the model's parameters, and the edits.
          tokens_BxT: token ids.
          segments_BxT: the number of each token's document, for a model that takes it.
        """
        params, dictionary, edits, prompt_B = steering
        rest = () if segments_BxT is None else (segments_BxT,)
        args = (params, tokens_BxT, *rest)
        place = jnp.arange(tokens_BxT.shape[1], dtype=jnp.int32)[None]
        place = jnp.broadcast_to(place, tokens_BxT.shape)
        if prompt_B is not None:
            place = place - prompt_B[:, None].astype(place.dtype)

        def edit(own: Array) -> Array:
            return own + changed(dictionary, edits, own, place).astype(own.dtype)

        fixed = self._patterns(args)
        if self.writes == self.site:
            return self._run({self.site: edit, **fixed})(*args)
        x = read(self._run(fixed), (self.site,))(*args)[self.site]
        more = changed(dictionary, edits, x, place)
        there = {self.writes: lambda own: own + more.astype(own.dtype)}
        return self._run({**there, **fixed})(*args)

    def _run(self, edits: Mapping[Address, Callable[[Array], Array]]) -> Any:
        return replaced(self.apply, edits) if edits else self.apply

    def _patterns(self, args: Sequence[Any]) -> dict[Address, Any]:
        """Returns what puts the unedited model's attention in its place."""
        if not self.freeze_attention:
            return {}
        count = addresses(self.apply, *args).get(PATTERN, 0)
        if not count:
            raise ValueError(
                f"The model has no site {PATTERN!r}, so its attention can't be frozen. "
                "Name it in the model, or steer without."
            )
        places = [Address(PATTERN, i) for i in range(count)]
        clean = read(self.apply, places)(*args)
        return {k: lambda _, x=x: x for k, x in clean.items()}


class Steering(NamedTuple):
    """What a `Steered` model is given in its parameters' place.

    Attributes:
      params: the model's parameters.
      dictionary: whose features are edited.
      edits: what becomes of them.
      prompt_B: how long each text's prompt is; None counts positions from the first.
    """

    params: Params
    dictionary: Dictionary
    edits: Edits
    prompt_B: Array | None = None


class Comparison(NamedTuple):
    """What a model says with edits and without, and what they cost.

    Attributes:
      plain: the continuation of each prompt without edits, token ids.
      steered: with them.
      kl: of each prompt, from the predictions without edits to those with, averaged
        over the plain continuation, nats a token.
      cost: of each prompt, by how much the plain continuation is less likely with
        edits, nats a token.
    """

    plain: list[list[int]]
    steered: list[list[int]]
    kl: list[float]
    cost: list[float]


def compare(
    task: LanguageModel,
    steered: Steered,
    held: Steering,
    prompts: Sequence[Sequence[int]],
    length: int,
    *,
    stop: int | None = None,
    temperature: float = 0.0,
    key: Array | None = None,
) -> Comparison:
    """Returns what a model says with edits and without.

    Args:
      task: the language model.
      steered: the same model, edited at a site.
      held: its parameters, and the edits.
      prompts: token ids; how long each is takes the place of `held`'s lengths.
      length: how many tokens are added.
      stop: the token after which a text ends.
      temperature: what logits are divided by before a token is drawn; 0 takes the
        likeliest.
      key: of the draws, the same with edits and without.

    Raises:
      ValueError: if a prompt is empty, or prompts and continuations are longer than
        the model's context.
    """
    _check_length(task, prompts, length)
    start = jnp.asarray([len(x) for x in prompts], jnp.int32)
    held = held._replace(prompt_B=start)
    said = partial(generate, stop=stop, temperature=temperature, key=key)
    plain = said(task.apply, held.params, prompts, length)
    other = said(steered, held, prompts, length)
    pairs = enumerate(zip(prompts, plain, strict=True))
    texts = prompted({str(i): pair for i, pair in pairs})
    kl, cost = (np.asarray(x) for x in _costs(task, steered, held, texts.inputs))
    return Comparison(plain, other, kl.tolist(), cost.tolist())


@jax.jit(static_argnums=(0, 1))
def _costs(
    task: LanguageModel, steered: Steered, held: Steering, inputs: Inputs
) -> tuple[Array, Array]:
    """Returns each text's KL and what it loses in likelihood, nats a label, `[B]`."""
    counts, labels = task.counts(inputs), task.labels(inputs)
    plain = task.outputs(held.params, inputs)
    other = steered(held, inputs["tokens"])
    p, q = (jax.nn.log_softmax(x.astype(wide(x.dtype)), -1) for x in (plain, other))

    def mean(x_BxT: Array) -> Array:
        return x_BxT.mean(1, where=counts)

    kl = mean((jnp.exp(p) * (p - q)).sum(-1))
    return kl, mean(task.loss(other, labels) - task.loss(plain, labels))


def _check_length(
    task: LanguageModel, prompts: Sequence[Sequence[int]], length: int
) -> None:
    longest = max((len(x) for x in prompts), default=0) + length
    if task.context is not None and longest > task.context:
        raise ValueError(
            f"A prompt and {length} more tokens are {longest} tokens; the model's "
            f"context is {task.context}. Give a shorter prompt, or a smaller --length."
        )
