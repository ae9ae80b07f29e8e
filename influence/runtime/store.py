"""The run folder: what was computed, from what, and whether it is whole.

Everything is written to a temporary name and renamed, so a name that exists is a file
that was finished. The manifest is written last and again after every artifact; it holds
each one's checksum, and its own. What is not in the manifest was not finished, and what
no longer has its checksum is damaged: neither is trusted.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"

TORN = ".*.tmp"
"""What files are called that are not finished."""

Writer = Callable[[Path], Any]
"""Writes an artifact to a path that does not exist yet."""


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
      folder: where it is.

    Example:
      >>> from influence.runtime import formats, store
      >>> run = store.Run.create(folder / "run", {"asked": "why 3?"})
      >>> _ = run.write("fit.safetensors", formats.write_curvature(curvature))
      >>> run.read("fit.safetensors", formats.read_curvature).sequences
      10
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
            and any(not x.name.startswith(".") for x in folder.iterdir())
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
        """Returns what the run says of itself.

        Raises:
          ValueError: if the manifest was changed since it was written.
        """
        path = self.path(MANIFEST)
        return unsigned(path.read_bytes(), path)

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
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        with atomic(self.path(name)) as temporary:
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

    def remove(self, name: str) -> None:
        """Removes an artifact that is none of the run's any more."""
        manifest = self.manifest
        manifest["artifacts"].pop(name, None)
        self._write_manifest(manifest)
        self.path(name).unlink(missing_ok=True)

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        text = json.dumps(signed(manifest), indent=2, ensure_ascii=False)
        with atomic(self.path(MANIFEST)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


SIGNED = "sha256 of the rest"
"""The key of a record's own checksum."""


def signed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record with its own checksum, as it is written."""
    return {**record, SIGNED: _sum(record)}


def unsigned(text: str | bytes, path: Path) -> dict[str, Any]:
    """Returns a record from its JSON, without its checksum.

    Args:
      text: the JSON.
      path: where it was read.

    Raises:
      ValueError: if it was changed since it was signed.
    """
    try:
        record = json.loads(text)
        said = record.pop(SIGNED)
    except (ValueError, KeyError, AttributeError):
        record, said = {}, None
    if said != _sum(record):
        raise ValueError(
            f"{path} is not what was written: a record in it does not have its own "
            "checksum. Restore it, or delete what it is of and run again."
        )
    return record


def _sum(record: Mapping[str, Any]) -> str:
    """Returns a SHA-256 of what JSON makes of a record."""
    text = json.dumps(json.loads(json.dumps(record)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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


def check_file(path: Path) -> None:
    """Raises if a file can't be put at a path that a user named.

    `atomic` would put it in a folder's place, and fail only when all work is done.

    Raises:
      ValueError: if it is a folder.
      FileNotFoundError: if the folder it would be in is not there.
    """
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, and a file is to be written. Give a file's name, "
            f"{path / 'NAME'}."
        )
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"There is no folder {path.absolute().parent} to write {path.name} in. "
            "Make it, or give another path."
        )


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path that takes the place of `path` if all goes well.

    Raises:
      OSError: if writing failed, naming `path`; the temporary path is gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TORN[2:]}")
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
