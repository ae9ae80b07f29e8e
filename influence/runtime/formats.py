"""How results are put into files: text, JSON, zarr, safetensors. Nothing is pickled."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import xarray as xr
from safetensors import safe_open
from safetensors.numpy import save_file

from influence.attribution.forms import Dense, Factored, Projected
from influence.attribution.query import Query
from influence.curvature.operator import Curvature
from influence.linalg.basis import Basis
from influence.linalg.kronecker import Kronecker
from influence.runtime.store import Writer
from influence.types import Layer


def write_text(text: str) -> Writer:
    """Returns what writes a text.

    Example:
      >>> from influence.runtime import formats
      >>> _ = formats.write_text("Why?")(folder / "why.txt")
      >>> (folder / "why.txt").read_text()
      'Why?'
    """
    return lambda path: path.write_text(text, encoding="utf-8")


def write_json(value: Any) -> Writer:
    """Returns what writes a value as JSON.

    Example:
      >>> from influence.runtime import formats
      >>> _ = formats.write_json({"why": 3})(folder / "why.json")
      >>> print((folder / "why.json").read_text().strip())
      {
        "why": 3
      }
    """
    return write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Returns a value from JSON.

    Example:
      >>> from influence.runtime import formats
      >>> _ = formats.write_json({"why": 3})(folder / "read.json")
      >>> formats.read_json(folder / "read.json")
      {'why': 3}
    """
    return json.loads(path.read_text(encoding="utf-8"))


def write_corpus(rows: Iterable[Mapping[str, Any]]) -> Writer:
    """Returns what writes a corpus as JSON lines, one sequence a line.

    Example:
      >>> from influence.runtime import formats
      >>> rows = ({"id": name, "tokens": texts[name]} for name in ids)
      >>> _ = formats.write_corpus(rows)(folder / "rows.jsonl")
      >>> (folder / "rows.jsonl").read_text().splitlines()[0]
      '{"id": "up", "tokens": [1, 2, 3, 4, 5, 6, 7]}'
    """
    return write_text("".join(json.dumps(x, allow_nan=False) + "\n" for x in rows))


def write_scores(dataset: xr.Dataset) -> Writer:
    """Returns what writes labelled arrays as a zarr folder, names as plain UTF-8.

    Example:
      >>> from influence.runtime import formats
      >>> by_layer = scores.layers.to_dataset(name="score")
      >>> formats.write_scores(by_layer)(folder / "written.zarr")
    """
    names = {
        k: x.astype(object) for k, x in dataset.coords.items() if x.dtype.kind == "U"
    }

    def write(path: Path) -> None:
        with warnings.catch_warnings():
            # xarray reads consolidated metadata by default, and zarr has always written
            # it this way; it warns because the format's text does not mention it yet.
            warnings.filterwarnings("ignore", message="Consolidated metadata")
            dataset.assign_coords(names).to_zarr(path)

    return write


def read_scores(path: Path) -> xr.Dataset:
    """Returns labelled arrays from a zarr folder.

    Example:
      >>> from influence.runtime import formats
      >>> by_layer = scores.layers.to_dataset(name="score")
      >>> formats.write_scores(by_layer)(folder / "scores.zarr")
      >>> formats.read_scores(folder / "scores.zarr")["score"].dims
      ('query', 'train', 'layer')
    """
    return xr.open_zarr(path).load()


def write_curvature(curvature: Curvature) -> Writer:
    """Returns what writes a curvature as safetensors; shared eigenvectors once.

    Example:
      >>> from influence.runtime import formats
      >>> formats.write_curvature(curvature)(folder / "curvature.safetensors")
    """
    arrays = {}
    for x in curvature.layers:
        block = curvature.blocks[x.name]
        for i, q in enumerate(block.inputs.blocks):
            arrays[f"q_in/{i}/{x.reads}"] = np.asarray(q)
        for i, q in enumerate(block.outputs.blocks):
            arrays[f"q_out/{i}/{x.name}"] = np.asarray(q)
        arrays[f"lam/{x.name}"] = np.asarray(block.lam_OxI)
    about = {
        "layers": [x._asdict() for x in curvature.layers],
        "positions": curvature.positions,
        "sequences": curvature.sequences,
        "labels": curvature.labels,
        "method": curvature.method,
    }
    return lambda path: save_file(arrays, path, metadata=_metadata(about))


def read_curvature(path: Path) -> Curvature:
    """Returns a curvature from safetensors.

    Example:
      >>> from influence.runtime import formats
      >>> path = folder / "fitted.safetensors"
      >>> formats.write_curvature(curvature)(path)
      >>> formats.read_curvature(path).about
      'EK-FAC, labels Sampled(seed=0, draws=1)'
    """
    return open_curvature([path]).loaded()


