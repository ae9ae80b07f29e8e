"""Language models whose features are looked at, and the text they are looked at on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.tasks import LITTLE, TASKS, Setting, read_pieces, trained
from influence.fold import run
from influence.interpret import quality, training
from influence.interpret.dictionary import Dictionary
from influence.interpret.learning import Aim, Schedule
from influence.interpret.quality import Quality
from influence.interpret.source import Centre, Epochs, Source, centres
from influence.interpret.training import Trained
from influence.model import train
from influence.model.config import Config
from influence.model.examples import Examples, sequences
from influence.model.sites import Address
from influence.model.task import LanguageModel
from influence.model.transformer import Apply, Decoder
from influence.runtime.data import cut, read_modules
from influence.runtime.demo import MODULES, SMALL, read_corpus

CHUNK = 64
"""Sequences that go through the model at a time."""


class Subject(NamedTuple):
    """A language model, text to learn features from, and text held out.

    Attributes:
      name: of the model.
      source: the model.
      site: where its features are looked for: the residual stream, past the middle.
      read: text to learn from.
      held: text that nothing was learned from.
    """

    name: str
    source: Source
    site: Address
    read: Examples
    held: Examples

    @property
    def width(self) -> int:
        """Returns how many numbers the site holds at a position."""
        return len(self.centres[self.site].mean_D)

    @property
    def centres(self) -> dict[Address, Centre]:
        """Returns the middle and the size of what is at the site."""
        some = np.random.default_rng(0).permutation(len(self.read))[:1024]
        batches = self.read.take(some).batches(CHUNK)
        return run(centres(self.source, (self.site,)), batches)

    def train(
        self, aims: Mapping[str, Aim], schedule: Schedule, seed: int = 0
    ) -> dict[str, Trained]:
        """Returns dictionaries trained on all of the text, again and again."""
        tokens = CHUNK * self.read.inputs["tokens"].shape[1]
        each = float(
            np.asarray(self.source.task.counted(self.read.inputs)).sum()
        ) / len(self.read)
        fold = training.fold(
            self.source, aims, self.centres, schedule, tokens=tokens, seed=seed
        )
        batches = int(schedule.tokens / (each * CHUNK)) + 2
        epochs = -(-batches // -(-len(self.read) // CHUNK))
        return run(fold, Epochs(self.read, CHUNK, batches + epochs, seed))

    def judged(self, dictionary: Dictionary) -> Quality:
        """Returns how good a dictionary is on the text held out."""
        fold = quality.fold(self.source, dictionary, self.centres[self.site], self.site)
        return run(fold, self.held.batches(CHUNK))


def bench(setting: Setting, params: object) -> Subject:
    """Returns the truth bench's language model.

    Its features are learned from all text that it was ever trained on.

    Args:
      setting: the bench's task.
      params: the model, trained.
    """
    _, pieces = read_pieces(None)
    used = {*setting.training.examples.ids, *setting.asked.ids}
    last = min(i for i, (id_, _) in enumerate(pieces) if id_ in used)
    seen = [x for i, x in enumerate(pieces) if i < last or x[0] in used]
    held = [x for x in pieces[last:] if x[0] not in used]
    task = setting.training.task
    assert isinstance(task, LanguageModel)
    return Subject(
        "bench", Source(task, params), Address("resid", 1), _as(seen), _as(held)
    )


def _as(pieces: list[tuple[str, list[int]]]) -> Examples:
    return sequences([x for _, x in pieces], [id_ for id_, _ in pieces])


def language(
    seed: int, kept: Sequence[np.ndarray] | None = None
) -> tuple[Setting, Subject]:
    """Returns the truth bench's language model as it is trained, and as it is read.

    Args:
      seed: of its training.
      kept: its parameters, if it was trained before.
    """
    setting = TASKS["language"](None, seed)
    if kept is None:
        return setting, bench(setting, trained(setting, seed))
    shapes = jax.eval_shape(lambda: start(LITTLE.config, seed))
    return setting, bench(setting, _with(shapes, kept))


def start(config: Config, seed: int) -> Any:
    """Returns a decoder's parameters as they begin."""
    return nnx.split(Decoder(config, rngs=nnx.Rngs(seed)))[1]


def _with(shapes: Any, kept: Sequence[np.ndarray]) -> Any:
    leaves = [jnp.asarray(x) for x in kept]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def demo(seed: int, kept: Sequence[np.ndarray] | None = None) -> Subject:
    """Returns the demo's model.

    Its features are learned from all modules that demos of any size read, of which it
    was itself trained on the first sixteen; a tenth of their sequences is held out.

    Args:
      seed: of its training.
      kept: its parameters, if it was trained before.
    """
    corpus = read_corpus(SMALL)
    task = LanguageModel(Apply(SMALL.config), SMALL.config.context)
    taught, begun = corpus.examples, start(SMALL.config, seed)
    if kept is None:
        fold = train.fold(task, SMALL.recipe, begun, taught, np.ones(len(taught)))
        params = run(fold, train.Order(len(taught), SMALL.recipe, seed)).params
    else:
        params = _with(begun, kept)
    each = (
        x
        for text in read_modules(MODULES)
        for x in cut(text, corpus.tokenizer, SMALL.config.context)
    )
    pieces = [(x.id, x.tokens) for x in each if len(x.tokens) > 1]
    order = np.random.default_rng(seed).permutation(len(pieces))
    last = len(order) // 10
    held, seen = (
        _as([pieces[i] for i in np.sort(x)]) for x in (order[:last], order[last:])
    )
    return Subject("demo", Source(task, params), Address("resid", 3), seen, held)


def activations(subject: Subject, count: int, seed: int) -> np.ndarray:
    """Returns what is at a subject's site, at so many tokens in a random order.

    From the batches that a dictionary of our own would learn from.
    """
    rng, parts, found = np.random.default_rng(seed), [], 0
    look = jax.jit(
        lambda params, batch: subject.source.values((subject.site,), params, batch)
    )
    for batch in Epochs(subject.read, CHUNK, 1 << 30, seed):
        rows, keep = look(subject.source.params, batch)
        parts.append(np.asarray(rows[subject.site])[np.asarray(keep)])
        found += len(parts[-1])
        if found >= count:
            break
    whole = np.concatenate(parts)[:count]
    return whole[rng.permutation(count)]


SUBJECTS: Mapping[str, Callable[..., Subject]] = {
    "demo": demo,
    "bench": lambda seed, kept=None: language(seed, kept)[1],
}
