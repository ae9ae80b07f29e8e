"""This engine's stages, as something to time (`contender.py`)."""

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import influence
from experiments.contender import Data, Job, Stage, Stages
from experiments.reference import GPT, Counted, examples
from influence.attribution.countsketch import reader
from influence.attribution.forms import Compress, Plain
from influence.attribution.measurements import Measurement, likelihoods
from influence.attribution.streamed import readable
from influence.curvature import covariance, eigenvalues, eigenvectors
from influence.curvature.covariance import PerToken
from influence.fold import run
from influence.linalg.kronecker import Kronecker
from influence.model.examples import InMemory
from influence.model.task import losses
from influence.model.trace import select, trace
from influence.runtime import formats
from influence.runtime.coding import Bits, encode
from influence.runtime.run.indexing import made_with
from influence.runtime.run.options import Sides
from influence.types import Batch, Params

INDEXES: dict[str, tuple[Sides, int]] = {
    "index": ("both", 16384),
    "index, leading directions": ("leading", 16384),
    "index, leading directions, a byte each": ("leading", 1 << 40),
}
"""Indexes that are timed: along which eigenvectors, and bytes a sequence at most."""


def stages(job: Job, data: Data) -> Stages:
    """Returns the engine's stages over a job's tokens."""
    return Engine(job, data).stages()


@jax.jit(static_argnums=0)
def step(task: Counted, params: Params, batch: Batch) -> tuple[Array, Params]:
    """Returns a batch's loss and its gradient: the unit of all that is measured."""

    def loss(params: Params) -> Array:
        outputs = task.outputs(params, batch.inputs)
        return losses(task, outputs, task.labels(batch.inputs), batch).sum()

    return jax.value_and_grad(loss)(params)


class Engine:
    """The stages, and what they leave for one another."""

    def __init__(self, job: Job, data: Data):
        self.job = job
        self.task = Counted(GPT(job.blocks, job.heads))
        self.params = {k: jnp.asarray(x) for k, x in data.params.items()}
        self.train, queries = (
            examples(x, np.ones(x.shape, bool), kind)
            for x, kind in ((data.train, "train"), (data.queries, "query"))
        )
        self.asked = likelihoods(self.task, queries)
        self.labels, self.factors = influence.Sampled(), PerToken()
        self.moments: Any = None
        self.bases: Any = None
        self.asking: Any = None
        self.folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        patterns = [f"{name}.weight" for name in job.names()]
        first = next(iter(self.train.batches(1)))
        program = trace(self.task.outputs, self.params, first.inputs)
        self.layers = select(program, patterns)

    def stages(self) -> Stages:
        """Returns them by name."""
        job, low = self.job, f", rank {self.job.rank}"
        tokens = job.queries * job.context
        few = job.token_sequences
        return {
            "forward+backward": self._over_data("unit", self.unit),
            "covariance": self._over_data("covariance", self.covariance),
            "eigendecomposition": Stage(None, self.decompose, self.decompose),
            "eigenvalues": self._over_data("eigenvalues", self.eigenvalues),
            "query": self._over_queries(tokens, None),
            "scan": self._over_data("scan", self.scan),
            "scan, per layer": self._over_data("scan", self.scan_layers),
            "scan, per token": self._over_data("tokens", self.scan_tokens, few),
            **{
                name: self._over_data("scan", self.index(*about))
                for name, about in INDEXES.items()
            },
            f"query{low}": self._over_queries(tokens, Plain(job.rank)),
            f"scan{low}": self._over_data("low rank", self.scan),
            f"scan, per token{low}": self._over_data("tokens", self.scan_tokens, few),
        }

    def _over_data(
        self,
        kind: str,
        work: Callable[[InMemory], None],
        sequences: int | None = None,
    ) -> Stage:
        size = self.job.size("influence", kind)
        chosen = self.train.take(range(sequences or len(self.train)))
        one = chosen.take(range(min(size, len(chosen))))
        return Stage(
            len(chosen) * self.job.context,
            lambda: work(chosen.batches(size)),
            lambda: work(one.batches(size)),
        )

    def _over_queries(self, tokens: int, compress: Compress | None) -> Stage:
        names = list(self.asked)

        def some(count: int) -> dict[str, Measurement]:
            return {x: self.asked[x] for x in names[:count]}

        def read(count: int) -> bool:
            return readable(some(count), self.layers, compress)

        def little() -> None:
            # Few are read in another way, and what is timed would be compiled in it.
            counts = range(2, len(names) + 1)
            like = next((x for x in counts if read(x) == read(len(names))), len(names))
            self.query(some(like), compress)

        return Stage(tokens, lambda: self.query(self.asked, compress), little)

    def unit(self, batches: InMemory) -> None:
        """Computes every batch's loss and gradient, and nothing of them."""
        for batch in batches:
            jax.block_until_ready(step(self.task, self.params, batch))

    def covariance(self, batches: InMemory) -> None:
        """Sums covariances."""
        fold = covariance.fold(self.task, self.params, self.layers, self.labels)
        self.moments = jax.block_until_ready(run(fold, batches))

    def decompose(self) -> None:
        """Takes the covariances' eigenvectors."""
        fold = eigenvectors.fold(self.layers, self.factors, self.moments)
        found = run(fold, eigenvectors.sides(self.layers))
        self.bases = jax.block_until_ready(found)

    def eigenvalues(self, batches: InMemory) -> None:
        """Refits eigenvalues."""
        fold = eigenvalues.fold(
            self.task, self.params, self.layers, self.labels, self.bases
        )
        found = jax.block_until_ready(run(fold, batches))
        inputs, outputs = self.bases
        blocks = {
            x.name: Kronecker(inputs[x.reads], outputs[x.name], found.lam[x.name])
            for x in self.layers
        }
        curvature = influence.Curvature(
            self.layers, blocks, 0, found.sequences, str(self.labels)
        )
        # On disk, as a run has it: later stages read it layer by layer.
        path = self.folder / "curvature.safetensors"
        formats.write_curvature(curvature)(path)
        self.curvature = formats.open_curvature([path])

    def query(
        self, asked: Mapping[str, Measurement], compress: Compress | None
    ) -> None:
        """Solves for queries, which later stages scan for."""
        # Two sets of them would be twice the memory; nor is what curvature was made of
        # needed any more.
        self.asking = self.moments = self.bases = None
        solver = influence.Eigenbasis(influence.Relative(self.job.damping))
        self.asking = jax.block_until_ready(
            influence.query(
                self.curvature, self.params, asked, solver=solver, compress=compress
            )
        )

    def scan(self, batches: InMemory) -> None:
        """Totals every sequence's scores."""
        influence.scan(self.task, self.params, self.asking, batches, by_layer=False)

    def scan_layers(self, batches: InMemory) -> None:
        """Scores every sequence through every layer."""
        influence.scan(self.task, self.params, self.asking, batches)

    def index(self, sides: Sides, size: int) -> Callable[[InMemory], None]:
        """Returns what makes a short vector of every sequence, as it is kept.

        What vectors are made with is made once, in the first round.
        """

        @cache
        def made() -> tuple[Callable[[Batch], Array], Bits]:
            sketch, bits = made_with(self.curvature, size, self.job.damping, sides)
            return reader(self.task, self.params, sketch), bits

        def work(batches: InMemory) -> None:
            read, bits = made()
            for batch in batches:
                encode(np.asarray(read(batch))[batch.real_B], bits)

        return work

    def scan_tokens(self, batches: InMemory) -> None:
        """Scores every position of some sequences."""
        influence.token_scores(
            self.task,
            self.params,
            self.asking,
            batches,
            n_train=self.job.sequences,
        )
