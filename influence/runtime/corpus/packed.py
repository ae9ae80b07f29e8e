"""A packed corpus: sequences of tokens in flat files, mapped into memory, never loaded.

    tokens.bin     every token of every sequence, one behind the other
    pieces.bin     a record for each stretch of one document within one sequence
    sequences.bin  the first piece of each sequence
    chunks.jsonl   up to where all of them were whole, how often, with checksums
    manifest.json  how they were made, from what

A sequence's name is `corpus:row:offset`: the row its first token is from, and how many
tokens of that row come before it.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from influence.model.examples import cut, keys
from influence.runtime.store import MANIFEST, Run, unsigned
from influence.types import Batch

PIECE = np.dtype(
    [
        ("first", "<i8"),  # place of its first token in tokens.bin
        ("row", "<i8"),
        ("at", "<i8"),
        ("file", "<i4"),
        ("crc", "<u4"),  # of what it says, to tell whether that changed
        ("offset", "<i8"),  # of its first token within the document
        ("start", "<i8"),
        ("stop", "<i8"),
    ]
)
"""A piece on the disk: where its tokens are, and which part of which text it is."""

FILES = ("tokens", "pieces", "sequences")
CHUNKS = "chunks.jsonl"


class Piece(NamedTuple):
    """A stretch of one document within one sequence.

    Attributes:
      row: the document's row in the corpus.
      offset: how many of the document's tokens come before it.
      tokens: how many it has.
      start: the first of its characters in the document's text; or of its token ids.
      stop: the one behind the last.
    """

    row: int
    offset: int
    tokens: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Packed:
    """The sequences of a packed corpus, all or some.

    Attributes:
      run: the folder it is in.
      name: what its sequences' names begin with.
      context: `T`, the longest sequence.
      length: how many tokens there are.
      tokens: all of them.
      pieces: a `PIECE` for each stretch of a document within a sequence.
      firsts: each sequence's first piece.
      places: which sequences these are.

    Example:
      >>> len(packed), packed.context, packed.ids[1]
      (9, 8, 'corpus:1:0')
      >>> packed.pieces_of("corpus:1:0")[1]
      Piece(row=2, offset=0, tokens=1, start=0, stop=1)
    """

    run: Run
    name: str
    context: int
    length: int
    tokens: np.ndarray
    pieces: np.ndarray
    firsts: np.ndarray
    places: Sequence[int] | np.ndarray

    def __len__(self) -> int:
        """Returns `N`."""
        return len(self.places)

    @property
    def ids(self) -> "Names":
        """Returns the sequences' names, each made when it is asked for."""
        return Names(self, range(len(self)))

    def take(self, places: Sequence[int] | np.ndarray) -> "Packed":
        """Returns the sequences at some places, in that order; nothing is copied.

        Example:
          >>> list(packed.take([2, 0]).ids)
          ['corpus:2:1', 'corpus:0:0']
        """
        found = np.fromiter((self.places[int(i)] for i in places), np.int64)
        return replace(self, places=found)

    def place_of(self, id_: str) -> int:
        """Returns where a sequence is among these, from its name.

        Raises:
          ValueError: if it is not.
        """
        place, places = self._among_all(id_), self.places
        if place is None or place not in places:
            raise ValueError(
                f"There is no sequence {id_!r} among these {len(self)} of "
                f"{self.name!r}. Names are like {self.ids[0]!r}."
            )
        if isinstance(places, range):
            return places.index(place)
        return int(np.flatnonzero(np.asarray(places) == place)[0])

    def tokens_at(self, place: int) -> np.ndarray:
        """Returns the token ids of one sequence, without padding."""
        first, stop = self._pieces_at(place)
        return self.tokens[self._start(first) : self._start(stop)]

    def pieces_of(self, id_: str) -> list[Piece]:
        """Returns which parts of which documents a sequence is made of, in order.

        Raises:
          ValueError: if there is no such sequence.
        """
        first, stop = self._pieces_at(self.place_of(id_))
        return [self.piece(i) for i in range(first, stop)]

    def piece(self, number: int) -> Piece:
        """Returns one of the corpus's pieces."""
        x = self.pieces[number]
        tokens = self._start(number + 1) - int(x["first"])
        row, offset, start, stop = (int(x[k]) for k in ("row", "offset", *SPAN))
        return Piece(row, offset, tokens, start, stop)

    def batches(self, size: int, *, segments: bool = False) -> "PackedBatches":
        """Returns the sequences in batches of `size`, the last one filled up.

        Args:
          size: `B`.
          segments: whether inputs say which document each token belongs to, so that
            attention does not cross documents and no document is asked to predict the
            next.

        Example:
          >>> first, *_ = packed.batches(3, segments=True)
          >>> print(first.inputs["segments"])
          [[1 1 1 1 1 1 1 1]
           [1 1 1 1 1 1 1 2]
           [1 1 1 1 1 1 1 2]]
        """
        if size < 1:
            raise ValueError(f"A batch needs at least one sequence, not {size}.")
        return PackedBatches(self, min(size, len(self)), segments)

    def numbers(self, place: int) -> range:
        """Returns which of the corpus's pieces a sequence is made of."""
        return range(*self._pieces_at(place))

    def _among_all(self, id_: str) -> int | None:
        """Returns where a sequence is among all of the corpus, from its name."""
        name, *numbers = id_.rsplit(":", 2)
        if name != self.name or len(numbers) < 2 or not "".join(numbers).isdecimal():
            return None
        key = (int(numbers[0] or -1), int(numbers[1] or -1))
        place = bisect_left(range(len(self.firsts)), key, key=self._origin)
        return (
            place if place < len(self.firsts) and self._origin(place) == key else None
        )

    def _pieces_at(self, place: int) -> tuple[int, int]:
        """Returns the first piece of a sequence, and that of the next."""
        whole = self.places[place]
        last = whole + 1 == len(self.firsts)
        stop = len(self.pieces) if last else self.firsts[whole + 1]
        return int(self.firsts[whole]), int(stop)

    def _start(self, piece: int) -> int:
        """Returns where a piece's tokens begin; behind the last, where all end."""
        last = piece == len(self.pieces)
        return self.length if last else int(self.pieces[piece]["first"])

    def _origin(self, whole: int) -> tuple[int, int]:
        """Returns row and offset of the first token of one of all sequences."""
        x = self.pieces[self.firsts[whole]]
        return int(x["row"]), int(x["offset"])


