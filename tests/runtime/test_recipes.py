"""A recipe file says how a model was trained, and nothing else."""

import re
from pathlib import Path

import pytest

from influence.model.train import SGD, AdamW, Recipe
from influence.runtime.evaluating.experiment import read_experiment
from influence.runtime.recipes import read_recipe
from tests.runtime.evaluating.make import recipe


def test_a_recipe_is_what_its_file_says(tmp_path):
    told = read_recipe(recipe(tmp_path))
    assert told.recipe == Recipe(8, 4, 0.05)
    assert (told.start, told.seed) == ("start", 0)
    path = recipe(tmp_path, root=1e-8, clip=2, warmup=0, last=1, seed=3)
    told = read_recipe(path)
    optimizer = AdamW(clip=2, root=1e-8)
    assert told.recipe == Recipe(8, 4, 0.05, optimizer, warmup=0, last=1)
    assert told.seed == 3
    path = recipe(tmp_path, optimizer="sgd", momentum=0.9)
    assert read_recipe(path).recipe.optimizer == SGD(momentum=0.9)


WRONG = {
    "says epochs, which means nothing here. Known are steps, batch,": {"epochs": 3},
    "says momentum, which means nothing here": {"momentum": 0.9},
    "optimizer = 'lion' in .* is not known. Say one of adamw, sgd": {
        "optimizer": "lion"
    },
    "does not say steps, from": {"steps": None, "from": None},
    "steps = 'many' in .* is not a whole number": {"steps": "many"},
    "batch = 0 in .* makes no sense. Give 1 at least": {"batch": 0},
    "rate = 0 in .* makes no sense. Give more than 0": {"rate": 0},
    "warmup = 1.0 in .* makes no sense. Give less than 1": {"warmup": 1.0},
    "warmup = 0.95 in .* leaves none of 8 steps": {"warmup": 0.95},
}


@pytest.mark.parametrize("said", WRONG)
def test_what_a_recipe_can_not_say_is_said(tmp_path, said):
    with pytest.raises(ValueError, match=said):
        read_recipe(recipe(tmp_path, **WRONG[said]))


def test_a_file_that_is_none_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_recipe(tmp_path / "nowhere.toml")
    (tmp_path / "bad.toml").write_text("steps =")
    with pytest.raises(ValueError, match=r"bad\.toml is no TOML"):
        read_recipe(tmp_path / "bad.toml")


def test_the_files_in_the_documentation_can_be_read(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "truth.md"
    recipe, experiment = (tmp_path / x for x in ("recipe.toml", "experiment.toml"))
    (tmp_path / "corpus.jsonl").write_text("")
    blocks = re.findall(r"```toml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    for path, block in zip((recipe, experiment), blocks, strict=True):
        path.write_text(block)
    told = read_recipe(recipe)
    assert told.recipe == Recipe(300, 32, 5e-3, AdamW())  # the defaults it names
    assert read_experiment(experiment).protocol.drop == 0.01
