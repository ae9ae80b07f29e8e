"""What an experiment trains on and asks about."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from influence.model.config import Config
from influence.model.examples import Examples
from influence.runtime import formats
from influence.runtime.corpus.pack import pack
from influence.runtime.corpus.packed import Packed
from influence.runtime.corpus.plan import Plan, apart
from influence.runtime.corpus.source import Source, documents, open_source
from influence.runtime.corpus.tokenizer import read_tokenizer
from influence.runtime.data import Text, train_tokenizer
from influence.runtime.evaluating.experiment import Experiment
from influence.runtime.run.job import MODEL, Models, opened_job
from influence.runtime.run.ledger import Ledger, opened

SPLIT = 0
"""The seed by which sequences are drawn, and held out."""


class Material(NamedTuple):
    """What an experiment trains on and asks about.

    Attributes:
      config: of the decoder.
      examples: the training sequences.
      asked: those held out.
      tokens: the token ids of both.
      digest: of all of them.
    """

    config: Config
    examples: Examples
    asked: Examples
    tokens: tuple[list[list[int]], list[list[int]]]
    digest: str


def material(ledger: Ledger, experiment: Experiment, given: Models | None) -> Material:
    """Returns the sequences of an experiment.

    Raises:
      ValueError: if the corpus has too few, or a run's is damaged.
    """
    sizes: dict[str, Any] = dict(experiment.sizes)
    if experiment.run is None:
        packed, segments = _text(ledger, experiment), False
    else:
        job = opened_job(opened(experiment.run), None, given)
        model = job.model(MODEL)
        packed, segments = job.corpus(model).packed, job.options.packing.within
        sizes |= {"vocabulary": model.vocabulary, "context": packed.context}
    config = Config(**sizes)
    train, held_out = _split(packed, experiment)
    examples, asked = (_examples(packed.take(x), segments) for x in (train, held_out))
    tokens, others = (
        [packed.tokens_at(int(i)).tolist() for i in places]
        for places in (train, held_out)
    )
    state = hashlib.sha256(repr((tokens, others, examples.ids, asked.ids)).encode())
    return Material(config, examples, asked, (tokens, others), state.hexdigest())


def _examples(packed: Packed, segments: bool) -> Examples:
    whole = next(iter(packed.batches(len(packed), segments=segments)))
    return Examples(whole.inputs, tuple(packed.ids))


def _split(packed: Packed, experiment: Experiment) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places of training sequences, and of those held out."""
    n, queries = len(packed), experiment.queries
    sequences = experiment.sequences or n - queries
    batch = experiment.trained.recipe.batch
    if sequences + queries > n or sequences < batch:
        raise ValueError(
            f"The corpus has {n} sequences of at most {packed.context} tokens: too few "
            f"to train on {sequences}, in batches of {batch}, and to ask about "
            f"{queries} others. Give a longer text, or lower sequences, queries or "
            "batch."
        )
    order = np.random.default_rng(SPLIT).permutation(n)
    return order[:sequences], order[sequences : sequences + queries]


def _text(ledger: Ledger, experiment: Experiment) -> Packed:
    """Returns a text, packed, with a tokenizer trained on it."""
    assert experiment.text is not None
    source = open_source(experiment.text, column=experiment.column)
    sizes, run = experiment.sizes, ledger.run
    name = f"tokenizer-{source.fingerprint()[:8]}-{sizes['vocabulary']}.json"
    if name not in run.manifest["artifacts"]:
        tokenizer = train_tokenizer(_texts(source), sizes["vocabulary"])
        run.write(name, formats.write_text(tokenizer.to_str()))
    tokenizer = run.read(name, read_tokenizer)
    plan = Plan(sizes["context"], separator=None, cuts=apart)
    key = hashlib.sha256(f"{name} {plan.about}".encode()).hexdigest()[:8]
    return pack(source, tokenizer, run.path(f"corpora/{key}"), plan)


def _texts(source: Source) -> Iterator[Text]:
    for row in documents(source):
        if not isinstance(row.content, str):
            raise ValueError(
                f"{source.where(row.place)} is no text. A tokenizer is trained on "
                "text; give the corpus of a run instead."
            )
        yield Text(str(row.place.row), row.content)
