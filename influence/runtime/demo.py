"""The whole question, answered on text that is on every machine.

Trains a small decoder on part of Python's standard library, asks why it says six
things, checks the answers by retraining, and writes a page.
"""

import dataclasses
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import xarray as xr
from flax import nnx
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from influence.attribution.lexical import bm25
from influence.attribution.measurements import Likelihood, completions
from influence.attribution.query import query
from influence.attribution.scan import scan
from influence.attribution.scores import Scores
from influence.attribution.tokens import token_scores
from influence.curvature.ekfac import fit
from influence.model import train
from influence.model.config import Config
from influence.model.continuation import Continuation, continuations, frequencies
from influence.model.examples import Examples, prompted, sequences
from influence.model.task import LanguageModel, Sampled
from influence.model.transformer import Apply, Decoder
from influence.runtime import formats, store
from influence.runtime.data import (
    Sequence,
    Text,
    cut,
    digest,
    divides,
    read_modules,
    split,
    train_tokenizer,
)
from influence.runtime.driver import Driver
from influence.runtime.questions import IDIOMS, PASSAGES, Candidate
from influence.runtime.report import page
from influence.truth.removal import Check, check
from influence.types import Params

BATCH = 32
"""How many sequences are read at a time."""

EACH = 3
"""How many idioms, and how many passages, are asked about."""

MODULES = (
    *("bisect", "fileinput", "queue", "selectors", "shelve", "stat", "string", "this"),
    *("colorsys", "copy", "dbm.dumb", "fnmatch", "json.scanner", "quopri", "shlex"),
    *("tabnanny", "cmd", "csv", "fractions", "functools", "glob", "graphlib", "gzip"),
    *("heapq", "hmac", "json.decoder", "json.encoder", "linecache", "netrc", "numbers"),
    *("operator", "pprint", "random", "reprlib", "sched", "socketserver", "statistics"),
    *("tempfile", "textwrap", "timeit", "trace", "types", "uuid", "weakref"),
)
"""Modules every Python has: a size reads so many of them, from the first."""


@dataclass(frozen=True)
class Size:
    """How big a demo is.

    Attributes:
      modules: how many of `MODULES` it reads.
      config: the decoder's sizes.
      recipe: how it is trained.
    """

    modules: int
    config: Config
    recipe: train.Recipe


FAST = Size(8, Config(1024, 64, 64, 170, 4, 4), train.Recipe(160, 32, 5e-3))
SMALL = Size(16, Config(1024, 64, 64, 170, 4, 4), train.Recipe(300, 32, 5e-3))
LARGE = Size(44, Config(2048, 128, 128, 344, 8, 6), train.Recipe(700, 32, 3e-3))


@dataclass(frozen=True)
class Corpus:
    """What the model is trained on.

    Attributes:
      texts: the modules, whole.
      tokenizer: trained on them.
      sequences: the pieces they are cut into.
      examples: the same, padded.
    """

    texts: list[Text]
    tokenizer: Tokenizer
    sequences: list[Sequence]
    examples: Examples


@dataclass(frozen=True)
class Asked:
    """The queries of a demo, by name: as measurements, and as a reader sees them."""

    measurements: Mapping[str, Likelihood]
    questions: Mapping[str, page.Question]
    tokens: Mapping[str, list[int]]


