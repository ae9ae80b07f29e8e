"""`influence sae eval`: how good a dictionary is, beside one of random weights."""

import json
from dataclasses import replace
from math import isfinite
from pathlib import Path

from rich.console import Console

from influence.interpret import quality
from influence.interpret.quality import Quality, scrambled
from influence.interpret.source import Source, centres
from influence.runtime.dictionaries.folders import open_dictionary
from influence.runtime.dictionaries.stored import Stored
from influence.runtime.run.job import Models
from influence.runtime.run.options import check_numbers
from influence.runtime.sae.options import Eval
from influence.runtime.sae.reading import Reading, check_stored, read_once
from influence.runtime.sae.training import CENTRED_ON, CONTROL, numbers, table
from influence.runtime.store import atomic, check_file


def judge(
    options: Eval, console: Console | None = None, given: Models | None = None
) -> dict[str, Quality]:
    """Judges a dictionary, and returns its qualities and the control's.

    Args:
      options: what is judged, on what.
      console: where to show the numbers; the terminal if left out.
      given: the model, by the role `model`, instead of opening it.

    Raises:
      ValueError: if dictionary and model do not go together.
      FileNotFoundError: if something is not where the options say.
    """
    check_numbers(options)
    if options.out is not None:
        check_file(options.out)
    shown = console or Console()
    stored = open_dictionary(options.sae)
    control = _control(options)
    with read_once(options.read, shown, given or {}) as reading:
        check_stored(stored, reading)
        found = {"model": _judged(options, reading, reading.source, stored)}
        if control is not None:
            source = reading.source
            random = replace(source, params=scrambled(source.params, options.seed))
            found[CONTROL] = _judged(options, reading, random, control)
    shown.print(table(found, f"{options.sae}, {stored.about.site}"))
    _histogram(shown, found["model"])
    if options.out is not None:
        # JSON has no NaN.
        said = {
            k: {n: v if isfinite(v) else None for n, v in numbers(x).items()}
            for k, x in found.items()
        }
        with atomic(options.out) as temporary:
            temporary.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return found


def _control(options: Eval) -> Stored | None:
    """Returns the dictionary of random weights to compare with, if there is one."""
    if options.control is not None:
        return open_dictionary(options.control)
    beside = Path(options.sae) / CONTROL
    return open_dictionary(str(beside)) if beside.is_dir() else None


def _judged(options: Eval, reading: Reading, source: Source, stored: Stored) -> Quality:
    site = reading.site(stored.about.site)
    writes = None if stored.about.writes is None else reading.site(stored.about.writes)
    target, run = writes or site, reading.job.driver.run
    some = reading.some(CENTRED_ON, options.seed)
    centre = run(centres(source, (target,)), reading.batches(some))
    fold = quality.fold(source, stored.dictionary, centre[target], site, writes)
    judged_on = reading.some(options.sequences, options.seed)
    return run(fold, reading.batches(judged_on))


def _histogram(console: Console, found: Quality) -> None:
    """Shows how many features are on how often."""
    rows = found.densities()
    most = max(n for _, n in rows) or 1
    console.print("How often features are on:")
    for low, count in rows:
        bar = "█" * round(40 * count / most)
        console.print(
            f"  10^{low:+.1f} … 10^{low + 0.5:+.1f}  {count:>7,}  {bar}",
            highlight=False,
        )
    dead = int((found.density_F == 0).sum())
    console.print(f"  never {'':>12} {dead:>7,}", highlight=False)
