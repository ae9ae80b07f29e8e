"""How little work gives the same ranking, and how much time does that save?

    python -m experiments.equal_fidelity --reference DIR --timed FILE
        [--config small|medium]

Two ways to do less: to fit the curvature to some of the sequences, and to answer from
an index, a vector a sequence, instead of a second pass over the corpus; made with both
sides of matrices turned into the eigenbasis, or of longer ones the leading directions
alone. Every way's scores are held against those of a curvature fitted to all, with the
same sampled labels and exact gradients: Spearman's correlation over the sequences,
query by query.
Of the medium model, which `DIR` has no weights of, some steps of training come first.

What it saves is put together from the stages that `experiments.bench_engine` timed on a
machine (`--timed experiments/results/bench_engine_*.json`), ours and kronfluence's, for
the sequences and queries asked for; what an index takes is timed here. kronfluence is
given the same subsampling in a row of its own; it has no index.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import influence
from experiments import results
from experiments.alike import compared
from experiments.bench_engine import FITTING, OURS, SIZES, job
from experiments.contender import Data, Job, data, measured
from experiments.reference import GPT, Counted, examples
from influence.attribution import countsketch
from influence.attribution.measurements import likelihoods
from influence.attribution.query import Query
from influence.curvature.operator import Curvature
from influence.model import train
from influence.model.examples import Examples
from influence.model.train import Order, Recipe
from influence.runtime.coding import Codes, encode
from influence.runtime.driver import Driver
from influence.runtime.lookup import Hits, flat
from influence.runtime.run.indexing import Made, made_with
from influence.runtime.run.options import Sides
from influence.types import Batch, Params

ENOUGH = 0.99
"""Spearman's correlation, averaged over queries, from which a ranking is the same."""

FEWER = (2, 4, 8, 10, 12, 14, 16, 32)
"""One of so many sequences is fitted to."""

EVERY = 1 << 40
"""Bytes that have room for every coordinate."""

INDEXES: tuple[tuple[Sides, int], ...] = (
    ("both", 16384),
    ("both", 65536),
    ("both", 262144),
    ("leading", 16384),
    ("leading", 65536),
    ("leading", 262144),
    ("leading", EVERY),
)
"""What is indexed: along which eigenvectors, and bytes a sequence at most."""

OF_LESS = INDEXES[-2:]
"""With curvature fitted to less."""

PEER = "kronfluence"


class Setting(NamedTuple):
    """A model, what it is fitted to, what is scored of that, and its questions."""

    task: Counted
    params: Params
    layers: list[str]
    train: Examples
    scored: Examples
    asked: Mapping[str, Any]
    batch: int
    damping: float


class Row(NamedTuple):
    """How well one way does.

    Attributes:
      fitted: how many sequences the curvature was fitted to.
      bytes: of an index, a sequence; None where gradients were exact.
      sides: along which eigenvectors it is made.
      spearman: with the full fit's exact scores, averaged over queries.
      least: that of the query with the lowest.
      indexing: processor seconds to choose directions and index all sequences.
      lookup: processor seconds to make all queries short and look them up, in an index.
    """

    fitted: int
    bytes: int | None
    sides: Sides | None
    spearman: float
    least: float
    indexing: float = 0.0
    lookup: float = 0.0


class Saving(NamedTuple):
    """What one way takes, in processor seconds.

    Attributes:
      who: does it.
      fitted: how many sequences the curvature is fitted to.
      bytes: of an index, a sequence; None if the corpus is scanned for every set of
        queries.
      sides: along which eigenvectors it is made.
      one: for the scores of one set of queries, from the beginning.
      two: and of a second one after it.
    """

    who: str
    fitted: int
    bytes: int | None
    sides: Sides | None
    one: float
    two: float


def main(
    reference: Path,
    timed: Path,
    config: Literal["small", "medium"] = "small",
    sequences: int = 1024,
    scored: int = 256,
    steps: int = 200,
) -> None:
    """Prints both tables and writes them.

    Args:
      reference: the reference folder.
      timed: what stages take, as `bench_engine --peers --json` says in its last line.
      config: which model.
      sequences: how many there are to fit to and to score.
      scored: of how many of them, spread over all, scores are compared.
      steps: of training, where the reference has no weights.
    """
    console = Console(width=120)
    stages = stages_in(timed)
    setting = prepared(reference, config, sequences, scored, steps)
    rows, progress = [], Console(stderr=True, width=120)
    for row in measure(setting):
        progress.print(row, highlight=False)  # All of them take an hour.
        rows.append(row)
    console.print(shown("fidelity", Row._fields, rows))
    context = SIZES[config]["context"]
    found = list(savings(rows, stages, context, sequences, len(setting.asked)))
    console.print(shown("processor seconds", Saving._fields, found))
    results.write(
        f"equal_fidelity_{config}",
        seed=0,
        settings={
            "sequences": sequences,
            "scored": scored,
            "steps": steps,
            "timed": timed.name,
            "enough": ENOUGH,
        },
        rows={
            "fidelity": [x._asdict() for x in rows],
            "savings": [x._asdict() for x in found],
        },
    )