def demo(out: Path, seed: int, size: Size, console: Console) -> store.Run:
    """Runs the demo and returns its run folder.

    Args:
      out: the folder.
      seed: of the start, the order of training, the sampled labels, the random removal.
      size: how big.
      console: where to show progress and results.

    Raises:
      FileExistsError: if the folder holds something else.
      OSError: if something could not be written.
    """
    run = store.Run.create(out, _about(seed, size))
    driver = Driver(console)
    with driver.stage("corpus"):
        corpus = read_corpus(size)
    run.note(corpus=_described(corpus, size))
    console.print(
        f"{len(corpus.sequences):,} sequences from {size.modules} modules of Python "
        f"{platform.python_version()}'s standard library"
    )
    task, trained = _model(size, seed)
    retrain = partial(_train, driver, task, size, trained, corpus.examples, seed)
    params = retrain("training", np.ones(len(corpus.examples), np.float32))
    asked = choose(task, params, corpus, size.config.context)
    batches = corpus.examples.batches(BATCH)
    curvature = fit(
        task, params, batches, layers="blocks.*", labels=Sampled(seed), run=driver.run
    )
    run.write("curvature.safetensors", formats.write_curvature(curvature))
    with driver.stage("queries"):
        queries = query(curvature, params, asked.measurements)
    scores = scan(task, params, queries, batches, run=driver.run)
    places = [
        scores.layers.indexes["train"].get_loc(x) for x in page.shown(scores.total)
    ]
    shares = token_scores(
        task,
        params,
        queries,
        corpus.examples.take(places).batches(BATCH),
        n_train=len(corpus.examples),
        run=driver.named("shares of tokens"),
    )
    lexical = bm25(
        asked.tokens, [x.tokens for x in corpus.sequences], corpus.examples.ids
    )
    run.write("scores.zarr", formats.write_scores(_dataset(scores, shares, lexical)))
    found = check(retrain, asked.measurements, params, scores.total, lexical, seed=seed)
    run.write("check.json", formats.write_json(_rows(found)))
    findings = page.Findings(
        facts=_facts(corpus, size, params),
        questions=asked.questions,
        total=scores.total,
        layers=scores.layers,
        pieces={x.id: x.pieces for x in corpus.sequences},
        shares=shares,
        check=found,
    )
    run.write("report.html", formats.write_text(page.render(findings)))
    run.note(seconds={name: round(x, 1) for name, x in driver.seconds.items()})
    _print(console, scores, found, run)
    return run


def read_corpus(size: Size) -> Corpus:
    """Returns the modules of a size, cut into sequences."""
    texts = read_modules(MODULES[: size.modules])
    tokenizer = train_tokenizer(texts, size.config.vocabulary)
    found = [x for text in texts for x in cut(text, tokenizer, size.config.context)]
    found = [x for x in found if len(x.tokens) > 1]
    examples = sequences([x.tokens for x in found], [x.id for x in found])
    return Corpus(texts, tokenizer, found, examples)


def choose(task: LanguageModel, params: Params, corpus: Corpus, longest: int) -> Asked:
    """Returns the queries: what the model continues best, of each kind.

    Before all others come those it would continue so by itself, token by token; among
    them, those it gives the most over what token frequencies alone would give.
    """
    best = [
        (kind, *x)
        for kind, candidates, modules in (
            ("an idiom that recurs across modules", IDIOMS, 2),
            ("a passage it has memorised", PASSAGES, 1),
        )
        for x in _best(task, params, corpus, candidates, modules, longest)
    ]
    tokens = {x.name: split(corpus.tokenizer, *x[1:]) for _, x, _ in best}
    return Asked(
        completions(task, tokens),
        {
            x.name: page.Question(kind, x.prompt, x.completion, continuation)
            for kind, x, continuation in best
        },
        {name: [*prompt, *completion] for name, (prompt, completion) in tokens.items()},
    )


def _best(
    task: LanguageModel,
    params: Params,
    corpus: Corpus,
    candidates: tuple[Candidate, ...],
    modules: int,
    longest: int,
) -> list[tuple[Candidate, Continuation]]:
    """Returns the best candidates of those in enough modules, not too long."""
    present = [
        x
        for x in candidates
        if sum(x.prompt + x.completion in y.text for y in corpus.texts) >= modules
        and divides(corpus.tokenizer, x.prompt, x.completion)
        and len(corpus.tokenizer.encode(x.prompt + x.completion).ids) <= longest
    ]
    tokens = {x.name: split(corpus.tokenizer, *x[1:]) for x in present}
    found = continuations(
        task,
        params,
        prompted(tokens),
        frequencies(
            [x.tokens for x in corpus.sequences], corpus.tokenizer.get_vocab_size()
        ),
    )
    order = sorted(
        zip(present, found, strict=True), key=lambda x: (not x[1].greedy, -x[1].gain)
    )
    return order[:EACH]


def _model(size: Size, seed: int) -> tuple[LanguageModel, Params]:
    """Returns the decoder as a task, and the parameters training starts from."""
    _, params = nnx.split(Decoder(size.config, rngs=nnx.Rngs(seed)))
    return LanguageModel(Apply(size.config), size.config.context), params