SPAN = ("start", "stop")


@dataclass(frozen=True, eq=False)
class Names(Sequence[str]):
    """The names of some sequences of a packed corpus; none is kept.

    Attributes:
      packed: the corpus.
      which: the places of the sequences.
    """

    packed: Packed
    which: range

    def __len__(self) -> int:
        """Returns how many there are."""
        return len(self.which)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> "Names": ...

    def __getitem__(self, place: int | slice) -> "str | Names":
        """Returns one name, or some."""
        if isinstance(place, slice):
            return Names(self.packed, self.which[place])
        packed = self.packed
        row, offset = packed._origin(int(packed.places[self.which[place]]))
        return f"{packed.name}:{row}:{offset}"

    def __eq__(self, other: object) -> bool:
        """Returns whether another sequence has the same names in the same order."""
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(
            x == y for x, y in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class PackedBatches:
    """Batches of a packed corpus, read from the disk one after the other."""

    packed: Packed
    size: int
    segments: bool

    @property
    def ids(self) -> Names:
        """Returns the sequences' names."""
        return self.packed.ids

    def __len__(self) -> int:
        """Returns the number of batches."""
        return -(-len(self.packed) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        """Walks the batches; rows that fill up the last repeat its first sequence."""
        return self.rows(range(self.size))

    def rows(self, which: Sequence[int], done: int = 0) -> Iterator[Batch]:
        """Walks the batches, reading of each only some rows.

        Args:
          which: the places of the rows within a batch; those beyond its end are filled
            up as those of the last batch are.
          done: how many batches are left out.
        """
        for places, real_B in cut(len(self.packed), self.size, which, done):
            names = [self.ids[int(place)] for place in places]
            yield Batch(self._inputs(places.tolist()), keys(names), real_B)

    def _inputs(self, places: Sequence[int]) -> dict[str, np.ndarray]:
        shape = (len(places), self.packed.context)
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for row, place in enumerate(places):
            ids = self.packed.tokens_at(place)
            tokens[row, : len(ids)] = ids
            reached = 0
            for number, piece in enumerate(self.packed.numbers(place), 1):
                count = self.packed.piece(piece).tokens
                segments[row, reached : reached + count] = number
                reached += count
        inputs = {"tokens": tokens, "counts": segments > 0}
        return {**inputs, "segments": segments} if self.segments else inputs


def read_packed(folder: str | Path) -> Packed:
    """Returns a corpus that was packed, to its end.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if packing was not finished, or a file is shorter than it was.

    Example:
      >>> from influence.runtime.corpus.packed import read_packed
      >>> len(read_packed(folder / "packed"))
      9
    """
    run = Run(Path(folder))
    if not run.path(MANIFEST).is_file():
        raise FileNotFoundError(f"There is no packed corpus in {folder}.")
    about = run.manifest
    if not about.get("done"):
        raise ValueError(
            f"The corpus in {folder} was not packed to its end. Pack it again: it goes "
            "on from where it was stopped."
        )
    tokens, pieces, firsts = (
        _mapped(run, name, kind, about[name])
        for name, kind in zip(FILES, kinds(about["dtype"]), strict=True)
    )
    return Packed(
        run=run,
        name=about["name"],
        context=about["plan"]["context"],
        length=about["tokens"],
        tokens=tokens,
        pieces=pieces,
        firsts=firsts,
        places=range(about["used"]),
    )


def check_packed(folder: str | Path) -> None:
    """Compares every chunk of a packed corpus with the checksum it had.

    Raises:
      ValueError: naming the file and the bytes that are damaged.

    Example:
      >>> from influence.runtime.corpus.packed import check_packed
      >>> check_packed(folder / "packed")
    """
    run = read_packed(folder).run
    last = check_chunks(run)
    if any(last[name] != run.manifest[name] for name in FILES):
        raise ValueError(
            f"{run.path(CHUNKS)} ends before the files do. Restore it, or delete the "
            "folder and pack again."
        )


def check_chunks(run: Run) -> dict[str, Any]:
    """Compares what is packed so far with its checksums; returns where it ends.

    Raises:
      ValueError: naming the file and the bytes that are damaged.
    """
    dtype, before = run.manifest["dtype"], dict[str, Any](dict.fromkeys(FILES, 0))
    lines = run.path(CHUNKS).read_bytes() if run.path(CHUNKS).exists() else b""
    for line in lines.split(b"\n")[:-1]:
        chunk = unsigned(line, run.path(CHUNKS))
        for name, kind in zip(FILES, kinds(dtype), strict=True):
            start, stop = before[name] * kind.itemsize, chunk[name] * kind.itemsize
            if digest(file_of(run, name), start, stop) != chunk["sha256"][name]:
                raise ValueError(
                    f"{file_of(run, name)} is damaged between byte {start} and "
                    f"{stop}: its checksum differs from that in {CHUNKS}. Restore "
                    "it, or delete the folder and pack again."
                )
        before = chunk
    return before


def file_of(run: Run, name: str) -> Path:
    """Returns one of the files of a packed corpus."""
    return run.path(f"{name}.bin")


def kinds(dtype: str | np.dtype) -> tuple[np.dtype, np.dtype, np.dtype]:
    """Returns what the files hold, in their order."""
    return np.dtype(dtype), PIECE, np.dtype("<i8")


def digest(path: Path, start: int, stop: int) -> str:
    """Returns a SHA-256 of some bytes of a file."""
    state = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(start)
        while start < stop and (block := stream.read(min(1 << 20, stop - start))):
            state.update(block)
            start += len(block)
    return state.hexdigest()


def _mapped(run: Run, name: str, kind: np.dtype, length: int) -> Any:
    path, needed = file_of(run, name), length * kind.itemsize
    if not path.is_file() or path.stat().st_size < needed:
        size = path.stat().st_size if path.is_file() else 0
        raise ValueError(
            f"{path} has {size} bytes of the {needed} that were packed. Restore it, or "
            "delete the folder and pack again."
        )
    return np.memmap(path, kind, "r", shape=(length,))
