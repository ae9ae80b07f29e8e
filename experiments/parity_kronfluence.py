"""Does the engine give the numbers an independent implementation gives?

    python -m experiments.parity_kronfluence --golden F.npz --reference DIR

Compares with what kronfluence 1.0.1 (PyTorch) computed for two language models:

* `--golden`: a tiny model with a tied head on padded data, in float64. Covariances,
  eigenvalues, scores of every layer at three dampings, of every token, from queries of
  rank 3, of every sequence for itself; K-FAC's, a diagonal's and no curvature's scores.
* `--reference`: a folder with a trained character model (`small/`) and what
  kronfluence made of it in float32 (`ref_small/`), 4000 sequences. A few minutes.

Both fit the empirical Fisher. kronfluence's raw number `qᵀ H⁻¹ g` has a loss as the
measurement; ours divides by the number of sequences and measures a log-probability,
which changes the sign twice. The last line printed is JSON, `{quantity: relative
error}` in the Frobenius norm, of the worst layer where there are several.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from rich.console import Console
from safetensors.numpy import load_file

import influence
from experiments.reference import Counted, examples, small, tiny
from influence.attribution.forms import Plain
from influence.attribution.measurements import likelihoods
from influence.attribution.self_influence import self_influence
from influence.curvature import covariance
from influence.curvature.diagonal import diagonal, identity
from influence.curvature.kfac import kfac
from influence.fold import run as plain
from influence.linalg.damping import Inverse
from influence.model.trace import select, trace
from influence.runtime.driver import Driver
from influence.types import Layer, Params

DAMPINGS: dict[str, Inverse] = {
    "none": influence.Relative(0.1),
    "1e-3": influence.Absolute(1e-3),
    "1e-8": influence.Absolute(1e-8),
}
"""kronfluence's names for its dampings; "none" is its heuristic."""


def error(found: Any, expected: Any) -> float:
    """Returns the relative error in the Frobenius norm."""
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class Errors(dict[str, float]):
    """The worst relative error of each quantity."""

    def note(self, quantity: str, found: Any, expected: Any) -> None:
        """Compares, and keeps the error if it is the worst of its kind."""
        self[quantity] = max(self.get(quantity, 0.0), error(found, expected))


def golden(path: Path) -> Errors:
    """Returns the errors against the tiny model's numbers, in float64."""
    arrays = np.load(path)
    names = [x.split("/")[-1] for x in arrays.files if x.startswith("lambda/")]
    params = {k[2:]: arrays[k] for k in arrays.files if k.startswith("w/")}
    del params["head.weight"]  # the embedding, once more
    with jax.enable_x64(True):
        params = {k: jnp.asarray(x) for k, x in params.items()}
        train, queries = (
            examples(arrays[f"{kind}/ids"], arrays[f"{kind}/mask"], kind)
            for kind in ("train", "query")
        )
        return _golden(Counted(tiny), params, train, queries, arrays, names)


def _golden(
    task: Counted,
    params: Params,
    train: influence.Examples,
    queries: influence.Examples,
    arrays: Mapping[str, np.ndarray],
    names: Sequence[str],
) -> Errors:
    errors, batches = Errors(), train.batches(4)
    patterns = [f"{name}.weight" for name in names]
    curvature = influence.fit(
        task, params, batches, layers=patterns, labels=influence.Empirical()
    )
    moments = _moments(task, params, batches, curvature.layers)
    for x in curvature.layers:
        name = x.name.removesuffix(".weight")
        for kind, found in (
            ("activation", moments.inputs[x.reads][0]),
            ("gradient", moments.gradients[x.name][0]),
        ):
            total = arrays[f"cov/{kind}_covariance/{name}"]
            count = arrays[f"cov/num_{kind}_covariance_processed/{name}"]
            errors.note(f"golden {kind} covariance", found, total / count)
        lam = arrays[f"lambda/{name}"] / arrays[f"lambda_num/{name}"]
        errors.note("golden eigenvalues", curvature.blocks[x.name].lam_OxI, lam)
    asked = likelihoods(task, queries)
    for damping, inverse in DAMPINGS.items():
        query = influence.query(
            curvature, params, asked, solver=influence.Eigenbasis(inverse)
        )
        layers = influence.scan(task, params, query, batches).layers * len(train)
        key = f"ekfac/pair/{damping}"
        _note(errors, f"damping {damping}", layers, arrays, key, names)
        for name in names:
            expected = arrays.get(f"ekfac/tok/{damping}/{name}")
            if expected is not None:
                found = _tokens(task, params, curvature, asked, inverse, batches, name)
                errors.note(f"golden token scores, damping {damping}", found, expected)
        expected = arrays.get(f"ekfac/self/{damping}")
        if expected is not None:
            found = self_influence(task, params, curvature, batches, inverse=inverse)
            found = found.sum("layer") * len(train)
            errors.note(f"golden self scores, damping {damping}", found, expected)
    low = influence.query(curvature, params, asked, compress=Plain(3))
    layers = influence.scan(task, params, low, batches).layers * len(train)
    _note(errors, "rank 3", layers, arrays, "ekfac/pair_rank3/none", names)
    _others(errors, task, params, train, asked, arrays, names)
    return errors


def _note(
    errors: Errors,
    quantity: str,
    layers: xr.DataArray,
    arrays: Mapping[str, np.ndarray],
    key: str,
    names: Sequence[str],
) -> None:
    """Compares every layer's scores, where the file has them."""
    for name in names:
        expected = arrays.get(f"{key}/{name}")
        if expected is not None:
            found = layers.sel(layer=f"{name}.weight")
            errors.note(f"golden scores, {quantity}", found, expected)


