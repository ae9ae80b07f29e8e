"""Where a corpus comes from: files, folders, saved datasets, the hub.

Every source is a stream of rows that can be walked again, from any place on, without
ever being in memory whole. What a row's column holds is a document: text, a
conversation, or token ids.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from influence.runtime.corpus.document import (
    BEGINNING,
    KINDS,
    Content,
    Document,
    Place,
    content,
)
from influence.runtime.corpus.files import Files, Format, Texts, matching
from influence.runtime.corpus.lines import Lines, gunzipped, plain, unzstandard
from influence.runtime.corpus.tables import Parquet

LONGEST = 4_000_000
"""The longest text of one document, in characters: a million tokens or so.

A text is turned into tokens in one go, for whether a part's tokens are the whole's
depends on the tokenizer; that takes up to 150 bytes of memory a character.
"""

ESCAPED = 16
"""How many bytes a character may have as JSON, generously."""

LINES = {".jsonl", ".ndjson", ".json"}
EXPANDED = {"": plain, ".gz": gunzipped, ".zst": unzstandard}
TEXTS = {".txt", ".md"}
ENDINGS = {*LINES, *TEXTS, ".gz", ".zst", ".parquet"}

HUB = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
"""What the name of a dataset on the hub looks like."""


class Source(Protocol):
    """A stream of rows."""

    here: ClassVar[bool]
    """Whether its rows are on this machine, so that walking it again costs little."""

    @property
    def name(self) -> str:
        """Returns what the ids of its sequences begin with."""
        ...

    @property
    def column(self) -> str:
        """Returns the column that is read."""
        ...

    @property
    def longest(self) -> int:
        """Returns the longest document, in characters."""
        ...

    def walk(self, start: Place) -> Iterator[tuple[Place, Any]]:
        """Yields each row's place and the column's value, from a place on."""
        ...

    def read(self, places: Sequence[Place]) -> Iterator[Any]:
        """Yields the column's value at some places, which ascend."""
        ...

    def fingerprint(self) -> str:
        """Returns what changes whenever the data does; costs a pass over its bytes."""
        ...

    def where(self, place: Place) -> str:
        """Returns how to tell a person where a row is."""
        ...


def open_source(
    place: str | Path,
    *,
    column: str = "text",
    split: str | None = None,
    config: str | None = None,
    pattern: str = "*",
    name: str | None = None,
    longest: int = LONGEST,
) -> Source:
    r"""Returns a corpus as a stream.

    By what there is at `place`: a file of JSON lines (`.jsonl`, `.ndjson`, `.json`, and
    with `.gz` or `.zst`), of Parquet, or of text (`.txt`, `.md`); a folder of one kind
    of them, or of text files with whatever endings; a folder written by the `datasets`
    library's `save_to_disk`; otherwise a dataset on the hub, as a stream.

    Args:
      place: a path, or `owner/name` on the hub, with `@revision` if not the latest.
      column: the column with the documents; not for text files.
      split: of a dataset; on the hub `train` if not named.
      config: of a dataset on the hub.
      pattern: of a folder, what the path within it has to look like, `*.py`; `*` stands
        for slashes as well.
      name: what ids begin with, if not the file's or folder's own name.
      longest: the longest document, in characters.

    Raises:
      FileNotFoundError: if there is nothing.
      ValueError: if the kind of file is not known, or a dataset has no such split.

    Example:
      >>> from influence.runtime.corpus.source import documents, open_source
      >>> _ = (folder / "songs.jsonl").write_text('{"text": "la"}\n{"text": "lo"}\n')
      >>> songs = open_source(folder / "songs.jsonl")
      >>> [(x.place.row, x.content) for x in documents(songs)]
      [(0, 'la'), (1, 'lo')]
    """
    path = Path(place)
    if not path.exists():
        return _streamed(str(place), column, config, split, longest)
    if path.is_dir() and _saved(path):
        from influence.runtime.corpus.hub import open_saved  # takes a second

        return open_saved(path, name or path.resolve().name, column, split, longest)
    kind = _format_of_folder if path.is_dir() else _format_of_file
    stem = path.resolve().name if path.is_dir() else path.name.split(".")[0]
    format_ = kind(path, pattern, longest)
    return Files(name or stem, column, path, pattern, format_, longest)


def documents(
    source: Source, start: Place = BEGINNING, *, skip_empty: bool = False
) -> Iterator[Document]:
    """Yields a source's documents, from a place on.

    Raises:
      ValueError: naming the row, if one has no text and is not skipped, is too long, or
        holds something else than text, messages or token ids.
    """
    for place, value in source.walk(start):
        found = _content(source, place, value)
        if found is not None:
            yield Document(place, found)
        elif not skip_empty:
            raise ValueError(
                f"{source.where(place)}: {source.column!r} is empty. Fill it, or skip "
                "such rows (`skip_empty`)."
            )


