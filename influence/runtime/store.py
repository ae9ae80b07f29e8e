"""The run folder: what was computed, from what, and whether it is whole.

Everything is written to a temporary name and renamed, so a name that exists is a file
that was finished. The manifest is written last and again after every artifact; it holds
each one's checksum. What is not in the manifest was not finished, and what no longer
has its checksum is damaged: neither is trusted.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import xarray as xr
from safetensors import safe_open
from safetensors.numpy import save_file

from influence.curvature.ekfac import Curvature
from influence.linalg.kronecker import Kronecker
from influence.types import Layer

MANIFEST = "manifest.json"

Writer = Callable[[Path], Any]
"""Writes an artifact to a path that does not exist yet."""


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
      folder: where it is.
    """

    folder: Path

    @classmethod
    def create(cls, folder: Path, about: Mapping[str, Any]) -> "Run":
        """Begins a run, forgetting what an earlier one in the same folder had finished.

        Raises:
          FileExistsError: if the folder holds something that is not a run.
        """
        run = cls(folder)
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file. Name a folder for the run.")
        if (
            folder.is_dir()
            and any(folder.iterdir())
            and not run.path(MANIFEST).exists()
        ):
            raise FileExistsError(
                f"{folder} is not empty and holds no run. Name a new folder, or empty "
                "this one."
            )
        folder.mkdir(parents=True, exist_ok=True)
        run._write_manifest({**about, "artifacts": {}})
        return run

    def path(self, name: str) -> Path:
        """Returns where an artifact is."""
        return self.folder / name

    @property
    def manifest(self) -> dict[str, Any]:
        """Returns what the run says of itself."""
        return json.loads(self.path(MANIFEST).read_text(encoding="utf-8"))

    def note(self, **about: Any) -> None:
        """Adds to what the run says of itself."""
        self._write_manifest({**self.manifest, **about})

    def write(self, name: str, writer: Writer) -> Path:
        """Writes an artifact, whole or not at all, and notes its checksum.

        Args:
          name: of the file or folder in the run.
          writer: writes it to a path that does not exist yet.

        Raises:
          OSError: if it could not be written, naming it; nothing is left of it.
        """
        with _atomic(self.path(name)) as temporary:
            writer(temporary)
        manifest = self.manifest
        manifest["artifacts"][name] = {"sha256": checksum(self.path(name))}
        self._write_manifest(manifest)
        return self.path(name)

    def read(self, name: str, reader: Callable[[Path], Any]) -> Any:
        """Reads an artifact, after comparing its checksum.

        Raises:
          FileNotFoundError: if the run never finished it.
          ValueError: if it was changed since.
        """
        entry = self.manifest["artifacts"].get(name)
        if entry is None or not self.path(name).exists():
            raise FileNotFoundError(
                f"The run in {self.folder} has no finished {name!r}. Run it again."
            )
        if checksum(self.path(name)) != entry["sha256"]:
            raise ValueError(
                f"{self.path(name)} is not what the run wrote: its checksum differs "
                "from the manifest's. Restore it, or delete it and run again."
            )
        return reader(self.path(name))

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        with _atomic(self.path(MANIFEST)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def checksum(path: Path) -> str:
    """Returns a SHA-256 of a file, or of a folder's file names and contents."""
    state = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            state.update(f"{file.relative_to(path).as_posix()}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    state.update(block)
    return state.hexdigest()


def write_text(text: str) -> Writer:
    """Returns what writes a text."""
    return lambda path: path.write_text(text, encoding="utf-8")


def write_json(value: Any) -> Writer:
    """Returns what writes a value as JSON."""
    return write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_scores(dataset: xr.Dataset) -> Writer:
    """Returns what writes labelled arrays as a zarr folder, names as plain UTF-8."""
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
    """Returns labelled arrays from a zarr folder."""
    return xr.open_zarr(path).load()


def write_curvature(curvature: Curvature) -> Writer:
    """Returns what writes a curvature as safetensors; shared eigenvectors once."""
    arrays = {}
    for x in curvature.layers:
        block = curvature.blocks[x.name]
        arrays[f"q_in/{x.reads}"] = np.asarray(block.q_in_IxI)
        arrays[f"q_out/{x.name}"] = np.asarray(block.q_out_OxO)
        arrays[f"lam/{x.name}"] = np.asarray(block.lam_OxI)
    about = {
        "layers": json.dumps([x._asdict() for x in curvature.layers]),
        "positions": str(curvature.positions),
        "sequences": str(curvature.sequences),
        "labels": curvature.labels,
    }
    return lambda path: save_file(arrays, path, metadata=about)


def read_curvature(path: Path) -> Curvature:
    """Returns a curvature from safetensors."""
    with safe_open(path, framework="np") as file:
        about = file.metadata()
        names = file.keys()  # a method of the file; it is no mapping
        arrays = {name: jnp.asarray(file.get_tensor(name)) for name in names}
    layers = tuple(_layer(x) for x in json.loads(about["layers"]))
    blocks = {
        x.name: Kronecker(
            arrays[f"q_in/{x.reads}"],
            arrays[f"q_out/{x.name}"],
            arrays[f"lam/{x.name}"],
        )
        for x in layers
    }
    return Curvature(
        layers,
        blocks,
        int(about["positions"]),
        int(about["sequences"]),
        about["labels"],
    )


def _layer(fields: Mapping[str, Any]) -> Layer:
    views = {
        key: tuple((kind, tuple(argument)) for kind, argument in fields[key])
        for key in ("weight_view", "bias_view")
    }
    tuples = {key: tuple(fields[key]) for key in ("stack", "diagonal")}
    return Layer(**{**fields, **views, **tuples})


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path that takes the place of `path` if all goes well.

    Raises:
      OSError: if writing failed, naming `path`; the temporary path is gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _flush(temporary)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                error.errno,
                f"{path} could not be written ({error.strerror or error}). Nothing was "
                "left of it; what the run had finished before is as it was. Free some "
                "space, or name another folder, and run again",
            ) from error
        raise


def _flush(path: Path) -> None:
    """Waits until what was written is on the disk."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
