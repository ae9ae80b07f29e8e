"""Datasets of the `datasets` library: saved to disk, or streamed from the hub.

A module of its own, because that library takes a second to import. Nothing of a dataset
is run: of the library's releases that are allowed none runs a dataset's code.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, IterableDataset, load_dataset_builder, load_from_disk

from influence.runtime.corpus.document import Place
from influence.runtime.corpus.files import Files, Texts
from influence.runtime.corpus.tables import ROWS, check_column, values


@dataclass(frozen=True)
class Saved:
    """The rows of a dataset that was saved to disk.

    Attributes:
      name: what the ids of its sequences begin with.
      column: the column that is read.
      root: the folder of its one split.
      rows: the dataset, mapped into memory, as Arrow tables.
      longest: the longest document, in characters.
    """

    name: str
    column: str
    root: Path
    rows: Dataset
    longest: int
    here: ClassVar[bool] = True

    def walk(self, start: Place) -> Iterator[tuple[Place, Any]]:
        """Yields each row's place and value, from a place on."""
        for first in range(start.at, len(self.rows), ROWS):
            stop = min(first + ROWS, len(self.rows))
            for at, value in enumerate(self._values(first, stop), first):
                yield Place(at, 0, at), value

    def read(self, places: Sequence[Place]) -> Iterator[Any]:
        """Yields the values at some places."""
        for place in places:
            yield from self._values(place.at, place.at + 1)

    def fingerprint(self) -> str:
        """Returns a SHA-256 of the folder's files.

        Not the library's own fingerprint: that names what was done to the data, and
        stays as it is if a file changes.
        """
        return Files("", "", self.root, "*", Texts(0), 0).fingerprint()

    def where(self, place: Place) -> str:
        """Returns how to tell a person where a row is."""
        return f"row {place.row} of {self.name!r} ({self.root})"

    def _values(self, first: int, stop: int) -> Iterator[Any]:
        table: Any = self.rows[first:stop]
        for chunk in table.column(self.column).chunks:
            yield from values(chunk)


@dataclass(frozen=True)
class Streamed:
    """The rows of a dataset on the hub, as they arrive.

    Attributes:
      name: what the ids of its sequences begin with.
      column: the column that is read.
      revision: the commit that is read, whatever is committed later.
      part: which configuration and split of it.
      rows: the stream.
      longest: the longest document, in characters.
    """

    name: str
    column: str
    revision: str
    part: str
    rows: IterableDataset
    longest: int
    here: ClassVar[bool] = False

    def walk(self, start: Place) -> Iterator[tuple[Place, Any]]:
        """Yields each row's place and value, from a place on."""
        rows = self.rows.skip(start.row) if start.row else self.rows
        for row, values_ in enumerate(rows, start.row):
            if row == start.row:
                check_column(self.column, list(values_), f"The dataset {self.name!r}")
            yield Place(row, 0, row), values_[self.column]

    def read(self, places: Sequence[Place]) -> Iterator[Any]:
        """Yields the values at some places; each takes a walk to it."""
        for place in places:
            _, value = next(self.walk(place))
            yield value

    def fingerprint(self) -> str:
        """Returns the commit, which can't change, and what is read of it."""
        return f"{self.revision} {self.part}"

    def where(self, place: Place) -> str:
        """Returns how to tell a person where a row is."""
        return f"row {place.row} of {self.name!r} (at {self.revision})"


def open_saved(
    root: Path, name: str, column: str, split: str | None, longest: int
) -> Saved:
    """Returns a dataset that was saved to disk.

    Raises:
      ValueError: if it has several splits and none was named, or no such split or
        column; naming those it has.
    """
    found = load_from_disk(str(root))
    if not isinstance(found, Dataset):
        names = [str(x) for x in found]
        split = names[0] if split is None and len(names) == 1 else split
        if split not in names:
            raise ValueError(
                f"{root} has no split {split!r} but {', '.join(map(repr, names))}. "
                "Name one of them."
            )
        found, root = found[split], root / split
    check_column(column, found.column_names, str(root))
    return Saved(name, column, root, found.with_format("arrow"), longest)


def open_streamed(
    name: str, column: str, config: str | None, split: str | None, longest: int
) -> Streamed:
    """Returns a dataset on the hub, `owner/name` or `owner/name@revision`.

    Raises:
      FileNotFoundError: if there is none, or the hub can't be reached.
    """
    path, _, revision = name.partition("@")
    split = split or "train"
    try:
        builder = load_dataset_builder(path, config, revision=revision or None)
        rows = builder.as_streaming_dataset(split=split)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name!r} is no file or folder here, and as a dataset it can't be opened: "
            f"{error}"
        ) from error
    assert isinstance(rows, IterableDataset)  # One split was asked for.
    part = f"{builder.config.name} {split}"
    return Streamed(path, column, str(builder.hash), part, rows, longest)
