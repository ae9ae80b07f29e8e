"""`influence fit`: from a model and a corpus to the curvature of its loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from rich.console import Console

from influence.curvature import covariance
from influence.curvature.covariance import PerSequence
from influence.curvature.diagonal import diagonal, identity
from influence.curvature.ekfac import fit as ekfac
from influence.curvature.kfac import kfac
from influence.curvature.operator import Curvature
from influence.fold import Fold
from influence.model.coverage import layers as coverage
from influence.model.task import Sampled
from influence.model.trace import select, trace
from influence.runtime import formats
from influence.runtime.corpus.packed import Packed, PackedBatches
from influence.runtime.driver import Driver
from influence.runtime.mesh import laid_out
from influence.runtime.models import Model, parameters
from influence.runtime.placing import first
from influence.runtime.processes import led
from influence.runtime.run.batching import (
    SHARE,
    Measured,
    factor_bytes,
    free_bytes,
    groups,
    halving,
)
from influence.runtime.run.job import BASE, GB, MODEL, Job, Models, clock
from influence.runtime.run.ledger import Ledger, Stage, begin, locked
from influence.runtime.run.options import Fit, as_json, check_numbers
from influence.runtime.run.packing import Corpus, sample
from influence.types import Layer


def shampoo(*args: Any, **options: Any) -> Curvature:
    """Fits EK-FAC in Shampoo's basis."""
    return ekfac(*args, factors=PerSequence(), **options)


def products(*args: Any, **options: Any) -> Curvature:
    """Returns no curvature; nothing is drawn, and no pass carried out."""
    return identity(*args, layers=options["layers"])


METHODS: Mapping[str, Callable[..., Curvature]] = {
    "ekfac": ekfac,
    "shampoo": shampoo,
    "kfac": kfac,
    "diagonal": diagonal,
    "identity": products,
}

PASSES = {"ekfac": 2, "shampoo": 2, "kfac": 1, "diagonal": 1, "identity": 0}
"""How often each method walks over the data."""


def fit(
    options: Fit, console: Console | None = None, given: Models | None = None
) -> Ledger:
    """Fits the curvature of a run's models, or goes on with what was begun.

    Args:
      options: what is fitted, to what.
      console: where to show what will be done, and what happens; the terminal.
      given: models by role, `model` and `base`, instead of opening them.

    Raises:
      ValueError: if model, corpus and options do not go together.
      FileNotFoundError: if there is no model or corpus where the options say.
      BlockingIOError: if another process is at work in the folder.

    Example:
      >>> from influence.runtime.run.fitting import fit
      >>> from influence.runtime.run.options import Fit
      >>> asked = Fit(folder / "fit", "my own", corpus, packing, layers=("block.*",))
      >>> ledger = fit(asked, quiet, own)
      >>> sorted(ledger.stages)
      ['corpus corpus', 'curvature of model']
    """
    check_numbers(options)
    with locked(options.run):
        ledger = begin(options.run)
        shown = console or Console()
        driver = Driver(shown, laid_out(options.mesh))
        job = Job(ledger, options, given or {}, shown, driver)
        job.check_models()
        model = job.model(MODEL)
        if "fit" not in ledger.run.manifest:
            job.remember(fit=as_json(options))  # `status` has something to go by
        corpus = job.pack(model, options.data)
        own = _Fitting(job, MODEL, model, corpus)
        own.layers()  # raises if there are none of those names
        if BASE in job.roles:
            # Opened once more when its turn comes: it is not held till then.
            _check_base(model, job.model(BASE), job.context(model))
        job.remember(fit=as_json(options))
        own.all_layers()
        if BASE in job.roles:
            _Fitting(job, BASE, job.model(BASE), corpus).all_layers()
    return ledger


