"""How a model was trained: what a recipe file says.

    steps = 300          # updates
    batch = 32           # sequences an update
    rate = 5e-3          # the highest learning rate, on a warmed-up cosine
    from = "scratch"     # or "base", or a model's folder: where training began

and, if they are not as they are here:

    warmup = 0.05        # the share of steps over which the rate rises
    last = 0.0           # the last step's rate, as a share of the highest
    seed = 0             # of the order of sequences and, from scratch, of the weights
    optimizer = "adamw"  # decay = 0.01, clip = 1.0, root = 0.0, b2 = 0.99
                         # or "sgd": momentum = 0.0, decay = 0.0
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from influence.model.train import SGD, AdamW, Recipe
from influence.runtime.tables import check_table, kinds, read_toml

OPTIMIZERS: Mapping[str, type[AdamW] | type[SGD]] = {"adamw": AdamW, "sgd": SGD}

NEEDED = ("steps", "batch", "rate", "from")


class Trained(NamedTuple):
    """How a model was trained.

    Attributes:
      recipe: steps, batches, rates, optimizer.
      start: where it began: `scratch`, `base`, the role of a model that is given, or a
        model's folder.
      seed: of the order of sequences and, from scratch, of the weights.
    """

    recipe: Recipe
    start: str
    seed: int


def read_recipe(path: Path) -> Trained:
    """Returns what a recipe file says.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it says something that means nothing, or not enough.

    Example:
      >>> from influence.runtime.recipes import read_recipe
      >>> told = read_recipe(how)
      >>> told.recipe.steps, told.recipe.batch, told.start
      (100, 5, 'start')
    """
    return recipe_of(read_toml(path), str(path))


def recipe_of(said: Mapping[str, Any], where: str) -> Trained:
    """Returns what a table of a recipe says.

    Raises:
      ValueError: as `read_recipe`.
    """
    kind = said.get("optimizer", "adamw")
    if kind not in OPTIMIZERS:
        raise ValueError(
            f"optimizer = {kind!r} in {where} is not known. Say one of "
            f"{', '.join(OPTIMIZERS)}."
        )
    own, update = kinds(Recipe), kinds(OPTIMIZERS[kind])
    known = {**own, "optimizer": str, "from": str, "seed": int, **update}
    check_table(said, known, NEEDED, where)
    optimizer = OPTIMIZERS[kind](**{k: said[k] for k in update if k in said})
    recipe = Recipe(**{k: said[k] for k in own if k in said}, optimizer=optimizer)
    if recipe.warmup and max(1, round(recipe.warmup * recipe.steps)) >= recipe.steps:
        raise ValueError(
            f"warmup = {recipe.warmup} in {where} leaves none of {recipe.steps} steps. "
            "Warm up for fewer."
        )
    return Trained(recipe, said["from"], said.get("seed", 0))


def check_batch(trained: Trained, sequences: int) -> None:
    """Raises if a recipe's batch is larger than the corpus.

    Raises:
      ValueError: naming both.
    """
    if trained.recipe.batch > sequences:
        raise ValueError(
            f"The recipe takes batches of {trained.recipe.batch} sequences; the corpus "
            f"has {sequences}. Say by which the model was trained."
        )
