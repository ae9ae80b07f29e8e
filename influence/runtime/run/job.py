"""What the commands on a run have in common: its models, its corpus, its stages.

Every stage's inputs are put together here, by the commands that make it and by
`status`, which only compares.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from influence.runtime.corpus.pack import pack
from influence.runtime.corpus.packed import (
    Packed,
    PackedBatches,
    check_packed,
    read_packed,
)
from influence.runtime.corpus.plan import Plan, apart, joined
from influence.runtime.corpus.source import Source, check_source, open_source
from influence.runtime.corpus.tokenizer import ModelTokenizer
from influence.runtime.driver import Driver, Saving
from influence.runtime.mesh import Layout, gathered
from influence.runtime.models import (
    LONGEST,
    Model,
    check_place,
    digest,
    open_model,
    open_tokenizer,
)
from influence.runtime.processes import check_alone, led
from influence.runtime.run.batching import Measured, fastest, sizes
from influence.runtime.run.ledger import Ledger, Stage
from influence.runtime.run.options import Data, Fit, from_json
from influence.runtime.run.packing import Corpus, Watch, separator
from influence.runtime.saves import Saves
from influence.runtime.store import Writer

MODEL, BASE = "model", "base"
"""The roles a model may have in a run."""

GB = 1e9

Models = Mapping[str, Model]
"""Models that are given rather than opened, by role."""


def code() -> str:
    """Returns what of the code numbers depend on: versions, and the device."""
    packages = ", ".join(f"{x} {version(x)}" for x in ("influence", "jax", "jaxlib"))
    return f"{packages}, {jax.devices()[0].device_kind}"


@dataclass(frozen=True)
class Job:
    """A run at work.

    Attributes:
      ledger: its stages.
      options: what it is fitted by.
      given: models that are not opened from a folder.
      console: where to show what happens.
      driver: carries out passes.
    """

    ledger: Ledger
    options: Fit
    given: Models
    console: Console
    driver: Driver

    @property
    def folder(self) -> Path:
        """Returns the run folder."""
        return self.ledger.run.folder

    @property
    def layout(self) -> Layout | None:
        """Returns the devices it is at work on; None if it is one."""
        return self.driver.layout

    @property
    def roles(self) -> tuple[str, ...]:
        """Returns the roles of the run's models."""
        return (MODEL, BASE) if self.options.base or BASE in self.given else (MODEL,)

    def model(self, role: str) -> Model:
        """Returns the model in a role, opened if it was not given."""
        if role in self.given:
            found = self.given[role]
        else:
            dtype, merge = self.options.dtype, self.options.merge
            found = open_model(self.place(role), dtype=dtype, merge=merge)
        if self.layout is None:
            return found
        return replace(found, params=self.layout.shard(found.params))

    def context(self, model: Model) -> int:
        """Returns the longest sequence of the run.

        Raises:
          ValueError: if the model does not take sequences so long.
        """
        context = self.options.packing.context or min(model.context, LONGEST)
        if context > model.context:
            raise ValueError(
                f"The context {context} is longer than the model's, {model.context}. "
                f"Give --context {model.context} at most."
            )
        return context

    def plan(self, model: Model, data: Data) -> Plan:
        """Returns how the documents of a corpus are packed.

        Raises:
          ValueError: if the separator is no token of the model.
        """
        packing = self.options.packing
        return Plan(
            context=self.context(model),
            separator=separator(packing.separator, model),
            cuts=apart if packing.apart else joined,
            special_tokens=packing.special_tokens,
            skip_empty=data.skip_empty,
            chunk=packing.chunk,
        )

    def source(self, data: Data, name: str | None = None) -> Source:
        """Returns the documents of a corpus."""
        return open_source(
            data.data,
            column=data.text_column,
            split=data.split,
            pattern=data.pattern,
            name=name,
            longest=data.longest,
        )

    def pack(self, model: Model, data: Data, name: str | None = None) -> Corpus:
        """Returns a corpus of the run, packed unless it has been.

        Raises:
          ValueError: if a row is not good enough, or what was packed is damaged.
        """
        source = self.source(data, name)
        stage = self.corpus_stage(model, data, source, name)
        folder = self._packed(source.name)
        if not self.ledger.finished(stage, folder):
            if folder.exists() and self.ledger.changes(stage):
                # What there is goes only for something that can be packed, and in one
                # step: whoever begins next removes the rest of it.
                check_source(source, skip_empty=data.skip_empty)
                away = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
                led("making room for a corpus", lambda: folder.rename(away))
            self.begin(stage)
            plan, watch = self.plan(model, data), Watch(self.console)
            self.say(
                f"Every row of {data.data} is looked at, then packed into sequences of "
                f"at most {plan.context} tokens."
            )
            with self.driver.stage(stage.name):
                led(
                    "packing",
                    lambda: pack(source, model.tokenizer, folder, plan, watch=watch),
                )
        # Noted again if it was before: the same documents may be in another place now.
        self.ledger.finish(stage)
        return self._read(stage.key, source)

    def corpus(self, model: Model) -> Corpus:
        """Returns the corpus of the fit, which was packed before.

        Raises:
          ValueError: if it changed since, or what was packed is damaged.
        """
        data = self.options.data
        source = self.source(data)
        stage = self.corpus_stage(model, data, source, None)
        if not self.ledger.finished(stage, self._packed(source.name)):
            changes = "; ".join(self.ledger.changes(stage)) or "it is not finished"
            raise ValueError(
                f"The run's {stage.name} is not what it was: {changes}. Run `influence "
                f"fit {self.folder}` again, or restore what changed."
            )
        return self._read(stage.key, source)

    def reopened(self, name: str) -> Corpus:
        """Returns a corpus that was packed before, without its model.

        Raises:
          ValueError: if what was packed is damaged.
        """
        key = self.ledger.stages[f"corpus {name}"]["key"]
        return self._read(key, self.source(*self.data_of(name)))

    def data_of(self, corpus: str) -> tuple[Data, str | None]:
        """Returns what a corpus was packed from, and its name if one was given."""
        entry = self.ledger.stages[f"corpus {corpus}"]
        return Data(**entry["data"]), entry["named"]

    def _read(self, key: str, source: Source) -> Corpus:
        folder = self._packed(source.name)
        check_packed(folder)
        return Corpus(read_packed(folder), source, key)

    def _packed(self, corpus: str) -> Path:
        return self.folder / "corpora" / corpus

    def corpus_stage(
        self, model: Model, data: Data, source: Source, name: str | None
    ) -> Stage:
        """Returns the stage of a corpus."""
        about = self.plan(model, data).about
        del about["chunk"]  # sequences do not depend on it
        return Stage(
            f"corpus {source.name}",
            {
                "data": source.fingerprint(),
                "column": source.column,
                "tokenizer": model.tokenizer.sha256 if model.tokenizer else "none",
                "packing": json.dumps(about, sort_keys=True),
            },
            {"corpus": source.name, "data": asdict(data), "named": name},
        )

    def common(self, weights: str) -> dict[str, str]:
        """Returns the inputs of every stage that a model goes into."""
        within = str(self.options.packing.within)
        return {"code": code(), "weights": weights, "within": within}

    def place(self, role: str) -> str:
        """Returns where the model in a role is opened from."""
        return str(self.options.model if role == MODEL else self.options.base)

    def check_models(self) -> None:
        """Raises unless there is something in the place of every model.

        Raises:
          FileNotFoundError: if there is not.
        """
        for role in self.roles:
            if role not in self.given:
                check_place(self.place(role))

    def weights(self, role: str) -> str:
        """Returns the checksum of the model in a role; nothing is loaded for it."""
        if role in self.given:
            return self.given[role].digest
        options = self.options
        return digest(self.place(role), dtype=options.dtype, merge=options.merge)

    def tokenizer(self) -> ModelTokenizer | None:
        """Returns the run's tokenizer, if there is one."""
        if MODEL in self.given:
            return self.given[MODEL].tokenizer
        return open_tokenizer(self.place(MODEL))

    def batches(self, packed: Packed, size: int) -> PackedBatches:
        """Returns sequences in batches, as the run's models read them."""
        return packed.batches(size, segments=self.options.packing.within)

    def batch(
        self,
        name: str,
        key: str,
        asked: int | None,
        packed: Packed,
        work: Callable[[PackedBatches], object],
    ) -> Measured:
        """Returns how large batches are: as before, as asked, or as is fastest.

        Args:
          name: of the note about it.
          key: what it was measured with.
          asked: how large they are to be; measured if None.
          packed: what they are of.
          work: what is done with the first of them, until it is done.

        Raises:
          MemoryError: if there is no room for a single sequence.
          ValueError: if it has to be measured, by several processes.
        """
        noted, key = self.noted(name), f"{key} {asked}"
        if noted.get("key") == key:
            return Measured(noted["size"], noted["seconds"])
        if asked is None:
            check_alone("Measuring which batch is fastest (say --batch N)")
        most = len(packed)
        tried = sizes(packed.context, most) if asked is None else [min(asked, most)]
        with self.driver.stage("batches, to know what all will take"):
            found = fastest(
                lambda size: partial(work, self.batches(packed, size)), iter(tried)
            )
        self.note(name, key=key, **found._asdict())
        return found

    def smaller(self, name: str, size: int) -> None:
        """Notes that batches have to be smaller, so that the next process knows."""
        self.say(f"The device's memory is too small: on with batches of {size}.")
        self.note(name, **{**self.noted(name), "size": size})

    def saving(self, stage: Stage, every: float) -> Saving:
        """Returns what carries out the passes of a stage and saves them."""
        folder = self.saves(stage.name)
        return self.driver.saving(
            lambda name: Saves(folder / name.replace(" ", "-"), stage.key, every)
        )

    def forget(self, stage: Stage) -> None:
        """Removes what was saved of a stage that is finished."""
        if self.saves(stage.name).exists():
            led("forgetting saves", lambda: shutil.rmtree(self.saves(stage.name)))

    def saves(self, stage: str) -> Path:
        """Returns where the passes of a stage are saved, each in its own folder."""
        return self.folder / "saves" / stage.replace(" ", "-")

    def note(self, name: str, **about: Any) -> None:
        """Writes something down that a later process has to know."""
        notes = self.ledger.run.manifest.get("notes", {})
        self.remember(notes={**notes, name: about})

    def remember(self, **about: Any) -> None:
        """Adds to what the run says of itself."""
        led("noting", lambda: self.ledger.run.note(**about))

    def write(self, name: str, value: Any, writer: Callable[[Any], Writer]) -> None:
        """Writes an artifact, whose arrays may be spread over processes.

        Args:
          name: of the artifact.
          value: a pytree.
          writer: returns what writes it, of arrays that are all here.
        """
        here = gathered(self.layout, value)
        led(f"writing {name}", lambda: self.ledger.run.write(name, writer(here)))

    def noted(self, name: str) -> dict[str, Any]:
        """Returns what was written down under a name."""
        return self.ledger.run.manifest.get("notes", {}).get(name, {})

    def show(self, title: str, rows: Mapping[str, str]) -> None:
        """Shows what will be done, before it is."""
        table = Table(title=escape(title), show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(escape(name), escape(value))
        self.console.print(table)

    def say(self, text: str) -> None:
        """Shows a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, stage: Stage) -> None:
        """Notes that a stage is begun; says what changed if it was made before."""
        if changes := self.ledger.changes(stage):
            self.say(f"{stage.name}: again, because of {'; '.join(changes)}")
        self.ledger.begin(stage)


def opened_job(
    ledger: Ledger,
    console: Console | None = None,
    given: Models | None = None,
    devices: Layout | None = None,
) -> Job:
    """Returns a run's job, as it was fitted.

    Args:
      ledger: the run's.
      console: where to show what happens.
      given: models by role.
      devices: what it is carried out on; the first if left out.

    Raises:
      FileNotFoundError: if it was not.
    """
    said = ledger.run.manifest.get("fit")
    folder = ledger.run.folder
    if said is None:
        raise FileNotFoundError(
            f"The run in {folder} was not fitted. `influence fit {folder} --model … "
            "--data …` begins one."
        )
    shown = console or Console()
    return Job(
        ledger, from_json(said, folder), given or {}, shown, Driver(shown, devices)
    )


def clock(seconds: float) -> str:
    """Returns how long something takes, as one would say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
