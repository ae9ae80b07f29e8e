"""Does an index find what a scan of everything ranks first?

    python -m experiments.index_recall [--sequences 100000] [--queries 40]

A small decoder is trained on the Python sources of this environment; a run is fitted to
them, scanned for what held-out sources go on with, and indexed. Recall is the share of
a query's 10 (or 100) highest sequences among those that are looked up, and then scored
exactly. Beside it vectors of the same size as LoGra and TrackStar make them (a random
projection of either side of every matrix, and one onto the leading eigenvectors), which
are given the number of numbers that are bytes here, unrounded.

Takes about half an hour on two cores, and goes on where it was stopped.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.results import figure, write
from experiments.small_model import Model as Trained
from experiments.small_model import continuations, decoder, model, read
from influence.attribution import countsketch, sketch
from influence.attribution.measurements import completions
from influence.model.train import Recipe
from influence.model.transformer import Apply
from influence.runtime import formats
from influence.runtime.allocator import keep_memory
from influence.runtime.coding import Codes
from influence.runtime.lookup import KINDS, Lookup
from influence.runtime.models import given
from influence.runtime.run.asking import query
from influence.runtime.run.fitting import curvature_of, fit
from influence.runtime.run.found import found
from influence.runtime.run.indexing import (
    codes_at,
    codes_of,
    index,
    lookup_at,
    noted,
)
from influence.runtime.run.job import MODEL, Job, Models, opened_job
from influence.runtime.run.ledger import opened
from influence.runtime.run.options import (
    Data,
    Fit,
    Index,
    Kind,
    Packing,
    Query,
    Scan,
    Search,
    Sides,
)
from influence.runtime.run.scanning import scan
from influence.runtime.run.searching import search

VOCABULARY, CONTEXT, PROMPT = 1024, 32, 16
SIZE = 512
"""Bytes a sequence, of what is compared with others."""

WAYS: tuple[tuple[int, Sides, tuple[Kind, ...]], ...] = (
    (128, "both", ("flat",)),
    (256, "both", ("flat",)),
    (SIZE, "leading", ("flat",)),
    (2 * SIZE, "leading", ("flat",)),
    (SIZE, "both", get_args(Kind)),
)
"""Bytes a sequence, the sides that are turned, and how vectors are looked up."""

CANDIDATES = (200, 1000)
BATCH = 64
QUIET = Console(quiet=True)


class Row(NamedTuple):
    """What was found of one index."""

    vectors: str
    bytes: int
    index: str
    candidates: int
    recall_at_10: float
    recall_at_100: float
    milliseconds: float | None


def recall(places_QxC: np.ndarray, scores_QxN: np.ndarray, top: int) -> float:
    """Returns the share of each query's highest that is among some places."""
    best = np.argsort(-scores_QxN, axis=1, kind="stable")[:, :top]
    pairs = zip(best, places_QxC, strict=True)
    return float(np.mean([np.isin(x, y).mean() for x, y in pairs]))


def looked_up(
    find: Lookup, v_QxK: np.ndarray, scores_QxN: np.ndarray, about: tuple[str, int, str]
) -> Iterator[Row]:
    """Yields what one way to look vectors up finds, and how long a look-up takes."""
    for count in CANDIDATES:
        places, took = [], []
        for v_K in v_QxK:
            begun = time.perf_counter()
            places.append(find(v_K[None], count).places[0])
            took.append(time.perf_counter() - begun)
        found_ = np.stack(places)
        yield Row(
            *about,
            count,
            recall(found_, scores_QxN, 10),
            recall(found_, scores_QxN, 100),
            1000 * float(np.median(took)),
        )


def others(
    trained: Trained, job: Job, questions: Mapping[str, Any], scores_QxN: np.ndarray
) -> Iterator[Row]:
    """Yields what projections of either side of every matrix find."""
    packed = job.corpus(job.model(MODEL)).packed
    batches = job.batches(packed, BATCH)
    curvature = curvature_of(job, job.noted(f"curvature of {MODEL}")["files"])
    asked = completions(trained.task, questions)
    matrices = sum(int(np.prod(x.stack)) for x in curvature.layers)
    rank = int((SIZE / matrices) ** 0.5)
    random = sketch.random(curvature.layers, rank)
    leading = sketch.leading(curvature, rank)
    for name, projection, normalise in (
        ("LoGra, random", random, False),
        ("TrackStar, random", random, True),
        ("LoGra, leading eigenvectors", leading, False),
    ):
        guess = sketch.logra(
            trained.task, trained.params, projection, asked, batches,
            normalise=normalise,
        ).values  # fmt: skip
        for count in CANDIDATES:
            places = np.argsort(-guess, axis=1)[:, :count]
            yield Row(
                name, rank * rank * matrices, "everything", count,
                recall(places, scores_QxN, 10), recall(places, scores_QxN, 100), None,
            )  # fmt: skip


