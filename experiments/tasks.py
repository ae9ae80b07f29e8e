"""The tasks methods are judged on: small enough to retrain hundreds of times.

Each is a training, on data that is on every machine or read from a path, and sixty
measurements on held-out examples, of which the first half is for choosing (a
*development bank*) and the second half for testing.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from influence.attribution.measurements import likelihoods
from influence.model.config import Config
from influence.model.examples import Examples, sequences
from influence.model.supervised import Classification, Regression, labelled
from influence.model.task import LanguageModel
from influence.model.train import SGD, AdamW, Recipe, Training
from influence.model.transformer import Apply, Decoder
from influence.runtime.data import Text, read_modules, train_tokenizer
from influence.runtime.demo import MODULES
from influence.truth.subject import Subject
from influence.types import Params

QUERIES = 60
"""How many measurements a task has."""


class Setting(NamedTuple):
    """What methods are judged on.

    Attributes:
      name: of the task.
      training: how its model comes to be.
      asked: held-out examples whose log-probability is measured.
      tokens: of training sequences and of the asked ones, for lexical baselines; none
        if examples are not text.
      layers: what the project covers by default.
      at_once: how many trainings side by side.
      batch: how many sequences are read at a time.
      resampled: whether it is small enough to be retrained with other seeds as well.
      tiny: whether its Gauss–Newton matrix can be formed.
    """

    name: str
    training: Training
    asked: Examples
    tokens: tuple[list[list[int]], list[list[int]]] | None
    layers: str
    at_once: int
    batch: int
    resampled: bool
    tiny: bool


def digits(path: Path | None, seed: int) -> Setting:
    """Returns the classification of handwritten digits by a multilayer perceptron."""
    from sklearn.datasets import load_digits

    del path  # The data comes with the library.
    x, y = (np.asarray(part) for part in load_digits(return_X_y=True))
    recipe = Recipe(200, 100, 0.1, SGD(momentum=0.9), warmup=0.1)
    task = Classification(_logits)
    return _supervised("digits", task, recipe, x, y.astype(np.int32), 1000, 10, seed)


def diabetes(path: Path | None, seed: int) -> Setting:
    """Returns the regression of diabetes progression."""
    from sklearn.datasets import load_diabetes

    del path
    x, y = (np.asarray(part) for part in load_diabetes(return_X_y=True))
    recipe = Recipe(200, 64, 0.02, SGD(momentum=0.9), warmup=0.1)
    task = Regression(_number)
    return _supervised("diabetes", task, recipe, x, _standard(y), 320, 1, seed)


def concrete(path: Path | None, seed: int) -> Setting:
    """Returns the regression of concrete's strength.

    Args:
      path: of the table: eight columns of the mixture and its age, then the strength.
      seed: of the split.
    """
    if path is None:
        raise ValueError("Concrete's table comes with no library: give its path.")
    table = np.loadtxt(path)
    recipe = Recipe(400, 100, 0.05, SGD(momentum=0.9), warmup=0.1)
    x, y = table[:, :-1], _standard(table[:, -1])
    return _supervised("concrete", Regression(_number), recipe, x, y, 800, 1, seed)


SMOOTH = AdamW(clip=None, root=1e-8)


class Shape(NamedTuple):
    """How large a language model is, and how it is trained.

    Attributes:
      config: the decoder's sizes.
      sequences: how many it is tuned on.
      reading: how it is trained on what came before.
      tuning: how it is trained on them.
      at_once: how many trainings side by side.
    """

    config: Config
    sequences: int
    reading: Recipe
    tuning: Recipe
    at_once: int


LITTLE = Shape(
    Config(vocabulary=512, context=48, width=48, hidden=96, heads=4, blocks=2),
    1024,
    Recipe(600, 64, 1e-2, SMOOTH),
    Recipe(64, 64, 3e-3, SMOOTH, warmup=0.25),
    4,
)
"""95,472 parameters: 100 retrainings take minutes on two cores."""

LARGE = Shape(
    Config(vocabulary=2048, context=128, width=256, hidden=688, heads=8, blocks=6),
    8192,
    Recipe(4000, 64, 3e-3, SMOOTH),
    Recipe(512, 64, 1e-3, SMOOTH, warmup=0.25),
    8,
)
"""5.8 million, for machines with an accelerator, and a text of ten megabytes."""


def language(path: Path | None, seed: int, *, shape: Shape = LITTLE) -> Setting:
    """Returns next-token prediction on Python's standard library, or on a text.

    A decoder that has read the first three quarters of the text is trained on sequences
    of the last, four times each: how language models mostly are trained on data that
    somebody asks about.

    Args:
      path: of a text; Python's standard library if none.
      seed: of the split.
      shape: how large it is.

    Raises:
      ValueError: if the text is too short.
    """
    config, n = shape.config, shape.sequences
    _, pieces = read_pieces(path, shape)
    before = min(len(pieces) * 3 // 4, len(pieces) - n - QUERIES)
    if before < shape.reading.batch:
        raise ValueError(
            f"The text has {len(pieces):,} sequences of {config.context} tokens. It "
            f"takes {n + QUERIES:,} to train on and to ask about, and as many as a "
            "batch to have read before. Give a longer one."
        )
    order = before + np.random.default_rng(seed).permutation(len(pieces) - before)
    ids, tokens = zip(*(pieces[i] for i in order[: n + QUERIES]), strict=True)
    task = LanguageModel(Apply(config), config.context)
    start = partial(
        _pretrained, task, shape, sequences([x for _, x in pieces[:before]])
    )
    return Setting(
        "language",
        Training(task, shape.tuning, sequences(tokens[:n], ids[:n]), cache(start)),
        sequences(tokens[n:], ids[n:]),
        (list(tokens[:n]), list(tokens[n:])),
        "blocks.*",
        shape.at_once,
        32,
        resampled=False,
        tiny=False,
    )


def read_pieces(
    path: Path | None, shape: Shape = LITTLE
) -> tuple[Tokenizer, list[tuple[str, list[int]]]]:
    """Returns a tokenizer and all pieces of a text, each as long as the context.

    Args:
      path: of a text; Python's standard library if none.
      shape: of the model that reads it.
    """
    texts = (
        read_modules(MODULES)
        if path is None
        else [Text(path.stem, path.read_text(encoding="utf-8"))]
    )
    config = shape.config
    tokenizer = train_tokenizer(texts, config.vocabulary)
    return tokenizer, [
        (f"{text.id}:{at}", ids[at : at + config.context])
        for text in texts
        for ids in [tokenizer.encode(text.text).ids]
        for at in range(0, len(ids) - config.context + 1, config.context)
    ]


def _pretrained(
    task: LanguageModel, shape: Shape, examples: Examples, seed: int
) -> Any:
    """Returns the decoder that has read the text before."""
    _, params = nnx.split(Decoder(shape.config, rngs=nnx.Rngs(seed)))
    reading = Training(task, shape.reading, examples, lambda _: params)
    return reading(np.ones(len(examples)), seed)


TASKS: dict[str, Callable[[Path | None, int], Setting]] = {
    "digits": digits,
    "diabetes": diabetes,
    "concrete": concrete,
    "language": language,
    "language-large": partial(language, shape=LARGE),
}


def trained(setting: Setting, seed: int) -> Params:
    """Returns the model: the baseline of the program that retrains."""
    ones = np.ones((setting.at_once, len(setting.training.examples)))
    many = setting.training.many(ones, [seed] * setting.at_once, setting.at_once)
    return jax.tree.map(lambda x: x[0], many)


def subject_of(setting: Setting, seed: int, params: Params, bank: str) -> Subject:
    """Returns what methods are asked about in the development or the test bank."""
    half = QUERIES // 2
    places = range(half) if bank == "development" else range(half, QUERIES)
    asked = likelihoods(setting.training.task, setting.asked.take(places))
    words = None
    if setting.tokens is not None:
        tokens, others = setting.tokens
        words = tokens, dict(zip(asked, (others[i] for i in places), strict=True))
    return Subject(
        setting.training, seed, params, asked, words, setting.layers, setting.batch
    )


def _supervised(
    name: str,
    task: Classification | Regression,
    recipe: Recipe,
    x: np.ndarray,
    y: np.ndarray,
    n: int,
    outputs: int,
    seed: int,
) -> Setting:
    """Returns a multilayer perceptron's task, inputs standardised."""
    order = np.random.default_rng(seed).permutation(len(x))
    spread = x[order[:n]].std(0)
    x = (x - x[order[:n]].mean(0)) / np.where(spread > 0, spread, 1)
    points = labelled(x.astype(np.float32), y)

    def start(seed: int) -> Any:
        sizes = (x.shape[1], 32, 32, outputs)
        keys = jax.random.split(jax.random.key(seed), 3)
        return {
            f"layer{i}": {
                "w": jax.random.normal(key, (rows, columns)) / rows**0.5,
                "b": jnp.zeros(columns),
            }
            for i, (key, (rows, columns)) in enumerate(
                zip(keys, pairwise(sizes), strict=True)
            )
        }

    training = Training(task, recipe, points.take(order[:n]), start)
    asked = points.take(order[n : n + QUERIES])
    return Setting(
        name, training, asked, None, "*", 25, 250, resampled=name == "digits", tiny=True
    )


def _logits(params: Any, x_BxI: jax.Array) -> jax.Array:
    """Returns the outputs of a perceptron with two hidden layers."""
    for name in ("layer0", "layer1"):
        x_BxI = jnp.tanh(x_BxI @ params[name]["w"] + params[name]["b"][None])
    return x_BxI @ params["layer2"]["w"] + params["layer2"]["b"][None]


def _number(params: Any, x_BxI: jax.Array) -> jax.Array:
    return _logits(params, x_BxI)[:, 0]


def _standard(y: np.ndarray) -> np.ndarray:
    return ((y - y.mean()) / y.std()).astype(np.float32)