def _others(
    errors: Errors,
    task: Counted,
    params: Params,
    train: influence.Examples,
    asked: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    names: Sequence[str],
) -> None:
    """Compares the scores of the simpler curvatures."""
    batches = train.batches(4)
    chosen: dict[str, Any] = {"layers": [f"{name}.weight" for name in names]}
    fisher: dict[str, Any] = {**chosen, "labels": influence.Empirical()}
    positions = float(train.inputs["counts"].sum()) / len(train)
    fitted = {
        # kronfluence's K-FAC is in units of a position, ours of a sequence.
        "kfac": (kfac(task, params, batches, **fisher), positions),
        "diagonal": (diagonal(task, params, batches, **fisher), 1.0),
        "identity": (identity(task, params, batches, **chosen), 1.0),
    }
    for kind, (curvature, scale) in fitted.items():
        for damping in ("none", "1e-3"):
            inverse: Inverse = influence.Absolute(1e-3 * scale)
            if damping == "none":
                inverse = influence.Relative(0.1)
            if kind == "identity":
                inverse = influence.Absolute(0.0)
            solver = influence.Eigenbasis(inverse)
            query = influence.query(curvature, params, asked, solver=solver)
            layers = influence.scan(task, params, query, batches).layers
            layers = layers * len(train) * scale
            key = f"{kind}/pair/{damping}"
            _note(errors, f"{kind}, damping {damping}", layers, arrays, key, names)


def _tokens(
    task: Counted,
    params: Params,
    curvature: influence.Curvature,
    asked: Mapping[str, Any],
    inverse: Inverse,
    batches: Any,
    name: str,
) -> np.ndarray:
    """Returns one layer's scores of every token, times the number of sequences."""
    layers = tuple(x for x in curvature.layers if x.name == f"{name}.weight")
    blocks = {x.name: curvature.blocks[x.name] for x in layers}
    alone = influence.Curvature(layers, blocks, 0, 0, curvature.labels)
    query = influence.query(alone, params, asked, solver=influence.Eigenbasis(inverse))
    return influence.token_scores(task, params, query, batches, n_train=1).values


def _moments(
    task: Counted, params: Params, batches: Any, layers: tuple[Layer, ...]
) -> covariance.Covariances:
    fold = covariance.fold(task, params, layers, influence.Empirical())
    return plain(fold, batches)


def reference(folder: Path) -> Errors:
    """Returns the errors against the reference model's numbers, in float32."""
    task, errors = Counted(small), Errors()
    params = load_file(folder / "small" / "model.safetensors")
    params = {k: jnp.asarray(x) for k, x in params.items()}
    ids = [np.load(folder / "small" / f"{k}_ids.npy") for k in ("train", "query")]
    train, queries = (
        examples(x, np.ones(x.shape, bool), kind)
        for x, kind in zip(ids, ("train", "query"), strict=True)
    )
    theirs = {
        path.stem: load_file(path)
        for path in (folder / "ref_small").glob("*.safetensors")
    }
    driver, batches = Driver(Console(stderr=True)), train.batches(32)
    first = next(iter(batches))
    layers = select(trace(task.outputs, params, first.inputs), "blocks.*")
    labels = influence.Empirical()
    moments = driver.run(covariance.fold(task, params, layers, labels), batches)
    curvature = influence.fit(
        task, params, batches, layers="blocks.*", labels=labels, run=driver.run
    )
    for x in curvature.layers:
        name = x.name.removesuffix(".weight")
        for kind, found in (
            ("activation", moments.inputs[x.reads][0]),
            ("gradient", moments.gradients[x.name][0]),
        ):
            total = theirs[f"{kind}_covariance"][name]
            count = theirs[f"num_{kind}_covariance_processed"][name]
            errors.note(f"small {kind} covariance", found, total / count)
        count = theirs["num_lambda_processed"][name]
        lam = theirs["lambda_matrix"][name].astype(float) / count
        found = np.asarray(curvature.blocks[x.name].lam_OxI, float)
        errors.note("small eigenvalues, trace", found.sum(), lam.sum())
        errors.note(
            "small eigenvalues, sorted", np.sort(found.ravel()), np.sort(lam.ravel())
        )
    query = influence.query(curvature, params, likelihoods(task, queries))
    scores = influence.scan(task, params, query, batches, run=driver.run)
    raw = scores.layers * len(train)
    for kind in ("all", "mlp"):
        chosen = [x for x in raw["layer"].values if kind == "all" or ".mlp." in x]
        expected = np.load(folder / "ref_small" / f"scores_total_{kind}.npy")
        found = raw.sel(layer=chosen).sum("layer")
        errors.note(f"small total scores, {kind}", found, expected)
    return errors


def main() -> None:
    """Prints every quantity's relative error, the last line as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--golden", type=Path, help="the tiny model's numbers, npz")
    parser.add_argument("--reference", type=Path, help="the reference folder")
    given, console = parser.parse_args(), Console()
    if given.golden is None and given.reference is None:
        parser.error("give --golden, --reference, or both")
    errors = Errors()
    if given.golden is not None:
        errors |= golden(given.golden)
    if given.reference is not None:
        errors |= reference(given.reference)
    for quantity, value in errors.items():
        console.print(f"{value:.1e}  {quantity}", highlight=False)
    console.print(json.dumps(errors), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
