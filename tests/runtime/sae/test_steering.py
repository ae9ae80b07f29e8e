"""Options of steering, and what the command shows."""

import re
from dataclasses import replace

import pytest
from rich.console import Console

from influence.interpret.steering import ALWAYS, GENERATED, Edit
from influence.runtime.report.steering import Said, Trial, render
from influence.runtime.run.options import Data
from influence.runtime.sae.browsing import browse
from influence.runtime.sae.judging import judge
from influence.runtime.sae.options import Eval, Features, Read, Steer
from influence.runtime.sae.steering import _edits as edits
from influence.runtime.sae.steering import steer
from tests.runtime.sae import make


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dictionary."""
    return make.trained(tmp_path_factory.mktemp("steering"), tokens=2_000)


def asked(place="S", **options) -> Steer:
    """Returns what is asked of the command."""
    return Steer(place, "my own", **{"prompt": ("1 2 3",), "feature": (5,), **options})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [Edit(5, 0.0, 0.0, ALWAYS)]),
        ({"add": (2.0,)}, [Edit(5, 1.0, 2.0, ALWAYS)]),
        ({"clamp": (2.0,), "positions": "-3:-1"}, [Edit(5, 0.0, 2.0, (-3, -1))]),
        (
            {"feature": (5, 6), "scale": (2.0, 3.0), "positions": "generated"},
            [Edit(5, 2.0, 0.0, GENERATED), Edit(6, 3.0, 0.0, GENERATED)],
        ),
        (
            {"feature": (5, 6), "clamp": (2.0,), "positions": "0"},
            [Edit(5, 0.0, 2.0, (0, 0)), Edit(6, 0.0, 2.0, (0, 0))],
        ),
    ],
)
def test_options_are_edits(options, expected):
    assert edits(asked(**options)) == expected


def test_what_is_said_is_shown_with_and_without(place):
    console = Console(record=True, width=100, quiet=True)
    found = steer(asked(place, clamp=(3.0,), length=4), console, make.models())
    assert len(found.plain[0]) == len(found.steered[0]) == 4
    assert found.kl[0] >= 0
    nothing = steer(asked(place, scale=(1.0,), length=4), console, make.models())
    assert nothing.plain == nothing.steered
    assert nothing.kl[0] == pytest.approx(0, abs=1e-12)


def test_the_page_has_the_edit_and_the_ablation(place, tmp_path):
    out = tmp_path / "steering.html"
    options = asked(place, prompt=("1 2", "3 4 5"), clamp=(3.0,), length=4, out=out)
    found = steer(options, make.QUIET, make.models())
    ablated = steer(replace(options, clamp=(), out=None), make.QUIET, make.models())
    page = out.read_text()
    rows = [x.split("<pre>")[1] for x in page.split("<tr>") if "<pre>" in x]
    texts = [re.sub("<[^>]*>", "", x.split("</pre>")[0]) for x in rows]
    assert texts[::3] == [" ".join(map(str, x)) for x in found.plain]
    assert texts[1::3] == [" ".join(map(str, x)) for x in found.steered]
    assert texts[2::3] == [" ".join(map(str, x)) for x in ablated.steered]
    assert page.count("clamped to 3 × its largest") == 2
    assert page.count("<td>ablated</td>") == 2
    for said in (found, ablated):
        assert f"{said.kl[1]:.3f}" in page


def test_a_prompt_is_no_markup():
    page = render("m", [], [Trial("<script>", "<b>", [Said("x", "<i>", 0.0, 0.0)])])
    assert "<script>" not in page
    assert "&lt;<mark>i&gt;</mark>" in page


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"feature": ()}, "No feature is named"),
        ({"add": (1.0,), "clamp": (1.0,)}, "Give one of --add"),
        ({"feature": (1, 2), "add": (1.0, 2.0, 3.0)}, "2 features and 3 strengths"),
        ({"positions": "there"}, "names no positions"),
        ({"positions": "3:1"}, "names no positions"),
        ({"prompt": ()}, "nothing to continue"),
        ({"prompt": ("words",)}, "no tokenizer"),
        ({"feature": (64,)}, "no feature 64"),
        ({"length": 30}, "context is 16"),
    ],
)
def test_what_makes_no_sense_is_refused(place, options, said):
    with pytest.raises(ValueError, match=said):
        steer(asked(place, **options), make.QUIET, make.models())


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("", ValueError, "is a folder"),
        ("none/page.html", FileNotFoundError, "There is no folder"),
    ],
)
def test_a_page_that_can_t_be_written_is_refused_and_nothing_is_lost(
    place, tmp_path, name, error, said
):
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    out, read, rest = tmp_path / name, Read("my own", Data("none")), make.models()
    for command in (
        lambda: steer(asked(place, out=out), make.QUIET, rest),
        lambda: browse(Features(place, read, out=out), make.QUIET, rest),
        lambda: judge(Eval(place, read, out=out), make.QUIET, rest),
    ):
        with pytest.raises(error, match=said):
            command()
    assert precious.read_text() == "mine"