def reread(source: Source, places: Sequence[Place]) -> Iterator[Content]:
    """Yields the contents at some places, which ascend.

    Raises:
      ValueError: if there is none any more.
    """
    for place, value in zip(places, source.read(places), strict=True):
        found = _content(source, place, value)
        if found is None:
            raise ValueError(
                f"{source.where(place)} is empty now: the data changed since it was "
                "packed. Restore it, or pack it anew."
            )
        yield found


class Checked(NamedTuple):
    """What is known of a source that was walked once.

    Attributes:
      kind: what its documents are, one of `KINDS`.
      documents: how many it has.
      largest: the largest token id, if they are token ids.
    """

    kind: str
    documents: int
    largest: int


def check_source(
    source: Source,
    *,
    skip_empty: bool = False,
    rows: int | None = None,
    look: Callable[[Content], object] = lambda _: None,
) -> Checked:
    r"""Walks a source once, so that a bad row is found before the long pass, not in it.

    Args:
      source: what is walked.
      skip_empty: whether a row may be empty.
      rows: look at so many documents only.
      look: raises a `ValueError` for a document that is not good enough.

    Raises:
      ValueError: whatever `documents` and `look` raise; if rows are of different kinds,
        naming one; if there are none.

    Example:
      >>> from influence.runtime.corpus.source import check_source, open_source
      >>> _ = (folder / "one.jsonl").write_text('{"text": "la"}\n{"text": ""}\n')
      >>> check_source(open_source(folder / "one.jsonl"))
      Traceback (most recent call last):
      ValueError: row 1 of 'one' (...one.jsonl, byte 15): 'text' is empty. ...
      >>> check_source(open_source(folder / "one.jsonl"), skip_empty=True).documents
      1
    """
    kind, count, largest = "", 0, 0
    for place, found in islice(documents(source, skip_empty=skip_empty), rows):
        kind = kind or KINDS[type(found)]
        if KINDS[type(found)] != kind:
            raise ValueError(
                f"{source.where(place)} holds {KINDS[type(found)]}, rows before it "
                f"{kind}. Keep one kind of row in a column."
            )
        with located(source, place):
            look(found)
        if not isinstance(found, str | list):
            largest = max(largest, int(found.max()))
        count += 1
    if not count:
        raise ValueError(f"There are no documents in {source.name!r}.")
    return Checked(kind, count, largest)


@contextmanager
def located(source: Source, place: Place) -> Iterator[None]:
    """Lets an error about a document say which it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source.where(place)}: {source.column!r} {error}") from error


def _content(source: Source, place: Place, value: Any) -> Content | None:
    with located(source, place):
        found = content(value)
    if isinstance(found, str) and len(found) > source.longest:
        raise ValueError(
            f"{source.where(place)} has {len(found):,} characters; a document has at "
            f"most {source.longest:,}, because it is turned into tokens in one go. Cut "
            "it into several rows, or pass a larger `longest` (150 bytes of memory a "
            "character)."
        )
    return found


def _streamed(
    name: str, column: str, config: str | None, split: str | None, longest: int
) -> Source:
    if not HUB.fullmatch(name) or Path(name).suffix in ENDINGS:
        raise FileNotFoundError(
            f"There is no file or folder {name!r}, and it is no name of a dataset. "
            f"Looked in {Path.cwd()}."
        )
    from influence.runtime.corpus.hub import open_streamed  # takes a second

    return open_streamed(name, column, config, split, longest)


def _saved(folder: Path) -> bool:
    """Returns whether a folder was written by `save_to_disk`."""
    one = ("state.json", "dataset_info.json")
    several = (folder / "dataset_dict.json").is_file()
    return several or all((folder / name).is_file() for name in one)


def _known(path: Path, longest: int) -> Format | None:
    """Returns how a file is read, by its ending."""
    suffixes = path.suffixes[-2:]
    packing = suffixes[-1] if suffixes and suffixes[-1] in EXPANDED else ""
    inner = Path(path.name.removesuffix(packing)).suffix
    if inner in LINES:
        return Lines(EXPANDED[packing], ESCAPED * longest)
    if not packing and inner == ".parquet":
        return Parquet()
    return Texts(longest) if not packing and inner in TEXTS else None


def _format_of_file(path: Path, pattern: str, longest: int) -> Format:
    del pattern
    if found := _known(path, longest):
        return found
    raise ValueError(
        f"{path} is of no kind that can be read. There are .jsonl, .ndjson and .json "
        "(with .gz or .zst), .parquet, .txt and .md, and folders of files."
    )


def _format_of_folder(path: Path, pattern: str, longest: int) -> Format:
    """Returns how a folder's files are read: all of one kind, or all as text."""
    formats = {_known(x, longest) or Texts(longest) for x in matching(path, pattern)}
    if not formats:
        raise FileNotFoundError(f"There is no file like {pattern!r} in {path}.")
    if len(formats) > 1:
        raise ValueError(
            f"{path} has files of several kinds. Choose one by a `pattern`, such as "
            "*.jsonl."
        )
    return formats.pop()
