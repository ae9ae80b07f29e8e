"""`influence index`: a short vector of every training sequence, to be looked up."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from influence.attribution.countsketch import (
    CountSketch,
    count_sketch,
    reader,
    room,
)
from influence.curvature.leading import leading, whole
from influence.curvature.operator import Curvature
from influence.linalg.damping import Relative
from influence.runtime.coding import (
    Bits,
    Codes,
    encode,
    length_in,
    read_codes,
    width_of,
)
from influence.runtime.corpus.packed import PackedBatches
from influence.runtime.driver import rest
from influence.runtime.lookup import KINDS
from influence.runtime.models import Model
from influence.runtime.run.batching import Measured, halving
from influence.runtime.run.codes import CodeStream
from influence.runtime.run.corpora import corpora
from influence.runtime.run.fitting import curvature_of, fitted
from influence.runtime.run.job import GB, MODEL, Job, Models, clock, opened_job
from influence.runtime.run.ledger import Ledger, Stage, locked, opened
from influence.runtime.run.options import Index, Sides, check_numbers
from influence.runtime.run.packing import Corpus

KEPT = 0.98
"""Which share of the variance of scores leading directions keep, in every layer."""

LEAST = 1 / 6
"""Which share of a side's directions are leading ones at least, where few numbers are
made of many: what is left of a vector is not told apart by its curvature, and adds to
the error of a sketch."""


def index(
    options: Index, console: Console | None = None, given: Models | None = None
) -> Ledger:
    """Indexes a run's corpora for `search`, or goes on with what was begun.

    Args:
      options: what is indexed, and how.
      console: where to show what will be done, and what happens; the terminal.
      given: models by role instead of opening them, as for `fit`.

    Raises:
      ValueError: if the options do not go together, or something changed since the fit.
      FileNotFoundError: if the run has no curvature yet.

    Example:
      >>> from influence.runtime.run.indexing import index
      >>> from influence.runtime.run.options import Index
      >>> ledger = index(Index(done, size=64), quiet, own)
      >>> ledger.stages["index of corpus"]["finished"]
      True
    """
    check_numbers(options)
    length_in(options.size)  # Raises, before anything is read.
    with locked(options.run):
        ledger = opened(options.run)
        job = opened_job(ledger, console, given)
        model = job.model(MODEL)
        fitted_to = job.corpus(model)
        files = fitted(job, MODEL, model, fitted_to)
        curvature = curvature_of(job, files)
        made = made_with(curvature, options.size, options.damping, options.sides)
        for corpus in corpora(job, model, options.data, fitted_to):
            _Indexing(job, model, corpus, files, made, options).all()
    return ledger


class Made(NamedTuple):
    """What an index's vectors are made with.

    Attributes:
      sketch: makes gradients short.
      bits: each of their numbers is kept in.
    """

    sketch: CountSketch
    bits: Bits

    @property
    def width(self) -> int:
        """Returns the bytes of a vector."""
        return width_of(self.sketch.length, self.bits)


def made_with(curvature: Curvature, size: int, damping: float, sides: Sides) -> Made:
    """Returns what vectors of so many bytes are made with.

    With room for every coordinate in a byte nothing is added up. Of signs there are no
    more than coordinates: more would be signs of zeros, the same for every sequence.

    Args:
      curvature: of the run.
      size: bytes of a vector, at the most.
      damping: as a multiple of the mean eigenvalue.
      sides: which directions are used.
    """
    inverse = Relative(damping)
    sketch = partial(count_sketch, curvature, inverse=inverse)
    few = partial(leading, curvature, inverse, kept=KEPT)
    directions = few() if sides == "leading" else whole(curvature)
    if width_of(room(directions, curvature.layers), 8) <= size:
        return Made(sketch(directions=directions), 8)
    if sides == "leading":
        directions = few(least=LEAST)
    longest = width_of(max(directions.count(curvature.layers), 16))  # two bytes
    length = min(length_in(size), length_in(longest))
    return Made(sketch(length=length, directions=directions), 1)


def noted(entry: Mapping[str, Any], curvature: Curvature) -> Made:
    """Returns what an index's vectors were made with, from what is noted of it."""
    said = entry["inputs"]
    sides: Sides = said["sides"]
    return made_with(curvature, int(said["bytes"]), float(said["damping"]), sides)


