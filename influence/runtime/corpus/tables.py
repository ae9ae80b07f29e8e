"""Rows of Parquet files and of datasets saved to disk; a row's place is its number."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 64
"""How many rows are read at a time."""


@dataclass(frozen=True)
class Parquet:
    """Rows in Parquet files. A row group's column is held in memory at a time."""

    unit: ClassVar[str] = "row"

    def walk(self, path: Path, column: str, at: int) -> Iterator[tuple[int, Any]]:
        """Yields each row's number and its value, from a row on.

        Raises:
          ValueError: if the file is no Parquet file or has no such column.
        """
        with _opened(path, column) as file:
            starts = _starts(file)
            group = bisect_right(starts, at) - 1
            for place in range(group, file.num_row_groups):
                for row, value in _group(file, place, column, starts[place]):
                    if row >= at:
                        yield row, value

    def read(self, path: Path, column: str, ats: Sequence[int]) -> Iterator[Any]:
        """Yields the values of some rows, in ascending order."""
        with _opened(path, column) as file:
            starts, group, rows = _starts(file), -1, {}
            for at in ats:
                if (place := bisect_right(starts, at) - 1) != group:
                    group, wanted = place, set(ats)
                    found = _group(file, place, column, starts[place])
                    rows = {row: value for row, value in found if row in wanted}
                yield rows[at]


def values(column: pa.Array) -> Iterator[Any]:
    """Yields a column's values; lists of numbers as arrays."""
    kind = column.type
    numbers = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    numbers = numbers and pa.types.is_integer(kind.value_type)
    for x in column:
        if numbers and x.is_valid:
            yield x.values.to_numpy(zero_copy_only=False)
        else:
            yield x.as_py()


def check_column(column: str, names: Sequence[str], where: str) -> None:
    """Raises if a table has no such column, naming those it has."""
    if column not in names:
        raise ValueError(
            f"{where} has no column {column!r}. There are "
            f"{', '.join(map(repr, names))}. Name one of them."
        )


def _opened(path: Path, column: str) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no whole Parquet file ({error}).") from error
    check_column(column, file.schema_arrow.names, str(path))
    return file


def _starts(file: pq.ParquetFile) -> list[int]:
    """Returns the first row of each row group, and the number of rows."""
    groups = range(file.num_row_groups)
    return list(
        accumulate((file.metadata.row_group(i).num_rows for i in groups), initial=0)
    )


def _group(
    file: pq.ParquetFile, group: int, column: str, row: int
) -> Iterator[tuple[int, Any]]:
    """Yields the rows of one row group, of which `row` is the first."""
    for batch in file.iter_batches(ROWS, row_groups=[group], columns=[column]):
        for value in values(batch.column(0)):
            yield row, value
            row += 1
