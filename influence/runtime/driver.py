"""Carries out passes where a person can watch: a bar each, with rate and time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from influence.fold import Fold
from influence.runtime.mesh import Layout
from influence.runtime.placing import Placed, placed
from influence.runtime.processes import several
from influence.runtime.saves import Saved, Saves
from influence.types import Batch

SYNC = 0.2
"""Seconds between waits for the device: often enough to show, too rare to slow it."""


TOGETHER = 4
"""After how many batches several processes look whether to save."""


class _Rate(ProgressColumn):
    """How many sequences a second."""

    def render(self, task: Task) -> Text:
        """Returns the rate of late, or over the whole stage at its end."""
        speed = task.speed
        if task.finished and task.finished_time:
            speed = task.completed / task.finished_time
        return Text(
            "" if speed is None else f"{speed * task.fields['size']:,.0f} seq/s"
        )


@dataclass
class Driver:
    """Runs folds, one stage of a job after the other.

    Attributes:
      console: where to show progress.
      layout: the devices passes are carried out on; where arrays are if left out.
      seconds: how long each stage has taken so far, by name.

    Example:
      >>> from rich.console import Console
      >>> from influence.runtime.driver import Driver
      >>> driver = Driver(Console(quiet=True))
      >>> run = driver.run
      >>> fitted = influence.fit(task, params, batches, layers="block.*", run=run)
      >>> list(driver.seconds)
      ['covariances', 'eigenvectors', 'eigenvalues']
    """

    console: Console = field(default_factory=Console)
    layout: Layout | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, fold: Fold, batches: Any, saves: Saves | None = None) -> Any:
        """Carries out a fold, as a stage named after it.

        Args:
          fold: the pass.
          batches: what it walks over.
          saves: where it is saved as it goes, and from where it goes on if a process
            that carried it out ended before.
        """
        with self.stage(fold.name), self._bar(fold.name, batches) as advance:
            here = placed(fold, batches, self.layout)
            begun = Saved(here.init(), 0)
            saved = saves and saves.latest(here.kept(begun.state))
            if saved:
                begun = Saved(here.again(saved.state), saved.done)
            advance(begun.done)
            state = self._walk(here, begun, saves, advance)
            return jax.block_until_ready(here.finish(state))

    def _walk(
        self,
        here: Placed,
        begun: Saved,
        saves: Saves | None,
        advance: Callable[[int], None],
    ) -> Any:
        """Returns the state after all batches; it was saved if saving was asked for."""
        # Batches are handed to the device faster than it computes them: only what it
        # was waited for is shown as done.
        state, done, shown, waited = begun.state, begun.done, begun.done, 0.0
        kept = begun.done
        for what, size in here.walk(done):
            state, done = here.update(state, what), done + size
            if _looked_at(done, saves, waited):
                jax.block_until_ready(state)
                advance(done - shown)
                shown, waited = done, time.monotonic()
                if saves and saves.due():
                    saves.write(here.kept(state), done)
                    kept = done
        jax.block_until_ready(state)
        advance(done - shown)
        if saves and done > kept:
            saves.write(here.kept(state), done)
        return state

    @contextmanager
    def watched(self, name: str, batches: Any) -> Iterator[Callable[[int], None]]:
        """Shows a stage that is carried out elsewhere; yields what tells its steps."""
        with self.stage(name), self._bar(name, batches) as advance:
            yield advance

    def saving(self, saves: Callable[[str], Saves]) -> "Saving":
        """Returns the same driver for folds that are saved as they go.

        Args:
          saves: where the fold of some name is.
        """
        return Saving(self, saves)

    def named(self, name: str) -> "Renamed":
        """Returns the same driver for a fold that is to be shown under another name."""
        return Renamed(self, name)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage, and says so when it is over."""
        start = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
        if not self.console.is_terminal:
            took = time.monotonic() - start
            self.console.print(f"{name}: {took:.1f} s", markup=False)

    @contextmanager
    def _bar(self, name: str, batches: Any) -> Iterator[Any]:
        columns = (
            TextColumn("{task.description:<32}", markup=False),
            BarColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        hidden = not self.console.is_terminal
        with Progress(*columns, console=self.console, disable=hidden) as progress:
            size = _size(next(iter(batches), ()))
            task = progress.add_task(name, total=len(batches), size=size)
            yield partial(progress.advance, task)


@dataclass(frozen=True)
class Renamed:
    """A driver that shows every fold under one name."""

    driver: Driver
    name: str

    def __call__(self, fold: Fold, batches: Any) -> Any:
        """Carries out a fold, as a stage of that name."""
        return self.driver.run(fold._replace(name=self.name), batches)


@dataclass(frozen=True)
class Saving:
    """A driver that saves every fold as it goes."""

    driver: Driver
    saves: Callable[[str], Saves]

    def __call__(self, fold: Fold, batches: Any) -> Any:
        """Carries out a fold, from where it was last saved."""
        return self.driver.run(fold, batches, self.saves(fold.name))


def _looked_at(done: int, saves: Saves | None, waited: float) -> bool:
    """Returns whether the device is waited for now.

    If a pass is saved by several processes all of them have to wait for it at once, and
    so by the number of batches, not by their clocks.
    """
    if saves and several():
        return done % TOGETHER == 0
    return time.monotonic() - waited > SYNC


def rest(batches: Any, done: int) -> Iterator[Any]:
    """Returns what is left of some batches; those before it are not read if need be."""
    return islice(iter(batches), done, None)


def _size(batch: Any) -> int:
    """Returns how many sequences a batch or a chunk of training steps holds."""
    if isinstance(batch, Batch):
        return len(batch.real_B)
    return batch.size if isinstance(batch, np.ndarray) else 1