def stages_in(timed: Path) -> dict[str, Any]:
    """Returns what the stages take.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a stage that is needed, or the peer, is not in it.
    """
    if not timed.exists():
        raise FileNotFoundError(
            f"{timed} is not there, which says what stages take. Keep the last line of "
            "experiments.bench_engine --peers --json there."
        )
    stages = json.loads(timed.read_text())["stages"]
    missing = [x for x in (*FITTING, "query", "scan") if x not in stages]
    if missing or PEER not in stages["scan"]["peers"]:
        raise ValueError(
            f"{timed} does not say what {', '.join(missing) or PEER} takes. Make it "
            "again, with experiments.bench_engine --peers --json."
        )
    return stages


def shown(title: str, heads: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> Table:
    """Returns rows as a table."""
    table = Table(*heads, title=title)
    for row in rows:
        cells = (f"{x:.4g}" if isinstance(x, float) else f"{x or ''}" for x in row)
        table.add_row(*cells)
    return table


class Rates(NamedTuple):
    """What one contender takes.

    Attributes:
      stages: by name, as `bench_engine` wrote them.
      context: tokens a sequence.
    """

    stages: Mapping[str, Any]
    context: int

    def took(self, stage: str, sequences: int) -> float:
        """Returns the seconds a stage takes for so many sequences."""
        return sequences * self.context / self.stages[stage]["tokens_per_cpu_second"]

    def fit(self, sequences: int) -> float:
        """Returns the seconds it takes to fit to so many."""
        passes = self.took("covariance", sequences) + self.took(
            "eigenvalues", sequences
        )
        return passes + self.stages["eigendecomposition"]["cpu_seconds"]


def savings(
    rows: Sequence[Row], stages: Mapping[str, Any], context: int, train: int, asked: int
) -> Iterator[Saving]:
    """Yields what it takes to rank all sequences as the full fit does, way by way.

    Everything done in full, the fewest sequences that are good enough, and every index
    that is.

    Args:
      rows: how well each does.
      stages: what the stages took, as `bench_engine` wrote it.
      context: tokens a sequence.
      train: how many sequences there are.
      asked: how many queries.
    """
    good = [x for x in rows if x.spearman >= ENOUGH]
    fewest = min((x.fitted for x in good if x.bytes is None), default=train)
    theirs = {k: x["peers"][PEER] for k, x in stages.items() if PEER in x["peers"]}
    for who, own in ((PEER, theirs), (OURS, stages)):
        rates = Rates(own, context)
        answer = rates.took("query", asked) + rates.took("scan", train)
        for count in (train, fewest):
            fit = rates.fit(count)
            yield Saving(who, count, None, None, fit + answer, fit + 2 * answer)
    for x in good:
        if x.sides is not None:
            first = rates.fit(x.fitted) + x.indexing
            answer = rates.took("query", asked) + x.lookup
            one, two = first + answer, first + 2 * answer
            yield Saving(OURS, x.fitted, x.bytes, x.sides, one, two)


def prepared(
    reference: Path, config: str, sequences: int, scored: int, steps: int
) -> Setting:
    """Returns a trained model with its data."""
    work = job(reference, config, sequences=sequences)
    of = data(work)
    task = Counted(GPT(work.blocks, work.heads))
    params = {k: jnp.asarray(x) for k, x in of.params.items()}
    if work.folder is None:
        of = text(reference / "small", work, of)
    rows = examples(of.train, np.ones(of.train.shape, bool), "train")
    asked = examples(of.queries, np.ones(of.queries.shape, bool), "query")
    if work.folder is None:
        params = trained(task, params, rows, steps)
    return Setting(
        task,
        params,
        [f"{name}.weight" for name in work.names()],
        rows,
        spread(rows, scored),
        likelihoods(task, asked),
        work.size(OURS, "scan"),
        work.damping,
    )


def text(folder: Path, work: Job, of: Data) -> Data:
    """Returns a random model's data with the reference text in place of random ids."""
    ids = [np.load(folder / f"{kind}_ids.npy") for kind in ("train", "query")]
    train, queries = (x.reshape(-1, work.context).astype(np.int32) for x in ids)
    if len(train) < work.sequences or len(queries) < work.queries:
        raise ValueError(
            f"{folder} has text for {len(train)} sequences and {len(queries)} queries "
            f"of {work.context} tokens, fewer than {work.sequences} and {work.queries}."
        )
    return of._replace(train=train[: work.sequences], queries=queries[: work.queries])


def trained(task: Counted, params: Any, rows: Examples, steps: int) -> Any:
    """Returns parameters after a few steps of training."""
    recipe = Recipe(steps, batch=4, rate=1e-3, warmup=0.1)
    fold = train.fold(task, recipe, params, rows, np.ones(len(rows)))
    order = Order(len(rows), recipe, 0)
    return Driver(Console(quiet=True)).run(fold, order).params


def measure(of: Setting) -> Iterator[Row]:
    """Yields how well every way does."""
    n = len(of.train)
    solved = asked(of, n)
    exact_QxN = scored(of, solved[1])
    for index in INDEXES:
        yield indexed(of, solved, exact_QxN, *index)
    for part in FEWER:
        solved = asked(of, n // part)
        like = alike(scored(of, solved[1]), exact_QxN)
        exact = Row(n // part, None, None, *like)
        yield exact
        if exact.spearman < ENOUGH:
            break
        for index in OF_LESS:
            yield indexed(of, solved, exact_QxN, *index)


def spread(rows: Examples, count: int) -> Examples:
    """Returns so many examples, spread over all."""
    places = np.linspace(0, len(rows) - 1, min(count, len(rows)))
    return rows.take(places.round().astype(int))


def asked(of: Setting, count: int) -> tuple[Curvature, Query]:
    """Returns the curvature of some sequences, and the questions solved with it."""
    batches = spread(of.train, count).batches(of.batch)
    curvature = influence.fit(
        of.task, of.params, batches, layers=of.layers, labels=influence.Sampled()
    )
    solver = influence.Eigenbasis(influence.Relative(of.damping))
    return curvature, influence.query(curvature, of.params, of.asked, solver=solver)


def scored(of: Setting, query: Query) -> np.ndarray:
    """Returns exact scores, `[Q, N]`."""
    batches = of.scored.batches(of.batch)
    found = influence.scan(of.task, of.params, query, batches, by_layer=False)
    return np.asarray(found.total)


def indexed(
    of: Setting,
    solved: tuple[Curvature, Query],
    exact_QxN: np.ndarray,
    sides: Sides,
    size: int,
) -> Row:
    """Returns how well an index of so many bytes a sequence does by itself.

    What is timed is done before, a little of it, so that compiling is not counted.
    """
    curvature, query = solved
    batches = list(of.scored.batches(of.batch))
    made: list[Made] = []
    rows: list[np.ndarray] = []
    short: list[np.ndarray] = []
    found: list[Hits] = []

    def choose() -> None:
        made.append(made_with(curvature, size, of.damping, sides))
        jax.block_until_ready(made[-1].sketch.scales)

    def read(batches: Sequence[Batch]) -> None:
        sketch, bits = made[-1]
        one = countsketch.reader(of.task, of.params, sketch)
        rows.extend(encode(np.asarray(one(x))[x.real_B], bits) for x in batches)

    def ask() -> None:
        short.append(-np.asarray(countsketch.asked(made[-1].sketch, query), np.float32))

    choose()
    choice = measured(choose)
    read(batches[:1])
    rows.clear()
    reading = measured(lambda: read(batches))
    codes = Codes(np.concatenate(rows), made[-1].bits)
    find = flat(codes)
    ask()
    asking = measured(ask)
    cost = measured(lambda: found.append(find(short[-1], len(codes))))
    guess_QxN = np.empty_like(exact_QxN)
    np.put_along_axis(guess_QxN, found[0].places, found[0].products, axis=1)
    # Every sequence takes as long as any other, to be read and to be compared with.
    more = len(of.train) / len(codes)
    return Row(
        curvature.sequences,
        codes.rows.shape[1],
        sides,
        *alike(guess_QxN, exact_QxN),
        choice.cpu_seconds + more * reading.cpu_seconds,
        asking.cpu_seconds + more * cost.cpu_seconds,
    )


def alike(found_QxN: np.ndarray, exact_QxN: np.ndarray) -> tuple[float, float]:
    """Returns how like two sets of scores are ranked: on average, and at worst."""
    like = compared(found_QxN, exact_QxN)
    return like["spearman, mean of queries"], like["spearman, worst query"]


if __name__ == "__main__":
    tyro.cli(main)
