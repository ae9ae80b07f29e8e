"""The plan is printed for any config, and says what does not fit."""

import json
import re
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from influence.runtime.planning.kinds import PUBLISHED, device
from influence.runtime.planning.options import Plan
from influence.runtime.planning.planning import lasting, parsed, plan
from tests.cases import thinned

GOLDEN = Path(__file__).parents[2] / "golden" / "decoders"
MODELS = Path(__file__).parents[3] / "experiments" / "models"
FAMILIES = sorted(x.parent.name for x in GOLDEN.glob("*/config.json"))
STAGES = (
    *("covariances", "eigendecomposition", "eigenvalues"),
    *("query", "scan", "scan, per token"),
)


def printed(model, devices="H100×2", **options):
    paper = StringIO()
    console = Console(file=paper, width=300)
    plan(Plan(model, options.pop("tokens", 10_000), devices, **options), console)
    return paper.getvalue()


@pytest.mark.parametrize("name", thinned(FAMILIES, ["gpt2", "llama"]))
def test_every_family_is_planned(name):
    said = printed(GOLDEN / name, queries=3, rank=2)
    assert all(x in said for x in STAGES)
    assert "Breaks first" in said
    assert "as published" in said
    assert "Does not fit" not in said


def test_the_cpu_is_measured_on_the_spot():
    said = printed(GOLDEN / "llama", "cpux1", layers=("mlp",))
    assert "measured now" in said


def test_a_large_model_says_what_breaks_and_what_to_do():
    large = partial(
        printed, MODELS / "llama-2-7b", tokens=10**9, dtype="bfloat16", batch=1
    )
    said = large("H100×8", queries=32)
    assert "1 data × 8 model" in said
    assert "Does not fit: query" in said
    assert "--rank 32 (10.2 GB in all)" in said
    assert "Does not fit" not in large("H100×8", queries=32, rank=32)


@pytest.mark.slow  # plans twelve times
def test_blocks_that_are_proposed_do_fit():
    large = partial(
        printed, MODELS / "llama-2-7b", tokens=10**9, dtype="bfloat16", batch=1
    )
    said = large("A100-40×1")
    found = re.search(r"Does not fit: eigendecomposition.*--blocks (\d+) does", said)
    assert found is not None, said
    blocks = int(found[1])
    assert "Does not fit: eigendecomposition" not in large("A100-40×1", blocks=blocks)
    assert "Does not fit: eigendecomposition" in large("A100-40×1", blocks=blocks // 2)


def test_scores_of_too_many_tokens_are_told_by_their_option():
    said = printed(
        GOLDEN / "llama", "A100-40×1", tokens=10**9, per_token=10**6, context=16
    )
    (line,) = (x for x in said.splitlines() if x.startswith("Does not fit: scan, per"))
    assert "mostly working" in line
    assert "--per-token" in line


def test_queries_few_beside_their_bases_are_not_made_small_one_by_one():
    said = printed(
        MODELS / "llama-2-7b", "A100-40×8", tokens=10**9, dtype="bfloat16", queries=8
    )
    (line,) = (x for x in said.splitlines() if x.startswith("Does not fit: query"))
    assert "--rank" not in line


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_kinds_have_every_number(kind):
    found = device(kind, "bfloat16")
    assert min(found[1:7]) > 0
    assert device(kind, "float32").flops < found.flops


@pytest.mark.parametrize(
    ("devices", "said"),
    [("H100", "makes no sense"), ("H100×0", "makes no sense"), ("abacus×3", "no kind")],
)
def test_devices_that_are_none(devices, said):
    with pytest.raises(ValueError, match=said):
        printed(GOLDEN / "llama", devices)


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        printed(tmp_path)


def test_a_config_that_is_not_understood(tmp_path):
    words = json.loads((GOLDEN / "llama" / "config.json").read_text("utf-8"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**words, "surprise": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match="surprise"):
        printed(path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": 0}, "--tokens 0"),
        ({"queries": 0}, "--queries 0"),
        ({"context": 100_000}, "--context 100000"),
        ({"rank": 0}, "--rank 0"),
        ({"layers": ("nothing",)}, "No layer matches"),
    ],
)
def test_options_that_make_no_sense(options, said):
    with pytest.raises(ValueError, match=said):
        printed(GOLDEN / "llama", **options)


def test_the_multiplication_sign_may_be_a_letter():
    assert parsed("TPU-v5ex16") == ("TPU-v5e", 16)
    assert parsed("A100-80 × 2".replace(" ", "")) == ("A100-80", 2)


def test_times_are_said_in_their_largest_unit():
    assert lasting(3 * 365 * 86400) == "3.0 years"