def _check_base(model: Model, base: Model, context: int) -> None:
    """Raises if two models can't be asked the same questions."""
    if base.context < context:
        raise ValueError(
            f"The base takes sequences of {base.context} tokens; the run's have up to "
            f"{context}. Give --context {base.context} at most."
        )
    own, other = (x.tokenizer.sha256 if x.tokenizer else None for x in (model, base))
    if own != other or model.vocabulary != base.vocabulary:
        raise ValueError(
            f"Model and base do not read alike: {model.vocabulary} and "
            f"{base.vocabulary} token ids, tokenizers {'equal' * (own == other)}"
            f"{'different' * (own != other)}. Scores of both need the same tokens."
        )


@dataclass(frozen=True)
class _Fitting:
    """The fit of one model of a run."""

    job: Job
    role: str
    model: Model
    corpus: Corpus

    @property
    def examples(self) -> Packed:
        """Returns the sequences it is fitted to."""
        options = self.job.options
        return sample(self.corpus.packed, options.samples, options.seed)

    @property
    def labels(self) -> Sampled:
        """Returns where labels come from."""
        return Sampled(self.job.options.seed, self.job.options.draws)

    def batches(self, size: int) -> PackedBatches:
        """Returns the sequences in batches."""
        return self.job.batches(self.examples, size)

    def layers(self) -> tuple[Layer, ...]:
        """Returns the layers that are fitted.

        Raises:
          ValueError: if the options name none.
        """
        inputs = next(iter(self.batches(1))).inputs
        program = trace(self.model.task.outputs, self.model.params, inputs)
        return select(program, self.model.patterns(self.job.options.layers))

    def all_layers(self) -> None:
        """Fits all layers, in as many groups as there have to be."""
        limit = self._limit()
        parts = groups(self.layers(), limit)
        batch = self._batch(parts[0])
        self.job.show(f"fit {self.role}", self._plan(parts, limit, batch))

        def every_part(size: int) -> dict[str, str]:
            numbers = [
                f" {i}" if len(parts) > 1 else "" for i, _ in enumerate(parts, 1)
            ]
            return dict(map(self._part, parts, numbers, repeat(size)))

        smaller = partial(self.job.smaller, f"batch of {self.role}")
        made = halving(every_part, batch.size, smaller)
        self.job.note(
            f"curvature of {self.role}", stages=[*made], files=[*made.values()]
        )
        self._drop(made)

    def _drop(self, made: Mapping[str, str]) -> None:
        """Forgets what was fitted in other groups before."""
        run = self.job.ledger.run
        for name in self.job.ledger.stages:
            of_role = name.startswith(f"curvature of {self.role}")
            if of_role and name not in made:
                self.job.ledger.drop(name)
        for name in run.manifest["artifacts"]:
            if name.startswith(f"{self.role}/curvature") and name not in made.values():
                led(f"removing {name}", partial(run.remove, name))

    def _part(self, group: tuple[Layer, ...], part: str, size: int) -> tuple[str, str]:
        """Fits a group of layers unless that was done; returns its stage and file."""
        name = f"{self.role}/curvature{part.replace(' ', '-')}.safetensors"
        stage = self._stage(group, part, size)
        if not self.job.ledger.finished(stage, self.job.folder / name):
            self.job.begin(stage)
            curvature = METHODS[self.job.options.method](
                self.model.task,
                self.model.params,
                self.batches(size),
                layers=patterns(group),
                labels=self.labels,
                run=self._run(stage, part),
            )
            self.job.write(name, curvature, formats.write_curvature)
            self.job.ledger.finish(stage)
        self.job.forget(stage)
        return stage.name, name

    def _stage(self, group: tuple[Layer, ...], part: str, size: int) -> Stage:
        options = as_json(self.job.options)
        return Stage(
            f"curvature of {self.role}{part}",
            {
                **self.job.common(self.model.digest),
                "corpus": self.corpus.digest,
                "layers": " ".join(patterns(group)),
                "batch": str(size),
                **{k: str(options[k]) for k in ("samples", "method", "seed", "draws")},
            },
            {"role": self.role, "corpus": self.corpus.source.name},
        )

    def _run(self, stage: Stage, part: str) -> Callable[[Fold, Any], Any]:
        """Returns what carries out passes, shown with what they are of."""
        saving = self.job.saving(stage, self.job.options.save_every)
        base = "" if self.role == "model" else f", {self.role}"
        return lambda fold, batches: saving(
            fold._replace(name=f"{fold.name}{part}{base}"), batches
        )

    def _limit(self) -> float:
        """Returns how many bytes factors may take; what was found first is kept to."""
        if self.job.options.memory is not None:
            return self.job.options.memory * GB
        noted = self.job.noted("memory").get("bytes")
        if noted is None:
            self.job.note("memory", bytes=SHARE * free_bytes())
        return self.job.noted("memory")["bytes"]

    def _batch(self, group: tuple[Layer, ...]) -> Measured:
        """Returns how large batches are, timed with the first group of layers."""
        fold = covariance.fold(self.model.task, self.model.params, group, self.labels)

        def work(batches: PackedBatches) -> None:
            first(fold, batches, self.job.layout)

        return self.job.batch(
            f"batch of {self.role}",
            f"{self.model.digest} {self.corpus.digest}",
            self.job.options.batch,
            self.examples,
            work,
        )

    def _plan(
        self, parts: list[tuple[Layer, ...]], limit: float, batch: Measured
    ) -> dict[str, str]:
        """Returns what will be done and what it will cost, in words."""
        examples, passes = self.examples, PASSES[self.job.options.method] * len(parts)
        names = [x.name for part in parts for x in part]
        batch_of_one = next(iter(self.batches(1)))
        left = coverage(self.model.task, self.model.params, batch_of_one).uncovered
        need = max(sum(map(factor_bytes, x)) for x in parts)
        said = {
            "model": f"{parameters(self.model.params):,} parameters",
            "sequences": f"{len(examples):,} of at most {examples.context} tokens",
            "tokens": f"{len(examples) * examples.context:,} at most",
            "layers": f"{len(names)}: {', '.join(names[:4])}"
            + (", …" if len(names) > 4 else ""),
            "not covered": ", ".join(x.name for x in left[:4]) or "nothing",
            "factors": f"{need / GB:.2f} GB at a time, of {limit / GB:.2f} GB",
            "passes": f"{passes}" + (f", {len(parts)} groups" * (len(parts) > 1)),
            "batch": f"{batch.size} sequences",
        }
        seconds = passes * batch.seconds * len(examples) / batch.size
        return said | {"time": f"about {clock(seconds)}, from a timed batch"}