def _train(
    driver: Driver,
    task: LanguageModel,
    size: Size,
    start: Params,
    examples: Examples,
    seed: int,
    name: str,
    weights_N: np.ndarray,
) -> Params:
    fold = train.fold(task, size.recipe, start, examples, weights_N)
    order = train.Order(len(examples), size.recipe, seed)
    return driver.named(name)(fold, order).params


def _dataset(scores: Scores, shares: xr.DataArray, lexical: xr.DataArray) -> xr.Dataset:
    """Returns everything scored as labelled arrays.

    `layer_score` and `bm25` are of all sequences, `token_score` of those in `shown`.
    """
    return xr.Dataset(
        {
            "score": scores.total,
            "layer_score": scores.layers,
            "token_score": shares.rename(train="shown"),
            "bm25": lexical,
        },
        attrs=scores.layers.attrs,
    )


def _rows(found: Check) -> list[dict]:
    """Returns the check as rows, changes of log-probability in nats."""
    changes = {
        "predicted": found.predicted,
        "top": found.top.changes,
        "random": found.random.changes,
        "bm25": found.bm25.changes,
    }
    return [
        {"query": name, **{kind: float(x[i]) for kind, x in changes.items()}}
        for i, name in enumerate(found.queries)
    ]


def _about(seed: int, size: Size) -> dict:
    """Returns what is known of a run before it begins."""
    packages = ("influence", "jax", "flax", "optax", "tokenizers", "xarray", "zarr")
    return {
        "job": "demo",
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "device": str(jax.devices()[0]),
        "seed": seed,
        "size": dataclasses.asdict(size),
    }


def _described(corpus: Corpus, size: Size) -> dict:
    return {
        "text": "Python's standard library",
        "python": platform.python_version(),
        "modules": list(MODULES[: size.modules]),
        "sha256": digest(corpus.texts),
        "sequences": len(corpus.sequences),
        "tokens": sum(len(x.tokens) for x in corpus.sequences),
    }


def _facts(corpus: Corpus, size: Size, params: Params) -> list[tuple[str, str]]:
    config, recipe = size.config, size.recipe
    weights = sum(x.size for x in jax.tree.leaves(params["blocks"]))
    tokens = sum(len(x.tokens) for x in corpus.sequences)
    library = f"Python {platform.python_version()} standard library"
    return [
        ("model", f"decoder, {config.blocks} blocks, width {config.width}"),
        ("parameters in blocks", f"{weights:,}"),
        ("training", f"{recipe.steps} steps of {recipe.batch} sequences, AdamW"),
        ("corpus", f"{library}, {size.modules} modules"),
        ("sequences", f"{len(corpus.sequences):,} of at most {config.context} tokens"),
        ("tokens", f"{tokens:,}"),
        (
            "curvature",
            "EK-FAC of every matrix inside the blocks, labels from the model",
        ),
        ("damping", "0.1 × mean eigenvalue of each matrix"),
    ]


def _print(console: Console, scores: Scores, found: Check, run: store.Run) -> None:
    table = Table(
        title="What each completion's log-probability owes to training data",
        caption="predicted, removed: change in nats without the top 1 % of sequences, "
        "against as many random ones and BM25's",
    )
    for name in ("query", "first sequence"):
        table.add_column(name)
    for name in ("score", "predicted", "removed", "random", "BM25"):
        table.add_column(name, justify="right")
    for ranking, row in zip(scores.top(1), _rows(found), strict=True):
        (first,) = ranking
        numbers = [
            first.score,
            *(row[k] for k in ("predicted", "top", "random", "bm25")),
        ]
        table.add_row(ranking.query, first.id, *(f"{x:+.3g}" for x in numbers))
    console.print(table)
    console.print(
        f"Signs agree on {found.same_sign} of {len(found.queries)}; rank correlation "
        f"over queries {found.rank_correlation:.2f}; the median query falls by "
        f"{found.deviations:.1f} standard deviations of random removal."
    )
    console.print(f"The page: {run.path('report.html')}", markup=False, soft_wrap=True)
