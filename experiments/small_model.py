"""A small decoder that has read Python's sources, to ask what it learned from."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from experiments.material import random_llama, sources, trained
from influence.attribution.forms import Dense, dense
from influence.attribution.lexical import bm25
from influence.attribution.measurements import completions
from influence.attribution.query import Query, query
from influence.attribution.scan import scan
from influence.curvature.diagonal import identity
from influence.curvature.ekfac import fit
from influence.curvature.operator import Curvature
from influence.curvature.solvers import Eigenbasis, Solver
from influence.linalg.damping import Absolute
from influence.model.config import Config
from influence.model.examples import Examples, sequences
from influence.model.task import LanguageModel
from influence.model.train import Recipe
from influence.model.transformer import Apply
from influence.runtime.data import Text, train_tokenizer
from influence.types import Params

LAYERS = "blocks.*"
"""What scores are of: every matrix inside the blocks."""

BATCH = 32

Tokens = Sequence[Sequence[int]] | np.ndarray

Questions = Mapping[str, tuple[Sequence[int], Sequence[int]]]
"""By name, the token ids of a prompt and of its completion."""

TAUGHT = 300
"""How many sources a tokenizer is trained on."""


@dataclass(frozen=True)
class Corpus:
    """Sources in pieces of one length.

    Attributes:
      tokenizer: trained on some of them.
      train_NxT: token ids to train on.
      held_MxT: of other files, to ask about.
    """

    tokenizer: Tokenizer
    train_NxT: np.ndarray
    held_MxT: np.ndarray

    def text(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns tokens as text."""
        return self.tokenizer.decode([int(x) for x in tokens])


class Model(NamedTuple):
    """A trained decoder.

    Attributes:
      task: the decoder and its loss.
      params: its parameters.
      examples: what it was trained on.
      loss: the last, in nats a token.
    """

    task: LanguageModel
    params: Params
    examples: Examples
    loss: float


def decoder(
    width: int, blocks: int, vocabulary: int = 1024, context: int = 64
) -> Config:
    """Returns the sizes of a decoder, its hidden layers 8/3 as wide as the others."""
    return Config(
        vocabulary=vocabulary,
        context=context,
        width=width,
        hidden=8 * width // 3,
        heads=4,
        blocks=blocks,
        tied=True,
    )


def read(vocabulary: int, context: int, train: int, held: int = 0) -> Corpus:
    """Returns so many pieces of sources, cut wherever a piece is full."""
    taught = (Text("", x) for x in islice(sources(), TAUGHT))
    tokenizer = train_tokenizer(taught, vocabulary)
    each = pieces(tokenizer, sources(), context)
    train_NxT = np.array(list(islice((x for x, _ in each), train)))
    last = next(each)[1]
    later = (x for x, file in each if file > last)
    return Corpus(tokenizer, train_NxT, np.array(list(islice(later, held))))


def pieces(
    tokenizer: Tokenizer, texts: Iterable[str], context: int
) -> Iterator[tuple[list[int], int]]:
    """Yields pieces of texts, each full, and of which text their end is."""
    left: list[int] = []
    for place, text in enumerate(texts):
        left += tokenizer.encode(text + "\n").ids
        whole = len(left) // context * context
        for start in range(0, whole, context):
            yield left[start : start + context], place
        left = left[whole:]


def model(config: Config, tokens: Tokens, recipe: Recipe, seed: int) -> Model:
    """Returns a decoder that was trained on sequences of tokens."""
    examples, apply = sequences(list(tokens)), Apply(config)
    params, loss = trained(apply, random_llama(config, seed), examples, recipe)
    return Model(LanguageModel(apply), params, examples, loss)


def fitted(model: Model, count: int, **how: Any) -> Curvature:
    """Returns the EK-FAC of sequences spread over all the model was trained on."""
    places = np.linspace(0, len(model.examples) - 1, count).round().astype(int)
    sample = model.examples.take(np.unique(places)).batches(BATCH)
    return fit(model.task, model.params, sample, layers=LAYERS, **how)


def scores(
    model: Model,
    curvature: Curvature,
    questions: Questions,
    examples: Examples,
    solver: Solver = Eigenbasis(),
) -> np.ndarray:
    """Returns the influence of examples on completions, `[Q, N]`."""
    asked = completions(model.task, questions)
    solved = query(curvature, model.params, asked, solver=solver)
    return total(model, solved, examples)


def joined(queries: Sequence[Query]) -> Query:
    """Returns queries, made in any ways, as one: what one scan scores all of."""
    first = queries[0]
    together = {
        k: Dense(jnp.concatenate([dense(x.forms[k]).h_QxOxI for x in queries], -3))
        for k in first.forms
    }
    names = [f"{i}: {name}" for i, x in enumerate(queries) for name in x.names]
    return replace(first, names=tuple(names), forms=together, facts=())


def total(model: Model, query: Query, examples: Examples) -> np.ndarray:
    """Returns the influence of examples, `[Q, N]`."""
    batches, whole = examples.batches(BATCH), len(model.examples)
    found = scan(model.task, model.params, query, batches, n_train=whole)
    return found.total.values


def continuations(
    tokens_NxT: np.ndarray, count: int, prompt: int
) -> dict[str, tuple[list[int], list[int]]]:
    """Returns questions: what pieces of text go on with after so many tokens."""
    return {
        str(i): (x[:prompt].tolist(), x[prompt:].tolist())
        for i, x in enumerate(tokens_NxT[:count])
    }


def correlations(first_QxN: np.ndarray, second_QxN: np.ndarray) -> np.ndarray:
    """Returns Pearson's correlation of each row with its like, `[Q]`."""
    first, second = (x - x.mean(1, keepdims=True) for x in (first_QxN, second_QxN))
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(1) / norms


def by_method(
    model: Model, curvature: Curvature, questions: Questions
) -> dict[str, np.ndarray]:
    """Returns what EK-FAC, gradient products and BM25 make of all that was read."""
    examples = model.examples
    none = identity(model.task, model.params, examples.batches(BATCH), layers=LAYERS)
    words = {k: [*prompt, *rest] for k, (prompt, rest) in questions.items()}
    tokens, counts = (np.asarray(examples.inputs[k]) for k in ("tokens", "counts"))
    rows = [x[y].tolist() for x, y in zip(tokens, counts, strict=True)]
    return {
        "EK-FAC": scores(model, curvature, questions, examples),
        "gradient products": scores(
            model, none, questions, examples, Eigenbasis(Absolute(0.0))
        ),
        "BM25": bm25(words, rows, examples.ids).values,
    }