def open_curvature(paths: Sequence[Path]) -> Curvature:
    """Returns a curvature whose layers are read whenever they are needed, and not kept.

    Args:
      paths: safetensors, each with some of the layers.

    Example:
      >>> from influence.runtime import formats
      >>> path = folder / "opened.safetensors"
      >>> formats.write_curvature(curvature)(path)
      >>> opened = formats.open_curvature([path])
      >>> influence.query(opened, params, measurements).names
      ('3 after 1, 2',)
    """
    about = [_about(path) for path in paths]
    first, parts = about[0], [_layers(x["layers"]) for x in about]
    files = {
        x.name: (path, x) for path, part in zip(paths, parts, strict=True) for x in part
    }
    return Curvature(
        layers=tuple(x for part in parts for x in part),
        blocks=Blocks(files),
        positions=first["positions"],
        sequences=first["sequences"],
        labels=first["labels"],
        method=first["method"],
    )


@dataclass(frozen=True)
class Blocks(Mapping[str, Kronecker]):
    """Layers' operators, each read from its file when it is asked for.

    Attributes:
      files: by layer, where it is.
    """

    files: Mapping[str, tuple[Path, Layer]]

    def __getitem__(self, name: str) -> Kronecker:
        """Returns one layer's operator."""
        path, layer = self.files[name]
        with safe_open(path, framework="np") as file:
            names = set(file.keys())
            return Kronecker(
                _basis(file, names, "q_in", layer.reads),
                _basis(file, names, "q_out", name),
                jnp.asarray(file.get_tensor(f"lam/{name}")),
            )

    def __iter__(self) -> Iterator[str]:
        """Walks the layers' names."""
        return iter(self.files)

    def __len__(self) -> int:
        """Returns how many layers there are."""
        return len(self.files)


ABOUT = "about"
"""The one key of a file's metadata: of several the order would be another each time."""


def _metadata(about: Mapping[str, Any]) -> dict[str, str]:
    return {ABOUT: json.dumps(about, allow_nan=False)}


def _about(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="np") as file:
        return json.loads(file.metadata()[ABOUT])


def _basis(file: Any, names: set[str], side: str, layer: str) -> Basis:
    found = takewhile(names.__contains__, (f"{side}/{i}/{layer}" for i in count()))
    return Basis(tuple(jnp.asarray(file.get_tensor(x)) for x in found))


def _layers(said: Sequence[Mapping[str, Any]]) -> tuple[Layer, ...]:
    return tuple(map(_layer, said))


FORMS = {x.__name__: x for x in (Dense, Factored, Projected)}
"""The forms a query is kept in, by name."""


def write_query(query: Query) -> Writer:
    """Returns what writes inverse-Hessian-vector products as safetensors.

    Example:
      >>> from influence.runtime import formats
      >>> formats.write_query(query)(folder / "query.safetensors")
    """
    arrays = {
        f"{field}/{name}": np.asarray(x)
        for name, form in query.forms.items()
        for field, x in form._asdict().items()
    }
    about = {
        "layers": [x._asdict() for x in query.layers],
        "forms": {k: type(x).__name__ for k, x in query.forms.items()},
        "names": query.names,
        "facts": dict(query.facts),
        "about": dict(query.about),
    }
    return lambda path: save_file(arrays, path, metadata=_metadata(about))


def read_query(path: Path) -> Query:
    """Returns queries from safetensors.

    Example:
      >>> from influence.runtime import formats
      >>> path = folder / "asked.safetensors"
      >>> formats.write_query(query)(path)
      >>> formats.read_query(path).names
      ('3 after 1, 2',)
    """
    about = _about(path)
    with safe_open(path, framework="np") as file:
        forms = {
            name: FORMS[kind](
                *(
                    jnp.asarray(file.get_tensor(f"{field}/{name}"))
                    for field in FORMS[kind]._fields
                )
            )
            for name, kind in about["forms"].items()
        }
    return Query(
        layers=_layers(about["layers"]),
        names=tuple(about["names"]),
        forms=forms,
        facts=tuple((k, tuple(x)) for k, x in about["facts"].items()),
        about=tuple(about["about"].items()),
    )


def _layer(fields: Mapping[str, Any]) -> Layer:
    views = {
        key: tuple((kind, tuple(argument)) for kind, argument in fields[key])
        for key in ("weight_view", "bias_view")
    }
    tuples = {key: tuple(fields[key]) for key in ("stack", "diagonal")}
    return Layer(**{**fields, **views, **tuples})
