"""Corpora that are files here: one of them, or all of a folder, in a fixed order."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Protocol

from influence.runtime.corpus.document import Place


class Format(Protocol):
    """How rows are read from one kind of file."""

    unit: ClassVar[str]
    """What a place in a file is a number of."""

    def walk(self, path: Path, column: str, at: int) -> Iterator[tuple[int, Any]]:
        """Yields each row's place in the file and its value, from a place on."""
        ...

    def read(self, path: Path, column: str, ats: Sequence[int]) -> Iterator[Any]:
        """Yields the values at some places, in ascending order."""
        ...


@dataclass(frozen=True)
class Files:
    """The rows of a file, or of a folder's files one after the other.

    Attributes:
      name: what the ids of its sequences begin with.
      column: the column that is read.
      root: the file or folder.
      pattern: what a file's path within the folder is to look like.
      format: how they are read.
      longest: the longest document, in characters.
    """

    name: str
    column: str
    root: Path
    pattern: str
    format: Format
    longest: int
    here: ClassVar[bool] = True

    def walk(self, start: Place) -> Iterator[tuple[Place, Any]]:
        """Yields each row's place and value, from a place on."""
        row = start.row
        for number, path in enumerate(self.files()):
            if number >= start.file:
                at = start.at if number == start.file else 0
                for place, value in self.format.walk(path, self.column, at):
                    yield Place(row, number, place), value
                    row += 1

    def read(self, places: Sequence[Place]) -> Iterator[Any]:
        """Yields the values at places that ascend; each file is opened once.

        Raises:
          FileNotFoundError: if there are fewer files than there were.
        """
        files, reached = self.files(), -1
        for number, group in groupby(places, key=lambda x: x.file):
            path = None
            while reached < number:
                path, reached = next(files, None), reached + 1
            if path is None:
                raise FileNotFoundError(
                    f"{self.root} no longer has a file number {number}. It changed "
                    "since its rows were read; restore it, or read it anew."
                )
            yield from self.format.read(path, self.column, [x.at for x in group])

    def fingerprint(self) -> str:
        """Returns a SHA-256 of the files' bytes, and in a folder of their names."""
        state = hashlib.sha256()
        for path in self.files():
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            state.update(f"{self._within(path)}\0{digest}\n".encode())
        return state.hexdigest()

    def where(self, place: Place) -> str:
        """Returns how to tell a person where a row is."""
        path = next(x for i, x in enumerate(self.files()) if i == place.file)
        return (
            f"row {place.row} of {self.name!r} ({path}, {self.format.unit} {place.at})"
        )

    def files(self) -> Iterator[Path]:
        """Walks the files; a folder's in the order of their paths' parts."""
        if self.root.is_dir():
            return matching(self.root, self.pattern)
        return iter([self.root])

    def _within(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if path != self.root else ""


def matching(root: Path, pattern: str) -> Iterator[Path]:
    """Walks a folder's files whose path within it matches, hidden ones left out.

    One folder's names are held at a time, not all paths.
    """

    def below(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                yield from below(path)
            elif fnmatchcase(path.relative_to(root).as_posix(), pattern):
                yield path

    return below(root)


@dataclass(frozen=True)
class Texts:
    """Files that are one document each.

    Attributes:
      longest: the longest document, in characters.
    """

    longest: int
    unit: ClassVar[str] = "byte"

    def walk(self, path: Path, column: str, at: int) -> Iterator[tuple[int, Any]]:
        """Yields the file's text, if it is not passed over already.

        Raises:
          ValueError: if it is not UTF-8, naming the byte, or too long.
        """
        del column
        if at == 0:
            yield 0, self._text(path)

    def read(self, path: Path, column: str, ats: Sequence[int]) -> Iterator[Any]:
        """Yields the file's text, as often as it is asked for."""
        del column
        for _ in ats:
            yield self._text(path)

    def _text(self, path: Path) -> str:
        # A character has four bytes at most: what is longer need not be read to know.
        if (size := path.stat().st_size) > 4 * self.longest:
            raise ValueError(
                f"{path} has {size:,} bytes, more than a document's {self.longest:,} "
                "characters can have. Cut it, or pass a larger `longest`."
            )
        try:
            return path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: byte {error.start} ({error.object[error.start]:#04x}) is not "
                f"UTF-8 ({error.reason}). Convert the file to UTF-8, or leave it out "
                "by a `pattern`."
            ) from error
