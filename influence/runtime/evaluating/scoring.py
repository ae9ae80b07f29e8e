"""A method's scores with what they cost, and the table of such."""

import time
from collections.abc import Sequence

import jax
import xarray as xr
from rich.table import Table

from influence.curvature.solvers import Diverged
from influence.runtime.memory import forget_peak, peak
from influence.truth.methods import Score, chance
from influence.truth.subject import Subject
from influence.truth.table import REFERENCE, Row


def costed(subject: Subject, score: Score, *, warm: bool = False) -> xr.DataArray:
    """Returns a method's scores; in `attrs` the seconds and megabytes they took.

    A method that diverges stays in the table with what it reached: scores that rank
    nothing, and why in `diverged`.

    Args:
      subject: what is asked about.
      score: the method.
      warm: whether to do it twice and time the second time, when everything is
        compiled: where compiling takes longer than what is timed. Otherwise compiling
        counts, and nothing that others compiled helps.
    """
    if warm:
        _scored(subject, score)
    else:
        jax.clear_caches()
    forgot, begun = forget_peak(), time.monotonic()
    found = _scored(subject, score)
    cost = {"seconds": time.monotonic() - begun}
    if forgot:
        cost["megabytes"] = peak()
    found = found.drop_vars([x for x in found.coords if x not in found.dims])
    return found.rename("score").assign_attrs(found.attrs | cost)


def _scored(subject: Subject, score: Score) -> xr.DataArray:
    try:
        return score(subject)
    except Diverged as error:
        return (0 * chance(subject)).assign_attrs(diverged=str(error))


def shown(rows: Sequence[Row]) -> Table:
    """Returns rows as a table to print."""
    table = Table(
        title="Linear datamodelling score, with 95 % of bootstrap samples",
        title_justify="left",
    )
    for name in ("method", "needs", "protocol"):
        table.add_column(name, overflow="fold")
    for name in ("LDS", f"more than {REFERENCE}", "seconds", "MB"):
        table.add_column(name, justify="right")
    for x in rows:
        table.add_row(
            *(x.method, x.needs, x.protocol),
            f"{x.lds:.3f} [{x.low:.3f}, {x.high:.3f}]",
            f"{x.difference:+.3f} [{x.difference_low:+.3f}, {x.difference_high:+.3f}]",
            f"{x.seconds:.1f}",
            "" if x.megabytes is None else f"{x.megabytes:.0f}",
        )
    return table
