"""`influence evaluate removal`: is what ranks first what the model owes it to?"""

import numpy as np
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from influence.attribution.lexical import bm25
from influence.runtime import formats
from influence.runtime.evaluating.bench import Bench, opened_bench
from influence.runtime.evaluating.options import Removal
from influence.runtime.recipes import read_recipe
from influence.runtime.run.asking import Question, chosen, question_tokens
from influence.runtime.run.job import Models
from influence.runtime.run.ledger import locked
from influence.runtime.run.options import check_numbers
from influence.truth.removal import curve

POINTS = 6
"""How many points a curve has at most."""

TITLES = {"top": "top by score", "random": "random others", "bm25": "top by BM25"}


def remove(
    options: Removal, console: Console | None = None, given: Models | None = None
) -> xr.Dataset:
    """Retrains without a question's top sequences, random ones and BM25's.

    Args:
      options: the run, how its model was trained, and the question.
      console: where to show what happens, and the table.
      given: models by role, as for `fit`; one may be what training began with.

    Returns:
      `predicted` and `measured`, `(ranking, count)`, changes in nats.

    Raises:
      ValueError: if the recipe, the question and the run do not go together.
      FileNotFoundError: if the run has no scores.

    Example:
      >>> from influence.runtime.evaluating.options import Removal
      >>> from influence.runtime.evaluating.removing import remove
      >>> found = remove(Removal(done, how, query="3", top=2), quiet, begun)
      >>> found["count"].values.tolist(), found.removed.sel(ranking="top").values[0]
      ([1, 2], 'corpus:0:0')
    """
    check_numbers(options)
    trained = read_recipe(options.recipe)
    with locked(options.run):
        bench = opened_bench(options.run, trained, options.save_every, console, given)
        (question,) = chosen(bench.questions, options.query)
        _check_top(options.top, len(bench.training.examples))
        found = _removed(bench, options, question)
        bench.job.console.print(_table(question, found))
    return found


def _check_top(top: int, sequences: int) -> None:
    if 2 * top > sequences:
        raise ValueError(
            f"--top {top} of {sequences} sequences can't be removed and compared with "
            f"as many others. Give {sequences // 2} at most."
        )


def _removed(bench: Bench, options: Removal, question: Question) -> xr.Dataset:
    """Returns a question's curve; retrains unless that was done."""
    job, number = bench.job, 1 + bench.questions.index(question)
    name = f"truth/removal-{number}.zarr"
    stage = bench.stage(
        f"removal for question {number}",
        **bench.checksum,
        top=str(options.top),
        draw=str(options.draw),
        at_once=str(options.at_once),
    )
    if not job.ledger.finished(stage, job.folder / name):
        job.begin(stage)
        found = curve(
            bench.training,
            bench.trained.seed,
            bench.measurements[question.name],
            bench.scores.sel(query=question.name),
            counts(options.top),
            lexical=_lexical(bench, question),
            draw=options.draw,
            at_once=options.at_once,
            run=job.saving(stage, bench.every),
        )
        job.ledger.run.write(name, formats.write_scores(found))
        job.ledger.finish(stage)
    job.forget(stage)
    return job.ledger.run.read(name, formats.read_scores)


def counts(top: int) -> list[int]:
    """Returns how many sequences are removed: from one to all, by equal factors."""
    return sorted({round(x) for x in np.geomspace(1, top, POINTS)})


def _lexical(bench: Bench, question: Question) -> xr.DataArray:
    prompt, completion = question_tokens(bench.model, question, question.completion)
    packed = bench.corpus.packed
    tokens = [packed.tokens_at(i).tolist() for i in range(len(packed))]
    words = {question.name: [*prompt, *completion]}
    return bm25(words, tokens, list(packed.ids)).sel(query=question.name)


def _table(question: Question, found: xr.Dataset) -> Table:
    """Returns a curve as a table: changes, predicted and measured."""
    table = Table(
        title=f"{escape(str(question))}\nchange of its log-probability in nats, "
        "predicted → measured, without",
        title_justify="left",
    )
    table.add_column("sequences", justify="right")
    for ranking in found["ranking"].values:
        table.add_column(TITLES[str(ranking)], justify="right")
    for count in found["count"].values:
        at = found.sel(count=count)
        pairs = zip(at.predicted.values, at.measured.values, strict=True)
        table.add_row(str(count), *(f"{x:+.3g} → {y:+.3g}" for x, y in pairs))
    return table
