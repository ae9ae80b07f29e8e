"""Scores on their way to the disk: as they come, never all in memory.

    scores.zarr         score (query, train) and layer_score (query, train, layer), with
                        the names of everything; opens with xarray
    scores.log.jsonl    a line for each stretch of sequences that is whole on the disk,
                        with the checksum of its numbers
    scores.tail-N.npy   those before sequence N that do not fill a file yet

Numbers are trusted only where a line says that they are whole. A process that ends
loses what it had not yet said so of, and nothing else.
"""

import hashlib
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
import zarr

from influence.runtime.pace import Pace
from influence.runtime.run.log import committed, cut, say
from influence.runtime.store import atomic, checksum

CHUNK = 1 << 21
"""About how many bytes of scores lie together in one file."""

HELD = 32
"""How many files' scores are in memory at the most."""

SCORE, LAYERS = "score", "layer_score"


class Names(NamedTuple):
    """What the axes of scores are called.

    Attributes:
      query: the questions.
      train: the training sequences.
      layer: every single matrix; `()` if layers are not kept apart.
      along: of each question, numbers there are to say of it, by what they are.
    """

    query: Sequence[str]
    train: Sequence[str]
    layer: Sequence[str]
    along: Mapping[str, Sequence[float]]


@dataclass
class Stream:
    """Scores being written.

    Attributes:
      path: of the zarr folder.
      names: of all axes.
      attrs: what there is to say of all scores.
      dtype: of the numbers.
      batch: how many sequences come at a time.
      key: of all that the scores depend on.
      every: seconds between two commits, or more if they take long.
      odd: the sequences this process took in whose scores are not finite.
    """

    path: Path
    names: Names
    attrs: Mapping[str, Any]
    dtype: str
    batch: int
    key: str
    every: float
    done: int = 0
    odd: list[str] = field(default_factory=list)
    _rows: list[np.ndarray] = field(default_factory=list)
    _pace: Pace = field(init=False)

    def __post_init__(self) -> None:
        """Counts from now."""
        self._pace = Pace(self.every)

    @property
    def log(self) -> Path:
        """Returns the file that says what is whole."""
        return log_at(self.path)

    @property
    def chunk(self) -> int:
        """Returns how many sequences lie together in one file: whole batches."""
        each = max(1, len(self.names.query) * max(1, len(self.names.layer)))
        size = np.dtype(self.dtype).itemsize * each
        return self.batch * max(1, CHUNK // (size * self.batch))

    def open(self) -> int:
        """Begins, or goes on with what was begun; returns how many batches are whole.

        Raises:
          ValueError: if what is whole is damaged.
        """
        lines = committed(self.log)
        if lines and lines[0].get("key") == self.key and self.path.is_dir():
            cut(self.log)
            for torn in self.path.rglob("*.partial"):  # zarr's, of a process killed
                torn.unlink()
            self.done = lines[-1].get("stop", 0)
            _check(self.path, lines)
            self._rows = list(_tail(self.path, lines))
        else:
            self._begin()
        self._pace.begin()
        return -(-(self.done + sum(map(len, self._rows))) // self.batch)

    def add(self, scores_BxQxL: np.ndarray) -> None:
        """Takes in one batch's scores, and commits them if it is time to."""
        at = self.done + sum(map(len, self._rows))
        odd = np.flatnonzero(~np.isfinite(scores_BxQxL).all((1, 2)))
        self.odd += [str(self.names.train[at + i]) for i in odd.tolist()]
        self._rows.append(scores_BxQxL)
        held = sum(map(len, self._rows))
        last = self.done + held == len(self.names.train)
        due = self._pace.due()
        if last or due or held >= HELD * self.chunk:
            # Part of a file would have to be written over later, and a process may end
            # while it does: only whole files go there, the rest into one of its own.
            self._commit(held if last else held - held % self.chunk)

    def finish(self) -> str:
        """Compares everything with its checksums; returns one of the whole folder.

        Raises:
          ValueError: if something is damaged, or missing.
        """
        lines = committed(self.log)
        if lines[-1].get("stop", 0) != len(self.names.train):
            raise ValueError(f"{self.path} has {self.done} sequences, not all.")
        whole = checksum(self.path)
        _check(self.path, lines)
        self._clear()
        return whole

    def _begin(self) -> None:
        # First of all nothing is said any more of what then goes.
        self.log.unlink(missing_ok=True)
        if self.path.is_dir():
            shutil.rmtree(self.path)
        self._clear()
        root = zarr.open_group(self.path, mode="w", attributes=dict(self.attrs))
        queries, train, layers = (
            len(x) for x in (self.names.query, self.names.train, self.names.layer)
        )
        dims = ("query", "train")
        create = root.create_array
        create(SCORE, shape=(queries, train), chunks=(queries, self.chunk),
               dtype=self.dtype, dimension_names=dims)  # fmt: skip
        if layers:
            create(LAYERS, shape=(queries, train, layers),
                   chunks=(queries, self.chunk, layers), dtype=self.dtype,
                   dimension_names=(*dims, "layer"))  # fmt: skip
        _strings(root, "train", "train", train, self.chunk)
        for name in ("query", "layer"):
            values = getattr(self.names, name)
            if len(values):
                _strings(root, name, name, len(values), len(values))[:] = _words(values)
        for name, values in self.names.along.items():
            array = create(name, shape=(queries,), dtype="float64",
                           dimension_names=("query",))  # fmt: skip
            array[:] = np.asarray(values, float)
        _flush(self.path)
        say(self.log, {"key": self.key, "names_sha256": _names(self.path)})

    def _commit(self, whole: int) -> None:
        begun = time.monotonic()
        rows = np.concatenate(self._rows)
        line: dict[str, Any] = {"start": self.done, "stop": self.done + whole}
        if whole:
            line |= self._fill(rows[:whole], begun)
        self._rows, self.done = [rows[whole:]], line["stop"]
        tail = _tail_at(self.path, self.done + len(rows) - whole)
        if len(rows) > whole:
            with atomic(tail) as temporary, temporary.open("wb") as file:
                np.save(file, rows[whole:], allow_pickle=False)
            line |= {"tail": tail.name, "tail_sha256": checksum(tail)}
        say(self.log, line)
        self._clear(tail)
        self._pace.saved(begun)

    def _fill(self, rows: np.ndarray, begun: float) -> dict[str, str]:
        """Writes sequences that fill files; returns the checksums of their numbers."""
        place = slice(self.done, self.done + len(rows))
        root: Any = zarr.open_group(self.path, mode="r+")
        arrays = _arrays(rows, bool(self.names.layer), self.dtype)
        for name, values in arrays.items():
            root[name][:, place] = values
        arrays["train"] = _words(self.names.train[place])
        root["train"][place] = arrays["train"]
        _flush(self.path, since=begun)
        return {name: _digest(x) for name, x in arrays.items()}

    def _clear(self, keep: Path | None = None) -> None:
        """Removes what is no longer, or was never, spoken of."""
        for path in self.path.parent.glob(f"{escape(self.path.stem)}.tail-*.npy"):
            if path != keep:
                path.unlink()


def read_scores(path: Path) -> xr.Dataset:
    """Returns scores that were streamed, read as they are asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        found = xr.open_zarr(path, consolidated=False, chunks=None)
    found = found.set_coords([x for x in found if x not in (SCORE, LAYERS)])
    # Names as everything else has them, not as zarr keeps text of any length.
    words = {
        k: x.astype(object) for k, x in found.coords.items() if x.dtype.kind in "TU"
    }
    return found.assign_coords(words)


def check_begun(path: Path) -> None:
    """Raises if what is whole of scores that are not finished was changed since.

    Raises:
      ValueError: naming what is damaged.
    """
    parts = path.parent.glob(f"{escape(path.stem)}.part-*.zarr")
    for each in (path, *parts):
        lines = committed(log_at(each))
        if lines and each.is_dir():
            _check(each, lines)
            _tail(each, lines)


def forget(path: Path) -> None:
    """Removes what was said of scores that are finished, and known as a whole."""
    log_at(path).unlink(missing_ok=True)


def log_at(path: Path) -> Path:
    """Returns the file that says what of some scores is whole."""
    return path.with_suffix(".log.jsonl")


def whole_rows(lines: Sequence[Mapping[str, Any]]) -> int:
    """Returns how many sequences a log says are whole, those in a tail included."""
    last = lines[-1] if lines else {}
    if "tail" in last:
        return int(Path(last["tail"]).stem.rpartition("-")[2])
    return last.get("stop", 0)


def stored(path: Path) -> Iterator[np.ndarray]:
    """Yields the scores that are whole, `[n, Q, layers]`, file by file.

    Raises:
      ValueError: if something is damaged.
    """
    lines = committed(log_at(path))
    _check(path, lines)
    root: Any = zarr.open_group(path, mode="r")
    by_layer, stop = LAYERS in root, lines[-1].get("stop", 0)
    array = root[LAYERS if by_layer else SCORE]
    step = array.chunks[1]
    for start in range(0, stop, step):
        values = np.asarray(array[:, start : min(start + step, stop)])
        yield (values if by_layer else values[..., None]).swapaxes(0, 1)
    yield from _tail(path, lines)


def _tail_at(path: Path, stop: int) -> Path:
    return path.with_suffix(f".tail-{stop}.npy")


def _tail(path: Path, lines: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """Returns the sequences that are on the disk but in no file of the scores."""
    if "tail" not in lines[-1]:
        return []
    tail = path.parent / lines[-1]["tail"]
    if not tail.is_file() or checksum(tail) != lines[-1]["tail_sha256"]:
        raise ValueError(
            f"{tail} is not what was written; its checksum differs. Restore it, or "
            f"delete {path} to scan again."
        )
    return [np.load(tail, allow_pickle=False)]


def _names(path: Path) -> str:
    """Returns a SHA-256 of all that is written of scores before the first of them."""
    state = hashlib.sha256()
    grow = {path / name / "c" for name in (SCORE, LAYERS, "train")}
    for file in sorted(x for x in path.rglob("*") if x.is_file()):
        if not grow & {*file.parents}:
            state.update(f"{file.relative_to(path)} {checksum(file)}\0".encode())
    return state.hexdigest()


def _check(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    if _names(path) != lines[0]["names_sha256"]:
        raise ValueError(
            f"{path}: the names or shapes of the scores are not what was written; "
            f"their checksum differs. Restore them, or delete {path} to scan again."
        )
    for line, name, values in _pieces(path, lines[1:]):
        if _digest(values) != line[name]:
            raise ValueError(
                f"{path / name}: the scores of sequences {line['start']} to "
                f"{line['stop']} are not what was written; their checksum differs. "
                f"Restore them, or delete {path} to scan again."
            )


def _pieces(
    path: Path, lines: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], str, np.ndarray]]:
    root: Any = zarr.open_group(path, mode="r")
    for line in lines:
        for name in (SCORE, LAYERS, "train"):
            if name in line:
                place = slice(line["start"], line["stop"])
                try:
                    values = np.asarray(root[name][..., place, *_rest(name)])
                except Exception as error:  # noqa: BLE001  a codec may raise anything
                    raise ValueError(
                        f"{path / name} can't be read: {error}. Restore it, or delete "
                        f"{path} to scan again."
                    ) from error
                yield line, name, values


def _arrays(rows_NxQxL: np.ndarray, by_layer: bool, dtype: str) -> dict[str, Any]:
    """Returns totals, and layers if they are kept, `[Q, N, …]`."""
    layers = np.ascontiguousarray(rows_NxQxL.transpose(1, 0, 2))
    total = layers.sum(-1, dtype=np.float64).astype(dtype)
    return {SCORE: total, **({LAYERS: layers.astype(dtype)} if by_layer else {})}


def _strings(root: Any, name: str, dim: str, length: int, chunk: int) -> Any:
    with warnings.catch_warnings():
        # Text of any length is in zarr's third format by agreement, not yet by its
        # text; xarray writes and reads it so too.
        warnings.simplefilter("ignore")
        return root.create_array(
            name,
            shape=(length,),
            chunks=(max(1, chunk),),
            dtype=str,
            dimension_names=(dim,),
        )


def _words(values: Sequence[str]) -> np.ndarray:
    return np.array([str(x) for x in values], dtype=object)


def _rest(name: str) -> tuple[slice, ...]:
    """Returns the axes behind that of the sequences, whole."""
    return (slice(None),) if name == LAYERS else ()


def _digest(values: np.ndarray) -> str:
    if values.dtype.kind in "OTU":
        return hashlib.sha256("\0".join(map(str, values)).encode()).hexdigest()
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _flush(path: Path, since: float | None = None) -> None:
    """Waits until what was written of a folder is on the disk."""
    age = None if since is None else time.time() - (time.monotonic() - since) - 1
    for file in path.rglob("*"):
        if file.is_file() and (age is None or file.stat().st_mtime >= age):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
