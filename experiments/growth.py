"""A hundred times as many sequences take a hundred times as long, and no more memory.

    python -m experiments.growth --upto 100000

Fits, asks and scans in one process: a small decoder, Python's sources byte by byte in
sequences of 32, packed on disk and read as they are needed; scores are written to disk
batch by batch. From a thousand sequences up, and for 1 to 256 queries. Programs are
compiled before anything is timed. Taken are processor seconds (other users of the
machine do not count), seconds on the clock, and the process's peak memory.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from rich.console import Console

import influence
from experiments import results
from experiments.contender import Cost, let_go, measured
from experiments.material import random_llama, sources
from influence.attribution.measurements import Measurement
from influence.attribution.query import Query
from influence.attribution.scan import reader
from influence.curvature import covariance, eigenvalues, eigenvectors
from influence.curvature.covariance import PerToken
from influence.linalg.kronecker import Kronecker
from influence.model.config import Config
from influence.model.trace import select, trace
from influence.model.transformer import Apply
from influence.runtime import formats
from influence.runtime.allocator import one_arena
from influence.runtime.corpus.pack import pack
from influence.runtime.corpus.packed import Packed, PackedBatches
from influence.runtime.corpus.plan import Plan
from influence.runtime.corpus.source import open_source
from influence.runtime.driver import Driver
from influence.types import Layer, Params

CONTEXT, END = 32, 256

CONFIG = Config(
    vocabulary=257, context=CONTEXT, width=32, hidden=64, heads=4, blocks=2, groups=2
)

BATCH, FEWEST = 64, 1000
"""Sequences a batch, and in the smallest corpus."""

QUERIES = (1, 4, 16, 64, 256)

ASKED = 16
"""While the corpus grows."""

QUERIED = 10_000
"""Sequences scanned at the most while the number of queries grows."""

FLAT, LINEAR = 1.1, 1.25
"""How much more memory, and how much more time a token, counts as none."""


class Setting(NamedTuple):
    """A model, and what is read of it."""

    task: influence.LanguageModel
    params: Params
    layers: tuple[Layer, ...]


def documents(tokens: int) -> Iterator[dict[str, list[int]]]:
    """Yields sources as bytes, over and over, until there are so many of them."""
    while True:
        for text in sources():
            ids = list(text.encode())
            yield {"ids": ids}
            tokens -= len(ids) + 1
            if tokens <= 0:
                return


def packed(folder: Path, sequences: int) -> Packed:
    """Returns at least so many sequences, packed on disk."""
    path = folder / "corpus.jsonl"
    formats.write_corpus(documents(sequences * CONTEXT))(path)
    source = open_source(path, column="ids")
    return pack(source, None, folder / "packed", Plan(CONTEXT, separator=END))


def setting(batches: PackedBatches) -> Setting:
    """Returns a small decoder, and every matrix of its blocks."""
    task = influence.LanguageModel(Apply(CONFIG), CONTEXT)
    params = random_llama(CONFIG)
    program = trace(task.outputs, params, next(iter(batches)).inputs)
    return Setting(task, params, select(program, "blocks.*"))


def fit(of: Setting, batches: PackedBatches) -> influence.Curvature:
    """Returns the curvature, from two passes."""
    # Waits for the device now and then: batches handed on unread would pile up.
    run = Driver(Console(quiet=True)).run
    labels, factors = influence.Sampled(), PerToken()
    about = (of.task, of.params, of.layers, labels)
    moments = run(covariance.fold(*about, factors), batches)
    folded = eigenvectors.fold(of.layers, factors, moments)
    bases = run(folded, eigenvectors.sides(of.layers))
    lam = run(eigenvalues.fold(*about, bases), batches)
    blocks = {
        x.name: Kronecker(bases.inputs[x.reads], bases.outputs[x.name], lam.lam[x.name])
        for x in of.layers
    }
    return influence.Curvature(of.layers, blocks, 0, lam.sequences, str(labels))


def questions(of: Setting, corpus: Packed, many: int) -> Mapping[str, Measurement]:
    """Returns questions: why the second half of a sequence follows the first?"""
    half = CONTEXT // 2
    asked = {}
    for i in range(many):
        tokens = corpus.tokens_at(7 * i).tolist()
        asked[f"question {i}"] = (tokens[:half], tokens[half:])
    return influence.completions(of.task, asked)


def scan(of: Setting, query: Query, batches: PackedBatches, path: Path) -> None:
    """Writes the score of every sequence for every query, through every layer."""
    read = reader(of.task, of.params, query)
    with path.open("wb") as file:
        for batch in batches:
            np.asarray(read(batch)).tofile(file)
    path.unlink()


class Row(NamedTuple):
    """One measurement: what was done, to how much, what it took."""

    stage: str
    sequences: int
    queries: int
    cost: Cost

    @property
    def record(self) -> dict[str, Any]:
        """Returns it as a result has it."""
        tokens = self.sequences * CONTEXT
        each = 1e6 / tokens
        return {
            "stage": self.stage,
            "sequences": self.sequences,
            "tokens": tokens,
            "queries": self.queries,
            "seconds": self.cost.seconds,
            "cpu_seconds": self.cost.cpu_seconds,
            "cpu_microseconds_a_token": each * self.cost.cpu_seconds,
            "megabytes": self.cost.peak_mb,
        }


def rows(folder: Path, upto: int, say: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Yields every measurement, the largest corpus last."""
    sizes = [int(x) for x in 10.0 ** np.arange(3, 9) if FEWEST <= x <= upto]
    corpus = packed(folder, sizes[-1])
    first = corpus.take(range(BATCH)).batches(BATCH)
    of, scores = setting(first), folder / "scores"
    fitted = fit(of, first)
    asked = questions(of, corpus, max(QUERIES))

    def query(many: int) -> Query:
        chosen = dict(list(asked.items())[:many])
        return jax.block_until_ready(influence.query(fitted, of.params, chosen))

    def done(stage: str, sequences: int, queries: int, work: Callable[[], Any]) -> dict:
        let_go()  # The next stage grows from the same.
        found = Row(stage, sequences, queries, measured(work)).record
        say(found)
        return found

    # From few to many, so that the peak of what is larger can't hide in what was.
    for many in QUERIES:
        posed = query(many)
        scan(of, posed, first, scores)
        part = corpus.take(range(min(QUERIED, sizes[-1]))).batches(BATCH)
        yield done(
            "scan", len(part.ids), many, lambda x=posed, y=part: scan(of, x, y, scores)
        )
    posed = query(ASKED)
    for size in sizes:
        part = corpus.take(range(size)).batches(BATCH)
        yield done("fit", size, 0, lambda x=part: fit(of, x))
        yield done("scan", size, ASKED, lambda x=part: scan(of, posed, x, scores))


