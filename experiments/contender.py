"""Programs that are timed beside one another, each in a process of its own.

Each does the same named stages over the same weights and tokens, one at a time on
request, and measures itself: seconds on the clock, seconds of processor time of all its
threads (which say more on a machine that others use too), and peak memory.
"""

import ctypes
import gc
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from safetensors.numpy import load_file

from influence.runtime.memory import forget_peak, peak

THREADS = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""What XLA's thread pool, PyTorch and the linear algebra libraries look at."""

ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""For every contender: a process keeps pieces up to 32 MB, in one arena.

Larger ones go back to the system: in what is kept there are holes that none of them
fits, and peaks would be of the allocator's making. In huge pages that is cheap.
"""


class Job(NamedTuple):
    """What every contender works on.

    Attributes:
      folder: with `model.safetensors` and data; None for random ones.
      blocks: the model's sizes: how many blocks,
      width: of the residual stream,
      hidden: of the MLP,
      heads: of attention,
      context: tokens a sequence,
      vocabulary: token ids.
      layers: "mlp", or "all" for every matrix of a block.
      sequences: how many are fitted to and scanned.
      token_sequences: how many are scanned per token.
      queries: how many sequences are asked about.
      rank: of low-rank queries.
      damping: a share of the mean eigenvalue.
      batch: sequences a batch, by contender and stage ("" for all others).
      threads: how many each contender may use.
    """

    folder: Path | None
    blocks: int
    width: int
    hidden: int
    heads: int
    context: int
    vocabulary: int
    layers: str
    sequences: int
    token_sequences: int
    queries: int
    rank: int
    damping: float
    batch: Mapping[str, Mapping[str, int]]
    threads: int

    def size(self, contender: str, stage: str) -> int:
        """Returns how many sequences a batch of a stage holds."""
        sizes = self.batch[contender]
        return sizes.get(stage, sizes[""])

    def names(self) -> list[str]:
        """Returns the names of the layers that are read."""
        kinds = ["mlp.fc1", "mlp.fc2"]
        if self.layers == "all":
            kinds = ["attn.qkv", "attn.proj", *kinds]
        return [f"blocks.{i}.{kind}" for i in range(self.blocks) for kind in kinds]


class Cost(NamedTuple):
    """What a piece of work took.

    Attributes:
      seconds: on the clock.
      cpu_seconds: of the process, all of its threads.
      peak_mb: the most memory the process held meanwhile; NaN where the system does
        not say.
    """

    seconds: float
    cpu_seconds: float
    peak_mb: float


class Stage(NamedTuple):
    """One piece of work.

    Attributes:
      tokens: how many it passes through the model; None if it passes none.
      work: the whole of it.
      begin: a little of it, for whatever only the first call does.
    """

    tokens: int | None
    work: Callable[[], None]
    begin: Callable[[], None]


Stages = Mapping[str, Stage]
"""By name, in the order of work: a stage may use what earlier ones left."""


class Data(NamedTuple):
    """A GPT-2-like model and its data, under PyTorch's names and layouts."""

    params: dict[str, np.ndarray]
    train: np.ndarray
    queries: np.ndarray


def data(job: Job) -> Data:
    """Returns a job's model and data."""
    if job.folder is None:
        rng = np.random.default_rng(0)
        params = {k: _drawn(rng, k, x) for k, x in _shapes(job).items()}
        shapes = [(n, job.context) for n in (job.sequences, job.queries)]
        ids = [rng.integers(job.vocabulary, size=x, dtype=np.int32) for x in shapes]
        return Data(params, *ids)
    ids = [np.load(job.folder / f"{kind}_ids.npy") for kind in ("train", "query")]
    train, queries = ids[0][: job.sequences], ids[1][: job.queries]
    if (len(train), len(queries)) != (job.sequences, job.queries):
        raise ValueError(
            f"{job.folder} has {len(train)} sequences and {len(queries)} queries, "
            f"fewer than the {job.sequences} and {job.queries} asked for."
        )
    return Data(load_file(job.folder / "model.safetensors"), train, queries)


def _shapes(job: Job) -> dict[str, tuple[int, ...]]:
    d = job.width
    linears = {"lm_head": (job.vocabulary, d)}
    norms = ["ln_f"]
    for i in range(job.blocks):
        block = f"blocks.{i}"
        linears |= {
            f"{block}.attn.qkv": (3 * d, d),
            f"{block}.attn.proj": (d, d),
            f"{block}.mlp.fc1": (job.hidden, d),
            f"{block}.mlp.fc2": (d, job.hidden),
        }
        norms += [f"{block}.ln1", f"{block}.ln2"]
    found: dict[str, tuple[int, ...]] = {
        "tok_emb.weight": (job.vocabulary, d),
        "pos_emb.weight": (job.context, d),
    }
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        found |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    return found


def _drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    scale = len(shape) == 1 and name.endswith("weight")
    drawn = 0.02 * rng.standard_normal(shape) + scale
    return drawn.astype(np.float32)


def let_go() -> None:
    """Gives back to the system what was freed, where the C library can.

    The peak of what follows is its own then, not of the holes that others left.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def measured(work: Callable[[], None]) -> Cost:
    """Does a piece of work and returns what it took."""
    followed = forget_peak()
    wall, cpu = time.perf_counter(), _cpu()
    work()
    wall, cpu = time.perf_counter() - wall, _cpu() - cpu
    return Cost(wall, cpu, peak() if followed else float("nan"))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Contender:
    """A contender at work in another process, which does what it is told."""

    def __init__(self, module: str, job: Job):
        """Starts the process, and waits until it is ready.

        Args:
          module: has `stages(job, data)`.
          job: what to work on.

        Raises:
          RuntimeError: if the contender can't start, with its own words.
        """
        os.environ |= dict.fromkeys(THREADS, str(job.threads)) | ALLOCATOR
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(module, job, there))
        self._process.start()
        there.close()
        self.tokens: dict[str, int | None] = self._answer()

    def begin(self, stage: str) -> Cost:
        """Does a little of a stage for the first time."""
        return self._ask("begin", stage)

    def work(self, stage: str) -> Cost:
        """Does a stage."""
        return self._ask("work", stage)

    def _ask(self, *what: str) -> Cost:
        self._pipe.send(what)
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, answer = self._pipe.recv()
        except EOFError:
            kind, answer = "error", "The contender's process ended; see above."
        if kind == "error":
            raise RuntimeError(answer)
        return answer

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join()


def _serve(module: str, job: Job, pipe: Connection) -> None:
    try:
        stages = import_module(module).stages(job, data(job))
    except (ImportError, ValueError) as problem:
        pipe.send(("error", str(problem)))
        return
    pipe.send(("ready", {name: x.tokens for name, x in stages.items()}))
    while True:
        try:
            what, name = pipe.recv()
        except EOFError:
            return
        stage = stages[name]
        if what == "work":
            cost = measured(stage.work)
        else:
            let_go()
            cost = measured(stage.begin)
            # Nor are what the stage compiled and tried out its own any more. Not
            # between repetitions: they would pay for having it all back.
            let_go()
        pipe.send(("done", cost))


def vocabulary(folder: Path) -> int:
    """Returns how many token ids a reference model has."""
    return len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
