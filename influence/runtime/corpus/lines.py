"""JSON lines, one row a line, plain or compressed; a row's place is its first byte."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import zstandard

BLOCK = 1 << 20
"""How many bytes are read at a time where they are only passed over."""

FRAME = 1 << 13
"""How many compressed bytes are expanded at a time, so that no few become too many."""


@dataclass(frozen=True)
class Lines:
    """Rows in files of JSON lines.

    Attributes:
      open: opens a file for reading its bytes, expanded.
      longest: the longest line, in bytes.
    """

    open: Callable[[Path], io.BufferedIOBase]
    longest: int
    unit: ClassVar[str] = "byte"

    def walk(self, path: Path, column: str, at: int) -> Iterator[tuple[int, Any]]:
        """Yields each row's first byte and its value, from a byte on.

        Raises:
          ValueError: naming the line, if one is no JSON, no UTF-8, too long or without
            the column.
        """
        with _expanded(path, self.open) as stream:
            _skip(stream, at)
            first, number = at == 0, 0
            while line := stream.readline(self.longest + 1):
                number += 1
                where = f"{path}, line {number}" if first else f"{path}, byte {at}"
                if line.strip():
                    row = self._row(line, where, at)
                    if number == 1 and column not in row:
                        raise ValueError(
                            f"{where}: there is no column {column!r}. There are "
                            f"{', '.join(map(repr, row))}. Name one of them."
                        )
                    yield at, row.get(column)
                at += len(line)

    def read(self, path: Path, column: str, ats: Sequence[int]) -> Iterator[Any]:
        """Yields the values of the rows that begin at some bytes, in ascending order.

        Raises:
          ValueError: if there is no row.
        """
        with _expanded(path, self.open) as stream:
            reached = 0
            for at in ats:
                _skip(stream, at - reached)
                line = stream.readline(self.longest + 1)
                reached = at + len(line)
                yield self._row(line, f"{path}, byte {at}", at).get(column)

    def _row(self, line: bytes, where: str, at: int) -> dict[str, Any]:
        """Returns a line's row; `at` is its first byte."""
        if len(line) > self.longest:
            start = line[:1].decode("utf-8", "replace")
            array = " The file is one JSON array: write one object a line."
            raise ValueError(
                f"{where}: the line is longer than {self.longest:,} bytes."
                + (array if start == "[" else " Cut it, or pass a larger `longest`.")
            )
        try:
            row = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise ValueError(
                f"{where}: byte {at + error.start} ({byte:#04x}) is not UTF-8 "
                f"({error.reason}). Convert the file to UTF-8."
            ) from error
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}, column {error.colno}: this is not JSON ({error.msg}). Write "
                "one JSON object a line."
            ) from error
        except RecursionError as error:
            raise ValueError(f"{where}: the JSON is nested too deeply.") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{where}: this is no JSON object but {line[:40]!r}. Write one object "
                'a line, {"text": …}.'
            )
        return row


def plain(path: Path) -> io.BufferedIOBase:
    """Opens a file as it is."""
    return path.open("rb")


def gunzipped(path: Path) -> io.BufferedIOBase:
    """Opens a gzip file, expanded."""
    return gzip.open(path, "rb")


def unzstandard(path: Path) -> io.BufferedIOBase:
    """Opens a zstandard file, expanded."""
    return io.BufferedReader(_Zstandard(path), BLOCK)


class _Zstandard(io.RawIOBase):
    """The bytes of a zstandard file's frames.

    Not zstandard's own reader: that takes a file that was cut short for a whole one.
    """

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._frame: Any = None
        self._given, self._ready = b"", b""

    def readable(self) -> bool:
        """Returns True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer, as far as there is something."""
        while not self._ready:
            self._given = self._given or self._file.read(FRAME)
            if not self._given:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._expand()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _expand(self) -> None:
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready, self._given = self._frame.decompress(self._given), b""
        if self._frame.eof:
            self._given, self._frame = self._frame.unused_data, None

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        super().close()


@contextmanager
def _expanded(
    path: Path, open_: Callable[[Path], io.BufferedIOBase]
) -> Iterator[io.BufferedIOBase]:
    """Yields a file's bytes; an error in the compressed ones names it."""
    try:
        with open_(path) as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(
            f"{path} is damaged or was cut short ({error}). Get it again."
        ) from error


def _skip(stream: io.BufferedIOBase, count: int) -> None:
    if stream.seekable():
        stream.seek(count, io.SEEK_CUR)
        return
    while count and (block := stream.read(min(count, BLOCK))):
        count -= len(block)
