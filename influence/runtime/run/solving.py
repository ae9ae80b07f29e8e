"""How a run's questions are solved for: options become a solver."""

import numpy as np

from influence.curvature.diagonal import diagonal
from influence.curvature.operator import Curvature
from influence.curvature.solvers import ConjugateGradients, Eigenbasis, Solver
from influence.curvature.unrolled import Unrolled, adam_scale
from influence.linalg.damping import Relative
from influence.model.train import Recipe
from influence.runtime.corpus.packed import PackedBatches
from influence.runtime.models import Model
from influence.runtime.recipes import read_recipe
from influence.runtime.run.job import BASE, MODEL, Job
from influence.runtime.run.options import Query
from influence.runtime.run.packing import Corpus, sample

DAMPING = {"ekfac": 0.1, "cg": 10.0}
"""What each solver damps by if nothing is said, times the mean eigenvalue."""


def check_solver(options: Query, job: Job) -> None:
    """Raises for options that do not go together.

    Raises:
      FileNotFoundError: if there is no recipe where it should be.
      ValueError: saying which do not.
    """
    following = options.solver == "unrolled"
    if following and options.recipe is None:
        raise ValueError(
            "--solver unrolled follows training: say how the model was trained with "
            "--recipe RECIPE.toml (docs/truth.md)."
        )
    if not following and options.recipe is not None:
        raise ValueError(
            f"--recipe says how training went, which --solver {options.solver} does "
            "not ask. Leave it out, or give --solver unrolled."
        )
    if following and options.damping is not None:
        raise ValueError(
            f"--damping {options.damping:g} and --solver unrolled exclude each other: "
            "how far training went takes the damping's place."
        )
    if following and BASE in job.roles:
        raise ValueError(
            "The run has a base, which --recipe says nothing of: scores of the two "
            "would not be comparable. Solve by ekfac or cg."
        )
    recipe_of(options)


def recipe_of(options: Query) -> Recipe | None:
    """Returns how the model was trained, if that was said."""
    return None if options.recipe is None else read_recipe(options.recipe).recipe


def damping_of(options: Query) -> float | None:
    """Returns what is damped by, times the mean eigenvalue; None if by nothing."""
    return DAMPING.get(options.solver) if options.damping is None else options.damping


def effort(options: Query) -> tuple[int, int]:
    """Returns on how many sequences it is solved, and in how many steps; 0 if on none.

    The eigenbasis looks at no sequences.
    """
    if options.solver == "ekfac":
        return 0, 0
    return options.solve_on, options.steps


def kept(options: Query) -> int:
    """Returns how many vectors of each question are in memory while it is solved."""
    _, steps = effort(options)
    return {"ekfac": 2, "cg": 6, "unrolled": 4 + steps}[options.solver]


def inputs(options: Query) -> dict[str, str]:
    """Returns what of the options the solutions depend on."""
    sequences, steps = effort(options)
    return {
        "solver": options.solver,
        "damping": str(damping_of(options)),
        "solve_on": str(sequences),
        "steps": str(steps),
        "rank": str(options.rank),
        "recipe": str(recipe_of(options)),
    }


def damped_by(job: Job) -> float:
    """Returns what the run's queries were damped by, times the mean eigenvalue.

    Raises:
      FileNotFoundError: if nothing was asked.
      ValueError: if they were solved without a damping.
    """
    said = job.ledger.needed(f"queries of {MODEL}", "query")["inputs"]
    if said["damping"] == "None":
        raise ValueError(
            f"The run's questions are solved by {said['solver']}, which has no "
            "damping, and responses are of scores that are damped. Solve by ekfac or "
            "cg."
        )
    return float(said["damping"])


def described(options: Query) -> str:
    """Returns how it is solved, in words."""
    sequences, steps = effort(options)
    damping, recipe = damping_of(options), recipe_of(options)
    words = [options.solver]
    if damping is not None:
        words.append(f"damping {damping:g} × the mean eigenvalue")
    if recipe is not None:
        words.append(f"as far as {recipe.steps} steps of rate {recipe.rate:g} go")
    if sequences:
        words.append(f"{steps} steps on {sequences} sequences")
    return ", ".join(words)


def solver_of(
    job: Job,
    role: str,
    model: Model,
    corpus: Corpus,
    curvature: Curvature,
    options: Query,
) -> Solver:
    """Returns the solver that the options name."""
    damping, (sequences, steps) = damping_of(options), effort(options)
    if options.solver == "ekfac":
        assert damping is not None
        return Eigenbasis(Relative(damping))
    chosen = sample(corpus.packed, sequences, job.options.seed)
    batches = job.batches(chosen, job.noted(f"batch of {role}")["size"])
    if damping is not None:
        return ConjugateGradients(model.task, batches, Relative(damping), steps=steps)
    recipe = recipe_of(options)
    assert recipe is not None
    return _unrolled(model, batches, curvature, recipe, steps)


def _unrolled(
    model: Model,
    batches: PackedBatches,
    curvature: Curvature,
    recipe: Recipe,
    steps: int,
) -> Unrolled:
    """Returns training followed, in its optimizer's metric."""
    task, scale = model.task, {}
    if recipe.optimizer.adaptive:
        names = tuple(x.name for x in curvature.layers)
        squares = diagonal(task, model.params, batches, layers=names)
        scale = adam_scale(squares, recipe.batch)
    labels = [np.asarray(task.counts(x.inputs))[x.real_B].sum() for x in batches]
    each = float(np.sum(labels)) / len(batches.ids)
    distance = recipe.distance(0, recipe.steps, each)
    return Unrolled(task, batches, distance, scale, steps)
