"""What an experiment leaves behind: its numbers, a figure, and what became of a claim.

    write("NAME", seed=seed, settings=settings, rows=rows, claims=claims)
    with figure("NAME") as (axes,):
        axes.plot(x, y)
    console.print(table(claims))

All of it lies in `experiments/results/`, named after the experiment.
"""

import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from rich.table import Table

FOLDER = Path(__file__).parent / "results"

PACKAGES = ("influence", "jax", "flax", "optax", "numpy")

INK, PALE = "#333333", "#cccccc"

COLOURS = ("#2f5d8a", "#c8553d", "#6a994e", "#8d6a9f", "#b08a3e", "#7a7a7a")
"""Of the lines and bars of a figure, in their order."""

STYLE: dict[Any, Any] = {
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": PALE,
    "grid.linewidth": 0.5,
    "font.size": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "savefig.dpi": 150,
}


@dataclass(frozen=True)
class Claim:
    """What somebody stated, and what came of it here.

    Attributes:
      statement: theirs, with its number and where it is from.
      measurement: ours, with its number.
      holds: whether the one bears out the other; None if that can't be said.
    """

    statement: str
    measurement: str
    holds: bool | None


def table(claims: Sequence[Claim], title: str = "") -> Table:
    """Returns claims as a table to print."""
    found = Table(title=title or None, title_justify="left", show_lines=True)
    for head in ("statement", "here", "holds"):
        found.add_column(head)
    for x in claims:
        word = {True: "yes", False: "no", None: "can't say"}[x.holds]
        found.add_row(x.statement, x.measurement, word)
    return found


def write(
    name: str,
    *,
    seed: int,
    settings: Any,
    rows: Any,
    claims: Sequence[Claim] = (),
    folder: Path = FOLDER,
) -> Path:
    """Writes a result as JSON, its keys in alphabetical order; returns where it is.

    Args:
      name: the experiment's.
      seed: of everything drawn.
      settings: what else would have to be the same: a dataclass, or names and values.
      rows: the raw numbers; kept to 6 significant digits, None if not finite.
      claims: what they say.
      folder: where results are.
    """
    record = {
        "name": name,
        "seed": seed,
        "settings": settings if isinstance(settings, Mapping) else asdict(settings),
        "rows": rows,
        "claims": [asdict(x) for x in claims],
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version()}
        | {x: version(x) for x in PACKAGES},
    }
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        plain(record), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False
    )
    path.write_text(text + "\n", encoding="utf-8")
    return path


def plain(value: Any) -> Any:
    """Returns a value as JSON has it: numpy's as Python's, floats shortened."""
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(k): plain(x) for k, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


@contextmanager
def figure(
    name: str, columns: int = 1, folder: Path = FOLDER, height: float = 3.2
) -> Iterator[list[Axes]]:
    """Opens a figure, a panel a column, and writes it as PNG when it is drawn.

    Args:
      name: the experiment's.
      columns: how many panels are side by side.
      folder: where results are.
      height: in inches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        drawn = Figure((max(5.5, 4 * columns), height), layout="constrained")
        yield list(drawn.subplots(1, columns, squeeze=False)[0])
        drawn.savefig(folder / f"{name}.png")


def bars(axes: Axes, names: Sequence[str], values: Any, errors: Any, what: str) -> None:
    """Draws a horizontal bar for each name, the first on top.

    Args:
      axes: where.
      names: of the bars.
      values: their lengths.
      errors: to either side, or those below and those above.
      what: the values are.
    """
    at = range(len(names))
    axes.barh(at, values, xerr=errors, height=0.7, color=COLOURS[0])
    axes.set_yticks(at, list(names))
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(what)
