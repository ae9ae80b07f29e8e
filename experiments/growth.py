"""Ten times as many sequences take ten times as long, and no more memory.

    python -m experiments.growth --upto 100000

Carries out `fit`, `query` and `scan` from the command line, on a small Llama and
Python's sources cut into sequences of 32 tokens: from a thousand sequences up, and for
1 to 256 queries. Each command is a process of its own; taken are its processor seconds
and its peak of anonymous memory. What a corpus of one batch takes is the start:
importing, compiling, decomposing. Linux only.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from tokenizers import Tokenizer

from experiments import results
from experiments.material import sources, write_random_llama
from experiments.process import Cost, measured
from influence.model.config import Config

CONTEXT = 32

CONFIG = Config(
    vocabulary=1024, context=CONTEXT, width=32, hidden=64, heads=4, blocks=2, groups=2
)

BATCH, FEWEST, LONGEST = 64, 1000, 20_000
"""Sequences a batch; in the smallest corpus; characters in the longest source."""

QUERIES = (1, 16, 256)

ASKED = 16
"""While the corpus grows."""

FLAT, LINEAR = 1.25, 1.5
"""How much more memory, and how much more time a token, counts as none."""


def write_sequences(path: Path, tokenizer: Path, wanted: int) -> int:
    """Writes sources that make at least so many sequences; returns how many tokens."""
    encode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode
    tokens = 0
    with path.open("w", encoding="utf-8") as file:
        while tokens < wanted * CONTEXT:
            # There is only so much text: a larger corpus begins from the front again.
            for text in sources(LONGEST):
                if tokens >= wanted * CONTEXT:
                    break
                file.write(json.dumps({"text": text}) + "\n")
                tokens += len(encode(text).ids) + 1
    return tokens


def write_questions(path: Path, many: int) -> None:
    """Writes so many questions: a line of a source, and the line after it."""
    asked = []
    for text in islice(sources(LONGEST), 4 * many):
        lines = [x[:40] for x in text.splitlines() if x.strip()]
        if len(lines) > 1 and len(asked) < many:
            asked.append({"prompt": lines[0][:20], "completion": lines[1][:20]})
    path.write_text("".join(json.dumps(x) + "\n" for x in asked), encoding="utf-8")


def fitted(folder: Path, corpus: Path, run: Path) -> Cost:
    """Returns what fitting to a whole corpus takes."""
    words = ["--model", str(folder / "llama"), "--data", str(corpus)]
    words += ["--samples", "100000000", "--context", str(CONTEXT)]
    return measured("fit", str(run), *words, "--batch", str(BATCH))


def asked(folder: Path, run: Path, many: int) -> tuple[Cost, Cost]:
    """Returns what solving for so many questions takes, and scanning for them."""
    path = folder / f"questions-{many}.jsonl"
    write_questions(path, many)
    solved = measured("query", str(run), "--queries", str(path))
    return solved, measured("scan", str(run), "--batch", str(BATCH))


def row(stage: str, sequences: int, tokens: int, queries: int, x: Cost) -> dict:
    """Returns one measurement."""
    return {
        "stage": stage,
        "sequences": sequences,
        "tokens": tokens,
        "queries": queries,
        "seconds": x.wall,
        "cpu_seconds": x.cpu,
        "megabytes": x.megabytes,
    }


def beyond(rows: Sequence[Mapping[str, Any]], stage: str) -> list[dict[str, Any]]:
    """Returns a stage over growing corpora, with its time a token beyond the start."""
    own = [x for x in rows if x["stage"] == stage and x["queries"] == ASKED]
    start, *rest = sorted(own, key=lambda x: x["sequences"])
    return [
        {
            **x,
            "microseconds_a_token": 1e6
            * (x["cpu_seconds"] - start["cpu_seconds"])
            / (x["tokens"] - start["tokens"]),
        }
        for x in rest
    ]


def claims(rows: Sequence[Mapping[str, Any]]) -> list[results.Claim]:
    """Returns what was promised, and what came of it."""
    found = []
    for stage in ("fit", "scan"):
        grown = beyond(rows, stage)
        first, last = grown[-2], grown[-1]
        times = last["microseconds_a_token"] / first["microseconds_a_token"]
        more = last["megabytes"] / first["megabytes"]
        said = f"{first['sequences']:,} to {last['sequences']:,} sequences"
        found += [
            results.Claim(
                f"{stage}: linear time", f"×{times:.2f} a token, {said}", times < LINEAR
            ),
            results.Claim(
                f"{stage}: flat memory", f"×{more:.2f}, {said}", more < FLAT
            ),
        ]
    return found


def draw(rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws time a token and memory over sequences, and over queries."""
    with results.figure("growth", columns=3) as (times, memory, queries):
        for stage in ("fit", "scan"):
            grown = beyond(rows, stage)
            at = [x["sequences"] for x in grown]
            each = [x["microseconds_a_token"] for x in grown]
            times.plot(at, each, "o-", label=stage)
            memory.plot(at, [x["megabytes"] for x in grown], "o-", label=stage)
        most = max(x["sequences"] for x in rows if x["queries"] != ASKED)
        for stage in ("query", "scan"):
            own = [x for x in rows if x["stage"] == stage and x["sequences"] == most]
            own.sort(key=lambda x: x["queries"])
            at = [x["queries"] for x in own]
            queries.plot(at, [x["cpu_seconds"] for x in own], "o-", label=f"{stage}, s")
            megabytes = [x["megabytes"] for x in own]
            queries.plot(at, megabytes, "o--", label=f"{stage}, MB")
        for axes, what, over in (
            (times, "processor µs a token, beyond the start", "sequences"),
            (memory, "peak anonymous MB", "sequences"),
            (queries, f"processor s; peak MB, {most:,} sequences", "queries"),
        ):
            axes.set_xscale("log")
            axes.set_ylim(bottom=0)
            axes.set_title(what)
            axes.set_xlabel(over)
            axes.legend()


def main(upto: int = 100_000) -> None:
    """Measures growing corpora, and growing numbers of queries.

    Args:
        upto: Sequences in the largest corpus.
    """
    say, rows = Console(stderr=True).print, []
    sizes = [BATCH, *(int(x) for x in 10.0 ** np.arange(3, 9) if FEWEST <= x <= upto)]
    queried = sizes[min(2, len(sizes) - 1)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_llama(folder / "llama", CONFIG)
        for size in sizes:
            corpus, run = folder / f"{size}.jsonl", folder / f"run-{size}"
            tokens = write_sequences(corpus, folder / "tokenizer", size)
            about = (size, tokens)
            rows.append(row("fit", *about, ASKED, fitted(folder, corpus, run)))
            say(rows[-1])
            for many in QUERIES if size == queried else (ASKED,):
                solved, scanned = asked(folder, run, many)
                rows.append(row("query", *about, many, solved))
                rows.append(row("scan", *about, many, scanned))
                say(rows[-2:])
    found = claims(rows)
    settings = {"context": CONTEXT, "batch": BATCH, "upto": upto, "queries": QUERIES}
    results.write("growth", seed=0, settings=settings, rows=rows, claims=found)
    draw(rows)
    Console().print(results.table(found))


if __name__ == "__main__":
    tyro.cli(main)