def ours(folder: Path, own: Models, job: Job, scores_QxN: np.ndarray) -> Iterator[Row]:
    """Yields what count sketches find, made and looked up in several ways."""
    solved = job.ledger.run.read("model/queries.safetensors", formats.read_query)
    curvature = curvature_of(job, job.noted(f"curvature of {MODEL}")["files"])
    for size, sides, kinds in WAYS:
        for kind in kinds:
            way = Index(folder, size=size, kind=kind, sides=sides, batch=BATCH)
            index(way, Console(), own)
            entry = opened(folder).stages["index of texts"]
            sketched = noted(entry, curvature).sketch
            v_QxK = -np.asarray(countsketch.asked(sketched, solved), np.float32)
            codes = codes_of(job, "texts")
            path = folder / lookup_at("texts", kind)
            whole = kept_bytes(codes, codes_at(job, "texts"), path)
            find = KINDS[kind].open(codes, path)
            said = ", leading directions" if sides == "leading" else ""
            about = (f"count sketch, signs{said}", whole, kind)
            yield from looked_up(find, v_QxK, scores_QxN, about)


def kept_bytes(codes: Codes, vectors: Path, beside: Path) -> int:
    """Returns how many bytes a sequence has on the disk, look-up included."""
    size = vectors.stat().st_size + (beside.stat().st_size if beside.exists() else 0)
    return round(size / len(codes))


def prepared(work: Path, sequences: int, queries: int) -> tuple[Trained, Any]:
    """Returns a trained decoder and questions, its corpus written."""
    corpus = read(VOCABULARY, CONTEXT, sequences, queries)
    config = decoder(64, 2, VOCABULARY, CONTEXT)
    steps = max(100, min(1500, 2 * len(corpus.train_NxT) // BATCH))
    trained = model(config, corpus.train_NxT, Recipe(steps, BATCH, 3e-3), 0)
    rows = [json.dumps({"ids": x.tolist()}) + "\n" for x in corpus.train_NxT]
    (work / "texts.jsonl").write_text("".join(rows))
    questions = continuations(corpus.held_MxT, queries, PROMPT)
    said = [
        json.dumps({"name": k, "prompt": x, "completion": y}) + "\n"
        for k, (x, y) in questions.items()
    ]
    (work / "questions.jsonl").write_text("".join(said))
    (work / "question.jsonl").write_text(said[0])
    own = given(Apply(config), trained.params, vocabulary=VOCABULARY, context=CONTEXT)
    return trained, ({MODEL: own}, questions)


def main() -> None:
    """Prints the table, writes it and its figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sequences", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--samples", type=int, default=4000, help="fitted to")
    parser.add_argument("--work", type=Path, default=Path("runs/index_recall"))
    asked, console = parser.parse_args(), Console(width=120)
    keep_memory()
    work = asked.work
    work.mkdir(parents=True, exist_ok=True)
    trained, (own, questions) = prepared(work, asked.sequences, asked.queries)
    console.print(f"the decoder's loss: {trained.loss:.3f} nats a token")
    folder = work / "run"
    data = Data(str(work / "texts.jsonl"), text_column="ids")
    packing = Packing(context=CONTEXT, separator="none", apart=True)
    fit(
        Fit(folder, "given", data, packing, samples=asked.samples, batch=BATCH,
            layers=("blocks.*",)), console, own,
    )  # fmt: skip
    query(Query(folder, queries=work / "questions.jsonl"), console, own)
    scan(Scan(folder, keep="totals", batch=BATCH), console, own)
    job = opened_job(opened(folder), QUIET, own)
    scores = found(job).total().transpose("query", "train").values
    rows = list(ours(folder, own, job, scores))
    rows += others(trained, job, questions, scores)
    index(Index(folder, size=SIZE, kind="flat", batch=BATCH), console, own)
    one = Search(folder, queries=work / "question.jsonl", top=1)
    for _ in range(2):  # the second finds everything compiled
        took = search(one, QUIET, own).seconds
    table = Table(title=f"{scores.shape[1]:,} sequences, {len(scores)} queries")
    for name in Row._fields:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row))
    console.print(table)
    console.print({k: f"{x:.3f} s" for k, x in took.items()})
    settings = {**vars(asked), "work": None, "loss": trained.loss, "search": took}
    write("index_recall", seed=0, settings=settings, rows=[x._asdict() for x in rows])
    draw(rows)
    shutil.rmtree(folder / "saves", ignore_errors=True)


def draw(rows: list[Row]) -> None:
    """Draws recall against bytes."""
    with figure("index_recall", columns=len(CANDIDATES)) as panels:
        for axes, count in zip(panels, CANDIDATES, strict=True):
            for name in dict.fromkeys((x.vectors, x.index) for x in rows):
                own = [
                    x
                    for x in rows
                    if (x.vectors, x.index) == name and x.candidates == count
                ]
                axes.plot(
                    [x.bytes for x in own],
                    [x.recall_at_10 for x in own],
                    "s" if name[1] == "everything" else "o-",
                    label=", ".join(name),
                )
            axes.set_xlabel("bytes a sequence")
            axes.set_title(f"of {count} candidates")
            axes.set_ylim(0, 1.02)
        panels[0].set_ylabel("recall of the ten highest")
        panels[0].legend(fontsize=6)


if __name__ == "__main__":
    main()