def patterns(group: tuple[Layer, ...]) -> list[str]:
    """Returns patterns that match just the layers of a group."""
    usual = ("matrix", "convolution")
    return [x.name if x.kind in usual else f"{x.kind}:{x.name}" for x in group]


def fitted(job: Job, role: str, model: Model, corpus: Corpus) -> list[str]:
    """Returns the artifacts with a role's curvature.

    Raises:
      FileNotFoundError: if it was not fitted to its end.
      ValueError: if model or corpus changed since.
    """
    noted = job.noted(f"curvature of {role}")
    files, stages = (
        noted.get("files"),
        [job.ledger.stages[x] for x in noted.get("stages", ())],
    )
    again = f"Run `influence fit {job.folder}` with its options"
    if files is None or not all(x["finished"] for x in stages):
        raise FileNotFoundError(
            f"The run in {job.folder} has no curvature of {role} yet. {again}, to its "
            "end."
        )
    now = {**job.common(model.digest), "corpus": corpus.digest}
    changed = {k for x in stages for k, v in now.items() if x["inputs"][k] != v}
    if changed:
        raise ValueError(
            f"The curvature of {role} was fitted with other "
            f"{', '.join(sorted(changed))}. {again} again, or restore what changed."
        )
    return files


def curvature_of(job: Job, files: Sequence[str]) -> Curvature:
    """Returns a curvature, read layer by layer if it is in several files.

    Raises:
      ValueError: if a file is damaged.
    """
    paths = [job.ledger.run.read(name, Path) for name in files]
    if len(paths) > 1:
        return formats.open_curvature(paths)
    found = formats.read_curvature(paths[0])
    return found if job.layout is None else job.layout.shard(found)