def over(
    found: Sequence[Mapping[str, Any]], stage: str, queries: int
) -> list[Mapping[str, Any]]:
    """Returns a stage's measurements over growing corpora; the last of equal ones."""
    own = {
        x["sequences"]: x
        for x in found
        if x["stage"] == stage and x["queries"] == queries
    }
    return [own[k] for k in sorted(own)]


def claims(found: Sequence[Mapping[str, Any]]) -> list[results.Claim]:
    """Returns what was promised, and what came of it."""
    said = []
    for stage, queries in (("fit", 0), ("scan", ASKED)):
        first, *_, last = over(found, stage, queries)
        what = "cpu_microseconds_a_token"
        times, more = last[what] / first[what], last["megabytes"] / first["megabytes"]
        range_ = f"{first['sequences']:,} to {last['sequences']:,} sequences"
        linear = f"×{times:.2f} processor time a token, {range_}"
        flat = f"×{more:.3f}, {range_}"
        said += [
            results.Claim(f"{stage}: linear time", linear, times < LINEAR),
            results.Claim(f"{stage}: flat memory", flat, more < FLAT),
        ]
    return said


def draw(found: Sequence[Mapping[str, Any]]) -> None:
    """Draws time a token and memory over sequences, and over queries."""
    with results.figure("growth", columns=4) as panels:
        by_queries = {x["queries"]: x for x in found if x["stage"] == "scan"}
        asked = [x for x in found if x["stage"] == "scan"][: len(by_queries)]
        drawn = [
            ("cpu_microseconds_a_token", "processor µs a token"),
            ("megabytes", "peak MB of the process"),
        ]
        for i, (what, title) in enumerate(drawn):
            for stage, queries in (("fit", 0), ("scan", ASKED)):
                own = over(found, stage, queries)
                at = [x["sequences"] for x in own]
                panels[i].plot(at, [x[what] for x in own], "o-", label=stage)
            at = [x["queries"] for x in asked]
            panels[i + 2].plot(at, [x[what] for x in asked], "o-", label="scan")
            panels[i + 2].set_xlabel("queries")
            panels[i].set_xlabel("sequences")
            for axes in (panels[i], panels[i + 2]):
                axes.set_title(title)
        for axes in panels:
            axes.set_xscale("log")
            axes.set_ylim(bottom=0)
            axes.legend()


def main(upto: int = 100_000) -> None:
    """Measures growing corpora, and growing numbers of queries.

    Args:
        upto: Sequences in the largest corpus.
    """
    if upto < 10 * FEWEST:
        raise ValueError(f"--upto {upto} shows no growth. Give {10 * FEWEST} at least.")
    one_arena()  # As the command line has it.
    with tempfile.TemporaryDirectory() as name:
        found = list(rows(Path(name), upto, Console(stderr=True).print))
    said = claims(found)
    about = {
        "context": CONTEXT,
        "batch": BATCH,
        "upto": upto,
        "layers": "blocks.*",
        "config": vars(CONFIG) | {"rotary": str(CONFIG.rotary)},
    }
    results.write("growth", seed=0, settings=about, rows=found, claims=said)
    draw(found)
    Console().print(results.table(said))


if __name__ == "__main__":
    tyro.cli(main)
