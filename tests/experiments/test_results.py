"""A result says all it was made with, in the same bytes for the same numbers."""

import json
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from experiments.results import Claim, figure, table, write

CLAIMS = (Claim("more than 1", "2", True), Claim("many", "few", False))


@dataclass(frozen=True)
class Settings:
    width: int = 8


def test_the_same_numbers_are_the_same_bytes(tmp_path):
    first = {"b": np.float32(0.5), "a": np.arange(2)}
    second = dict(reversed(first.items()))
    paths = [
        write(name, seed=1, settings=Settings(), rows=x, folder=tmp_path / name)
        for name, x in (("r", first), ("r", second))
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_result_can_be_read_again(tmp_path):
    rows = [{"score": np.float64(1 / 3), "undefined": float("nan")}]
    path = write(
        "r", seed=3, settings=Settings(), rows=rows, claims=CLAIMS, folder=tmp_path
    )
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["rows"] == [{"score": 0.333333, "undefined": None}]
    assert (found["seed"], found["settings"]) == (3, {"width": 8})
    assert [x["holds"] for x in found["claims"]] == [True, False]


def test_a_figure_is_written(tmp_path):
    with figure("f", columns=2, folder=tmp_path) as (left, right):
        left.plot([0, 1])
        right.bar(["a"], [1])
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_says_what_does_not_hold():
    console = Console(width=80)
    with console.capture() as shown:
        console.print(table(CLAIMS))
    assert [word in shown.get() for word in ("yes", "no", "few")] == [True] * 3