@dataclass(frozen=True)
class _Indexing:
    """The index of one corpus of a run."""

    job: Job
    model: Model
    corpus: Corpus
    files: list[str]
    made: Made
    options: Index

    def all(self) -> None:
        """Makes what is to be made, unless that was done."""
        batch = self._batch()
        stage = self._stage(batch.size)
        if not self.job.ledger.finished(stage, self.path):
            self.job.show(f"index {self.name}", self._plan(batch))
            self.job.begin(stage)
            smaller = partial(self.job.smaller, self._batch_note)
            done = halving(self._codes, batch.size, smaller)
            self.job.ledger.finish(
                done, length=self.made.sketch.length, bits=self.made.bits
            )
        self._lookup()

    @property
    def name(self) -> str:
        """Returns what is indexed."""
        return self.corpus.source.name

    @property
    def path(self) -> Path:
        """Returns where the vectors are."""
        return codes_at(self.job, self.name)

    def _stage(self, size: int) -> Stage:
        artifacts = self.job.ledger.run.manifest["artifacts"]
        return Stage(
            f"index of {self.name}",
            {
                **self.job.common(self.model.digest),
                "curvature": " ".join(artifacts[x]["sha256"] for x in self.files),
                "corpus": self.corpus.digest,
                "bytes": str(self.options.size),
                "damping": str(self.options.damping),
                "sides": self.options.sides,
                "batch": str(size),
            },
            {"role": MODEL, "corpus": self.name},
        )

    @cached_property
    def _read(self) -> Any:
        return reader(self.model.task, self.model.params, self.made.sketch)

    def _codes(self, size: int) -> Stage:
        """Streams vectors to the disk."""
        stage = self._stage(size)
        batches = self.job.batches(self.corpus.packed, size)
        stream = CodeStream(
            self.path,
            self.made.width,
            len(self.corpus.packed),
            size,
            stage.key,
            self.options.save_every,
        )
        done = stream.open()
        with self.job.driver.watched(f"index of {self.name}", batches) as advance:
            advance(done)
            for batch in rest(batches, done):
                real = np.asarray(batch.real_B)
                stream.add(encode(np.asarray(self._read(batch))[real], self.made.bits))
                advance(1)
        stream.finish()
        return stage

    def _lookup(self) -> None:
        """Makes what the kind needs beside the vectors."""
        make = KINDS[self.options.kind].make
        stage = self._kind_stage()
        place = lookup_at(self.name, self.options.kind)
        made = self.path if make is None else self.job.folder / place
        if not self.job.ledger.finished(stage, made):
            codes = codes_of(self.job, self.name)
            self.job.begin(stage)
            if make is not None:
                with self.job.driver.stage(stage.name):
                    self.job.ledger.run.write(place, partial(make, codes))
            self.job.ledger.finish(stage, kind=self.options.kind)

    def _kind_stage(self) -> Stage:
        made = self.job.ledger.stages[f"index of {self.name}"]["key"]
        inputs = {"index": made, "kind": self.options.kind}
        about = {"role": MODEL, "corpus": self.name}
        return Stage(f"look-up of {self.name}", inputs, about)

    @property
    def _batch_note(self) -> str:
        return f"batch of the index of {self.name}"

    def _batch(self) -> Measured:
        """Returns how large batches are."""

        def work(batches: PackedBatches) -> None:
            jax.block_until_ready(self._read(next(iter(batches))))

        return self.job.batch(
            self._batch_note,
            f"{self.model.digest} {self.corpus.digest} {self.options.size} "
            f"{self.options.sides}",
            self.options.batch,
            self.corpus.packed,
            work,
        )

    def _plan(self, batch: Measured) -> dict[str, str]:
        """Returns what will be done and what it will cost, in words."""
        packed, width = self.corpus.packed, self.made.width
        seconds = batch.seconds * len(packed) / batch.size
        return {
            "sequences": f"{len(packed):,}",
            "tokens": f"{len(packed) * packed.context:,} at most",
            "kept": f"{len(packed) * width / GB:.3f} GB, {width} bytes a sequence, "
            f"{_bits(self.made.bits)} of {self.made.sketch.length:,} numbers",
            "taken along": _sides(self.options.sides),
            "looked up": self.options.kind,
            "batch": f"{batch.size} sequences",
            "time": f"about {clock(seconds)}, from a timed batch",
        }


def _bits(bits: Bits) -> str:
    return "the signs" if bits == 1 else "a byte each"


def _sides(sides: Sides) -> str:
    return "all eigenvectors" if sides == "both" else "leading eigenvectors"


def codes_at(job: Job, corpus: str) -> Path:
    """Returns where the vectors of a corpus are."""
    return job.folder / "index" / f"{corpus}.codes"


def lookup_at(corpus: str, kind: str) -> str:
    """Returns the artifact that a kind of look-up needs beside the vectors."""
    return f"index/{corpus}.{kind}"


def codes_of(job: Job, corpus: str) -> Codes:
    """Returns the vectors of a corpus that was indexed."""
    entry = job.ledger.stages[f"index of {corpus}"]
    return read_codes(codes_at(job, corpus), entry["length"], entry["bits"])
