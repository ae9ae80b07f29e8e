"""The page of a run: one HTML file that opens anywhere, offline.

Training text is somebody else's: the template escapes everything it is handed, and only
the figures, whose text plotly has escaped, are marked as HTML.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xarray as xr
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from influence.attribution.scores import PER_COPY, Ranked, rankings
from influence.model.continuation import Continuation
from influence.runtime.report import figures
from influence.runtime.report.templates import templates
from influence.truth.removal import Check

SHOWN = 5
"""How many sequences of each sign are shown with their tokens."""

COLUMNS = 12
"""How many sequences of each sign the heatmap shows."""


@dataclass(frozen=True)
class Question:
    """A query as a reader sees it.

    Attributes:
      kind: what sort of query it is, in a word or two.
      prompt: its text.
      completion: the text whose log-probability is measured.
      continuation: how the model continues it.
    """

    kind: str
    prompt: str
    completion: str
    continuation: Continuation


@dataclass(frozen=True)
class Findings:
    """What a page shows.

    Attributes:
      facts: about the run, `(what, value)`.
      questions: by query name.
      total: `(query, train)`, of all sequences.
      layers: `(query, train, layer)`, of those that are shown at least.
      pieces: each sequence's text, token by token, by id.
      shares: `(query, train, token)`, of the sequences that are shown.
      check: what retraining showed, if it was asked for.
      features: by query name, `(feature, train)`: the influence of shown sequences that
        goes through features, if it was looked for.
    """

    facts: Sequence[tuple[str, str]]
    questions: Mapping[str, Question]
    total: xr.DataArray
    layers: xr.DataArray
    pieces: Mapping[str, Sequence[str]]
    shares: xr.DataArray
    check: Check | None
    features: Mapping[str, xr.DataArray] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """Returns the unit of scores."""
        return self.total.attrs["unit"]

    @property
    def measured_in(self) -> str:
        """Returns the unit of what is measured."""
        return self.unit.removesuffix(PER_COPY).strip()


def render(findings: Findings) -> str:
    """Returns the page."""
    pages = templates()
    pages.filters["nats"] = lambda x: f"{x:+.3g}".replace("-", "−")
    return pages.get_template("page.html").render(
        style=Markup(pages.get_template("page.css").render()),
        plotly=Markup(get_plotlyjs()),
        facts=findings.facts,
        unit=findings.unit,
        measured_in=findings.measured_in,
        candidates=findings.total.attrs.get("candidates", "all"),
        queries=[_query(findings, name) for name in findings.questions],
        check=None if findings.check is None else _check(findings, findings.check),
    )


def shown(total: xr.DataArray, each: int = SHOWN) -> list[str]:
    """Returns the ids of every query's `each` highest and lowest sequences."""
    found = (*rankings(total, each), *rankings(total, each, lowest=True))
    return list(dict.fromkeys(x.id for ranking in found for x in ranking))


def _query(findings: Findings, name: str) -> dict:
    place = list(findings.questions).index(name)
    total = findings.total.sel(query=name).values
    shares = findings.shares.sel(query=name)
    limit = float(np.abs(shares).max()) or 1.0
    one = findings.total.isel(query=[place])
    (tops,), (bottoms,) = rankings(one, COLUMNS), rankings(one, COLUMNS, lowest=True)
    columns = [x.id for x in (*tops, *reversed(tuple(bottoms)))]
    layers = findings.layers.sel(query=name, train=columns)
    raising = np.sort(total[total > 0])[::-1]
    first = max(1, round(0.01 * len(total)))

    def sequence(ranked: Ranked) -> dict:
        # Positions beyond a sequence's last token are padding, and have no share.
        tokens = zip(
            findings.pieces[ranked.id],
            shares.sel(train=ranked.id).values.tolist(),
            strict=False,
        )
        return {
            "id": ranked.id,
            "score": ranked.score,
            "tokens": [
                {"text": text, "share": share, "colour": _colour(share / limit)}
                for text, share in tokens
            ],
        }

    return {
        "name": name,
        "question": findings.questions[name],
        "raises": [sequence(x) for x in tuple(tops)[:SHOWN]],
        "lowers": [sequence(x) for x in tuple(bottoms)[:SHOWN]],
        "features": _features(findings, name, columns),
        "heatmap": Markup(
            figures.heatmap(layers.transpose("layer", "train"), findings.measured_in)
        ),
        "distribution": Markup(figures.distribution(total, findings.unit)),
        "top_share": float(raising[:first].sum() / raising.sum())
        if len(raising)
        else 0,
        "limit": limit,
    }


def _features(findings: Findings, name: str, columns: Sequence[str]) -> Markup | None:
    """Returns the heatmap of features × sequences, if there is one."""
    found = findings.features.get(name)
    if found is None:
        return None
    here = [x for x in columns if x in found["train"].values]
    rows = found.sel(train=here).transpose("feature", "train").rename(feature="layer")
    return Markup(figures.heatmap(rows, findings.measured_in))


def _colour(strength: float) -> str:
    """Returns a translucent colour: the more of it, the stronger the influence."""
    red, green, blue = (
        int((figures.RAISES if strength > 0 else figures.LOWERS)[i : i + 2], 16)
        for i in (1, 3, 5)
    )
    return f"rgba({red},{green},{blue},{min(1.0, abs(strength)) ** 0.5 * 0.7:.3f})"


def _check(findings: Findings, check: Check) -> dict:
    changes = {
        "predicted": check.predicted.tolist(),
        "top sequences removed": check.top.changes.tolist(),
        "BM25's removed": check.bm25.changes.tolist(),
        "random ones removed": check.random.changes.tolist(),
    }
    return {
        "figure": Markup(figures.retraining(list(check.queries), changes)),
        "rows": [
            {"name": name, **{k: v[i] for k, v in changes.items()}}
            for i, name in enumerate(check.queries)
        ],
        "removed": len(check.top.places),
        "sequences": findings.total.sizes["train"],
        "same_sign": check.same_sign,
        "queries": len(check.queries),
        "rank_correlation": check.rank_correlation,
        "deviations": check.deviations,
        "spread": float(check.random.changes.std(ddof=1)),
    }
