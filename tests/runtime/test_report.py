"""A page shows what it is given, as text."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr

from influence.attribution.scores import Scores, labelled, rankings
from influence.model.continuation import Continuation
from influence.runtime.report import figures, page
from influence.truth.removal import Check, Removal

HOSTILE = "<script>alert(1)</script>"


def findings(text=HOSTILE, check=True):
    rng = np.random.default_rng(0)
    ids = [f"{text}:{i}" for i in range(40)]
    names = [f"{text} a", "b"]
    layers = ["blocks.mlp.up.kernel[0]", "blocks.mlp.up.kernel[1]"]
    dims = {"query": names, "train": ids, "layer": layers}
    scores = Scores(
        labelled(rng.standard_normal((2, 40, 2)), dims, 40, [("damping", text)])
    )
    shown = page.shown(scores.total)
    shares = labelled(
        rng.standard_normal((2, len(shown), 3)),
        {"query": names, "train": shown, "token": range(3)},
        40,
        (),
    )
    removal = Removal(np.arange(3), np.array([-1.0, -30.0]))
    return page.Findings(
        facts=[("corpus", text)],
        questions={
            name: page.Question(text, text, text, Continuation(-1.0, -9.0, True))
            for name in names
        },
        total=scores.total,
        layers=scores.layers,
        pieces={x: [text, "\n", "é"] for x in ids},
        shares=shares,
        check=Check(
            tuple(names),
            np.array([-2.0, -3.0]),
            removal,
            removal._replace(changes=np.array([0.1, -0.2])),
            removal,
        )
        if check
        else None,
    )


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.scripts, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass


def test_training_text_is_shown_as_text():
    html = page.render(findings())
    # Not once does the text stand in the page as a tag, in markup or in a figure.
    assert HOSTILE not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    tags = Tags()
    tags.feed(html)
    harmless = page.render(findings("harmless"))
    plain = Tags()
    plain.feed(harmless)
    assert len(tags.scripts) == len(plain.scripts)


def test_a_page_needs_nothing_from_elsewhere():
    tags = Tags()
    tags.feed(page.render(findings()))
    assert all(x.startswith(("#", "data:")) for x in tags.links)


def test_a_page_shows_the_numbers():
    found = findings("text")
    html = page.render(found)
    for ranking in rankings(found.total, page.SHOWN):
        for x in ranking:
            assert x.id in html
            assert f"{x.score:+.3g}".replace("-", "−") in html
    assert "2 of 2" in html
    assert "nats per added copy" in html


def test_a_page_of_something_else_than_log_probabilities_does_not_speak_of_nats():
    found = findings("text", check=False)
    unit = "units of the measurement per added copy"
    total = found.total.assign_attrs(unit=unit)
    html = page.render(replace(found, total=total))
    assert f"score, {unit}" in html
    assert "change of what is measured, in units of the measurement" in html
    assert "nats per added copy" not in html


def test_a_page_without_a_check_does_not_speak_of_one():
    assert "Is it true?" not in page.render(findings(check=False))


@pytest.mark.parametrize("values", [[0.5, -0.25], [1.0, 2.0]])
def test_the_heatmap_has_layers_in_rows_and_zero_in_the_middle(values):
    layers = xr.DataArray(
        [values, values],
        dims=("layer", "train"),
        coords={"layer": ["a.up.kernel[0]", "a.up.kernel[1]"], "train": ["x", "y"]},
    )
    html = figures.heatmap(layers, "nats")
    limit = max(abs(x) for x in values)
    assert re.search(rf'"zmin":-{limit}', html)
    assert re.search(rf'"zmax":{limit}', html)
    assert '"y":["up [0]","up [1]"]' in html


def test_names_of_layers_are_shown_without_what_all_share():
    names = ["blocks.mlp.up.kernel[0]", "blocks.attention.q.kernel[1]"]
    assert figures.short_layers(names) == ["mlp.up [0]", "attention.q [1]"]
