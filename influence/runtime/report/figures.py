"""The figures of a page, as pieces of HTML that need only the page's own script."""

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

RAISES, LOWERS, PLAIN = "#1f6f8b", "#c1502e", "#8a8f98"
"""Colours of what raises a measurement, of what lowers it, and of what does neither."""

COMMON = ("kernel", "weight")
"""What a matrix is called in every layer, and a figure need not say."""

DIVERGING = [[0, LOWERS], [0.5, "#ffffff"], [1, RAISES]]
FONT = {"family": "system-ui, sans-serif", "size": 12, "color": "#22262b"}


def heatmap(layers: xr.DataArray, unit: str) -> str:
    """Returns the layers × sequences heatmap of one query.

    Args:
      layers: `(layer, train)`, the sequences to show in the order to show them.
      unit: of what is measured.
    """
    limit = float(np.abs(layers).max()) or 1.0
    names = short_layers([str(x) for x in layers["layer"].values])
    figure = go.Figure(
        go.Heatmap(
            z=layers.values,
            x=[str(x) for x in layers["train"].values],
            y=names,
            zmin=-limit,
            zmax=limit,
            colorscale=DIVERGING,
            colorbar={"title": {"text": unit, "side": "right"}, "thickness": 12},
            hovertemplate="%{y}<br>%{x}<br>%{z:+.3g} " + unit + "<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", tickmode="array", tickvals=names)
    figure.update_xaxes(tickangle=-45, type="category")
    return _html(figure, 100 + 15 * len(names), margin={"l": 150, "b": 90, "t": 14})


def distribution(scores: np.ndarray, unit: str) -> str:
    """Returns how many sequences score how much, and how far the tails reach.

    Args:
      scores: of all sequences, for one query.
      unit: of scores.
    """
    figure = make_subplots(
        1,
        2,
        subplot_titles=("all sequences", "tails: how many score at least this"),
        horizontal_spacing=0.1,
    )
    figure.add_histogram(
        x=scores, nbinsx=80, marker_color=PLAIN, row=1, col=1, name="sequences"
    )
    for name, side, colour in (("raises", 1, RAISES), ("lowers", -1, LOWERS)):
        tail = np.sort(side * scores[side * scores > 0])[::-1]
        figure.add_scatter(
            x=tail,
            y=np.arange(1, len(tail) + 1),
            mode="lines",
            line={"color": colour, "width": 2},
            name=name,
            row=1,
            col=2,
        )
    figure.update_yaxes(type="log", title_text="sequences", dtick=1)
    figure.update_xaxes(title_text=f"score, {unit}", row=1, col=1)
    figure.update_xaxes(
        type="log",
        dtick=1,
        exponentformat="power",
        title_text=f"absolute score, {unit}",
        row=1,
        col=2,
    )
    figure.update_traces(showlegend=False, row=1, col=1)
    return _html(figure, 260, legend={"x": 0.99, "xanchor": "right", "y": 0.98})


def retraining(queries: list[str], changes: dict[str, list[float]]) -> str:
    """Returns the changes of each query's log-probability, predicted and by retraining.

    The axis is linear near zero and logarithmic far from it (`asinh`): one removal
    costs a tenth of a nat, another a hundred.
    """
    looks = {
        "predicted": {"symbol": "line-ns-open", "color": "#22262b", "size": 14},
        "top sequences removed": {"symbol": "circle", "color": LOWERS, "size": 11},
        "BM25's removed": {"symbol": "diamond-open", "color": "#7a5aa6", "size": 10},
        "random ones removed": {"symbol": "circle-open", "color": PLAIN, "size": 9},
    }
    figure = go.Figure()
    for name, values in changes.items():
        figure.add_scatter(
            x=np.arcsinh(values),
            y=queries,
            mode="markers",
            marker=looks[name] | {"line": {"width": 2}},
            name=name,
            customdata=values,
            hovertemplate="%{y}<br>"
            + name
            + ": %{customdata:+.3f} nats<extra></extra>",
        )
    reach = max(abs(x) for values in changes.values() for x in values)
    ticks = [0.0] + [
        sign * size
        for size in (0.3, 1, 3, 10, 30, 100)
        if size < 1.5 * reach
        for sign in (-1, 1)
    ]
    figure.update_xaxes(
        tickvals=np.arcsinh(ticks),
        ticktext=[f"{x:+g}" if x else "0" for x in ticks],
        title_text="change of the completion's log-probability, nats",
        zeroline=True,
        zerolinecolor="#22262b",
    )
    figure.update_yaxes(autorange="reversed")
    legend = {"orientation": "h", "y": 1.12, "x": 0}
    return _html(figure, 130 + 42 * len(queries), legend=legend, margin={"l": 90})


def short_layers(names: list[str]) -> list[str]:
    """Returns names without the words all of them have."""
    paths, places = zip(*(name.partition("[")[::2] for name in names), strict=True)
    words = [[x for x in path.split(".") if x not in COMMON] for path in paths]
    while all(len(x) > 1 for x in words) and len({x[0] for x in words}) == 1:
        words = [x[1:] for x in words]
    return [
        ".".join(x) + (f" [{place}" if place else "")
        for x, place in zip(words, places, strict=True)
    ]


def _html(figure: go.Figure, height: int, **layout) -> str:
    margin = {"l": 60, "r": 20, "t": 40, "b": 50} | layout.pop("margin", {})
    figure.update_layout(
        template="plotly_white", font=FONT, height=height, margin=margin, **layout
    )
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config={"displayModeBar": False, "responsive": True},
    )
