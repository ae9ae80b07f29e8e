"""Rankings in a terminal."""

from collections.abc import Mapping, Sequence

import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from influence.attribution.scores import Ranking, rankings
from influence.runtime.run.asking import Question

SNIPPET = 240
"""How many characters of a sequence are shown in a terminal."""


def print_rankings(
    console: Console,
    asked: Sequence[Question],
    total: xr.DataArray,
    texts: Mapping[str, str],
    top: int,
) -> None:
    """Prints the sequences that matter most for each question, and what numbers are.

    Args:
      console: where.
      asked: the questions.
      total: `(query, train)`, of them.
      texts: of the sequences that are shown, by name.
      top: how many of either sign.
    """
    both = rankings(total, top), rankings(total, top, lowest=True)
    for question, up, down in zip(asked, *both, strict=True):
        console.rule(escape(str(question)), align="left")
        for ranking, what in ((up, "raises it most"), (down, "lowers it most")):
            console.print(_table(ranking, what, texts))
    console.print(_about(total), highlight=False, markup=False)


def _table(ranking: Ranking, what: str, texts: Mapping[str, str]) -> Table:
    table = Table(title=escape(f"{what} ({ranking.unit})"), title_justify="left")
    table.add_column("score", justify="right")
    for name in ("sequence", "text"):
        table.add_column(name, overflow="fold")
    for x in ranking:
        table.add_row(f"{x.score:+.3g}", escape(x.id), _snippet(texts[x.id]))
    return table


def _about(total: xr.DataArray) -> str:
    """Returns what the numbers are."""
    keys = ("curvature", "damping", "solver", "n_train", "kept", "candidates")
    said = ", ".join(f"{k}: {total.attrs[k]}" for k in keys if k in total.attrs)
    return f"{total.attrs['sign']}. {said}."


def _snippet(text: str) -> str:
    short = text if len(text) <= SNIPPET else text[:SNIPPET] + "…"
    return escape(" ".join(short.split()))
