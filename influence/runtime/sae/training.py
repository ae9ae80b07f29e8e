"""`influence sae train`: from a model and a corpus to dictionaries of features."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from influence.interpret import quality, training
from influence.interpret.kinds import BatchTop, Gate, Jump, Kind, Standard, Top
from influence.interpret.learning import Aim, Schedule
from influence.interpret.quality import Quality, scrambled
from influence.interpret.source import Centre, Epochs, Source, centres
from influence.interpret.training import Trained
from influence.model.sites import Address
from influence.runtime.corpus.packed import Packed
from influence.runtime.dictionaries import folders
from influence.runtime.dictionaries.stored import About, Stored
from influence.runtime.run.job import MODEL, Models
from influence.runtime.run.ledger import (
    DICTIONARIES,
    Ledger,
    Stage,
    begin,
    locked,
)
from influence.runtime.run.options import check_numbers
from influence.runtime.sae.options import Train
from influence.runtime.sae.reading import Reading, open_reading, split

CENTRED_ON = 1024
"""Sequences that the middle and the size of what is at a site are found from."""

JUDGED_ON = 2048
"""Held-out sequences that a dictionary is judged on, at most."""

WIDTH = "8x"
"""Of a dictionary, if nothing is said."""

CONTROL = "control"
"""The folder beside a dictionary with that of a model of random weights."""


def _nested(options: Train, width: int) -> tuple[int, ...]:
    return options.nested or tuple(width // x for x in (8, 4, 2))


def _priced(make: Callable[..., Kind]) -> Callable[[Train, int], Kind]:
    """Returns how a kind with a coefficient is made of options."""

    def kind(options: Train, width: int) -> Kind:
        del width
        coefficient = options.coefficient
        return make() if coefficient is None else make(coefficient=coefficient)

    return kind


KINDS: Mapping[str, Callable[[Train, int], Kind]] = {
    "batchtopk": lambda options, width: BatchTop(options.k),
    "topk": lambda options, width: Top(options.k),
    "matryoshka": lambda options, width: BatchTop(options.k, _nested(options, width)),
    "jumprelu": lambda options, width: Jump(float(options.k), coefficient=10.0),
    "jumprelu-tanh": _priced(Jump),
    "standard": _priced(Standard),
    "gated": _priced(Gate),
}
"""What the words for kinds of dictionaries mean."""


def train(
    options: Train, console: Console | None = None, given: Models | None = None
) -> Ledger:
    """Trains dictionaries, or goes on with what was begun.

    Args:
      options: what is trained, on what.
      console: where to show what happens; the terminal if left out.
      given: the model, by the role `model`, instead of opening it.

    Raises:
      ValueError: if model, corpus and options do not go together.
      FileNotFoundError: if there is no model or corpus where the options say.
      BlockingIOError: if another process is at work in the folder.
    """
    check_numbers(options)
    with locked(options.out):
        ledger = begin(options.out, DICTIONARIES)
        reading = open_reading(options.read, ledger, console or Console(), given or {})
        job = _Training(
            options, reading, *split(reading.packed, options.hold_out, options.seed)
        )
        job.all()
    return ledger


@dataclass(frozen=True)
class _Training:
    """Dictionaries of one model in training.

    Attributes:
      options: what is trained.
      reading: the model and its corpus.
      seen: the sequences that are learned from.
      held: the others.
    """

    options: Train
    reading: Reading
    seen: Packed
    held: Packed

    def all(self) -> None:
        """Trains all dictionaries, those of the control as well."""
        aims = self.aims()
        stage = self._stage(aims)
        job = self.reading.job
        if job.ledger.finished(stage, self._folder(next(iter(aims)), aims)):
            job.say("All dictionaries are trained.")
            return
        job.show("train", self._plan(aims))
        job.begin(stage)
        found = {"model": self._of(self.reading.source, stage, aims, "")}
        if self.options.control:
            source = self.reading.source
            random = replace(source, params=scrambled(source.params, self.options.seed))
            found[CONTROL] = self._of(random, stage, aims, f", {CONTROL}")
        job.ledger.finish(stage, dictionaries=[str(x) for x in found["model"]])
        job.forget(stage)
        for name in aims:
            job.console.print(table({k: x[name] for k, x in found.items()}, name))
            job.say(f"The dictionary: {self._folder(name, aims)}")

    def aims(self) -> dict[str, Aim]:
        """Returns what is trained, by the name of its folder.

        Raises:
          ValueError: if sites, widths and kind do not go together.
        """
        options = self.options
        if options.writes and len(options.writes) != len(options.site):
            raise ValueError(
                f"{len(options.site)} sites and {len(options.writes)} outputs were "
                "given. Give each site of a transcoder its output, or none."
            )
        if not options.site:
            raise ValueError("Nothing is read: give a --site, such as resid.2.")
        writes = options.writes or [None] * len(options.site)
        found = {}
        pairs = zip(options.site, writes, strict=True)
        for (site, out), width in product(pairs, options.width or (WIDTH,)):
            at = self.reading.site(site)
            size = features_of(width, self.reading.width(at))
            kind = KINDS[options.kind](options, size)
            kind.check(size)
            found[f"{at}-{size}-{options.kind}"] = Aim(
                at,
                size,
                kind,
                None if out is None else self.reading.site(out),
                options.skip,
                options.aligned,
            )
        return found

    @property
    def schedule(self) -> Schedule:
        """Returns how long dictionaries are trained."""
        options = self.options
        steps = max(1, options.tokens // options.train_batch)
        return Schedule(steps, options.train_batch, options.rate)

    def _of(
        self, source: Source, stage: Stage, aims: Mapping[str, Aim], what: str
    ) -> dict[str, Quality]:
        """Trains, judges and keeps the dictionaries of a model."""
        sites = tuple(
            dict.fromkeys(y for x in aims.values() for y in (x.site, x.target))
        )
        driver = self.reading.job.driver
        some = self.seen.take(range(min(CENTRED_ON, len(self.seen))))
        looking = centres(source, sites)
        looking = looking._replace(name=looking.name + what)
        centre = driver.run(looking, self.reading.batches(some))
        trained = self._trained(source, stage, aims, centre, what)
        return {
            name: self._kept(source, name, aims, trained[name], centre, what)
            for name in aims
        }

    def _trained(
        self,
        source: Source,
        stage: Stage,
        aims: Mapping[str, Aim],
        centre: Mapping[Address, Centre],
        what: str,
    ) -> dict[str, Trained]:
        reading = self.reading
        fold = training.fold(
            source,
            aims,
            centre,
            self.schedule,
            tokens=reading.size * reading.packed.context,
            seed=self.options.seed,
        )
        fold = fold._replace(name=fold.name + what)
        saving = reading.job.saving(stage, self.options.save_every)
        return saving(fold, self._walk())

    def _walk(self) -> Epochs:
        """Returns as many batches of sequences as have all the tokens in them."""
        size, first = self.reading.size, self.reading.batches(self.seen)
        counted = [
            np.asarray(self.reading.model.task.counted(x.inputs))[x.real_B].sum()
            for x, _ in zip(first, range(64), strict=False)
        ]
        each = max(1.0, float(np.mean(counted)))
        batches = int(self.schedule.tokens / each) + 2
        epochs = -(-batches // len(first))
        return Epochs(_Sequences(self.seen, self.reading), size, batches + epochs)

    def _kept(
        self,
        source: Source,
        name: str,
        aims: Mapping[str, Aim],
        trained: Trained,
        centre: Mapping[Address, Centre],
        what: str,
    ) -> Quality:
        """Judges a dictionary on what is held out, and writes it down."""
        aim, made = aims[name], trained.dictionary
        if trained.steps < self.schedule.steps:
            self.reading.job.say(
                f"{name}: {trained.steps} of {self.schedule.steps} updates, for want "
                "of tokens that count."
            )
        held = self.held.take(range(min(JUDGED_ON, len(self.held))))
        fold = quality.fold(source, made, centre[aim.target], aim.site, aim.writes)
        found: Quality = self.reading.job.driver.run(
            fold._replace(name=fold.name + what), self.reading.batches(held)
        )
        folder = self._folder(name, aims)
        if what:
            folder = folder / CONTROL
        about = self._about(aim, trained, found, control=bool(what))
        folders.save(folder, Stored(made, about), replace=True)
        return found

    def _about(
        self, aim: Aim, trained: Trained, found: Quality, *, control: bool
    ) -> About:
        model = self.reading.model
        return About(
            site=str(aim.site),
            writes=None if aim.writes is None else str(aim.writes),
            model=self.options.read.model,
            model_digest=None if control else model.digest,
            kind=aim.kind.name,
            context=self.reading.packed.context,
            facts={
                "control": control,
                "steps": trained.steps,
                "tokens": trained.steps * self.options.train_batch,
                "corpus": self.reading.digest,
                "seed": self.options.seed,
                "options": json.loads(json.dumps(asdict(aim.kind))),
                **{k: x for k, x in numbers(found).items() if np.isfinite(x)},
                "density": found.density_F.tolist(),
                "maximum": found.maximum_F.tolist(),
            },
        )

    def _folder(self, name: str, aims: Mapping[str, Aim]) -> Path:
        """Returns where a dictionary is written."""
        out = self.reading.job.folder
        return out / ("dictionary" if len(aims) == 1 else name)

    def _stage(self, aims: Mapping[str, Aim]) -> Stage:
        options = asdict(self.options)
        names = ("kind", "k", "coefficient", "nested", "tokens", "train_batch", "rate")
        return Stage(
            "dictionaries",
            {
                **self.reading.job.common(self.reading.model.digest),
                "corpus": self.reading.digest,
                "aims": " ".join(f"{k}→{x.target}" for k, x in aims.items()),
                **{k: str(options[k]) for k in names},
                **{
                    k: str(options[k])
                    for k in ("skip", "aligned", "hold_out", "control")
                },
                "seed": str(options["seed"]),
                "batch": str(self.reading.size),
            },
            {"role": MODEL},
        )

    def _plan(self, aims: Mapping[str, Aim]) -> dict[str, str]:
        """Returns what will be done, in words."""
        schedule = self.schedule
        epochs = schedule.tokens / (len(self.seen) * self.seen.context)
        return {
            "dictionaries": ", ".join(aims),
            "tokens": f"{schedule.tokens:,}, {epochs:.1f} times the corpus at least",
            "updates": f"{schedule.steps:,} of {schedule.batch:,} tokens",
            "held out": f"{len(self.held):,} of {len(self.reading.packed):,} sequences",
            "dead": f"a feature that was off for {schedule.dead:,} tokens",
        }


@dataclass(frozen=True)
class _Sequences:
    """Sequences that can be taken in any order, in batches as a run reads them."""

    packed: Packed
    reading: Reading

    def __len__(self) -> int:
        return len(self.packed)

    def take(self, places: np.ndarray) -> "_Sequences":
        return replace(self, packed=self.packed.take(places))

    def batches(self, size: int) -> Any:
        return self.reading.job.batches(self.packed, size)


def features_of(width: str, site: int) -> int:
    """Returns how many features a dictionary has: `8x` is eight times the site's width.

    Raises:
      ValueError: if that is not a number of features.
    """
    times = width.removesuffix("x")
    if not times.isdecimal() or int(times) < 1:
        raise ValueError(
            f"The width {width!r} is no number of features. Give one, such as 4096, or "
            "a multiple of the site's width, such as 8x."
        )
    return int(times) * (site if width.endswith("x") else 1)


def numbers(found: Quality) -> dict[str, float]:
    """Returns what there is to say of a dictionary's quality, by name."""
    return {
        "variance_explained": found.variance_explained,
        "l0": found.l0,
        "dead": found.dead,
        "ce_recovered": found.recovered,
        "ce_recovered_of_mean": found.recovered_of_mean,
        "ce": found.clean,
        "ce_replaced": found.replaced,
        "ce_zero": found.zero,
        "ce_mean": found.mean,
        "kl": found.kl,
        "judged_on": found.tokens,
    }


SAID = {
    "variance_explained": "variance explained",
    "l0": "features on, a token (L0)",
    "dead": "features never on",
    "ce_recovered": "cross-entropy recovered, of zeros' cost",
    "ce_recovered_of_mean": "cross-entropy recovered, of the mean's cost",
    "ce": "cross-entropy, nats a label",
    "ce_replaced": "with reconstructions",
    "ce_zero": "with zeros",
    "ce_mean": "with the mean",
    "kl": "KL to the model's own predictions, nats a label",
    "judged_on": "tokens looked at",
}
"""What the numbers are called where a person reads them."""


def table(found: Mapping[str, Quality], title: str) -> Table:
    """Returns dictionaries' qualities side by side."""
    made = Table(title=escape(title), title_justify="left")
    made.add_column("on text held out")
    for name in found:
        made.add_column(_column(name), justify="right")
    each = [numbers(x) for x in found.values()]
    for key, words in SAID.items():
        form = ",.0f" if key == "judged_on" else ".4f"
        made.add_row(
            words, *("–" if np.isnan(x[key]) else format(x[key], form) for x in each)
        )
    return made


def _column(name: str) -> str:
    return "random weights" if name == CONTROL else escape(name)
