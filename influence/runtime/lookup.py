"""Looking up short vectors: which of very many have the largest product with a query's.

A vector of `K` numbers is kept as their signs and two factors, `K / 8 + 8` bytes
(RaBitQ, Gao & Long 2024, as faiss has it). Whatever the length of a vector and of its
signs, the product with a query is right on average. A file of such codes, one behind
the other, is all that `FLAT` needs, which compares a query with everything; the other
kinds are files of faiss made from it, which look at a part.

* `ivf` compares with vectors near a query: of the lists around √N centres, some.
* `ivfpq` does so with 136 bytes a vector, whatever the codes have.
* `hnsw` walks a graph of signs by Hamming distance, and estimates what it meets.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import faiss
import numpy as np

from influence.attribution.countsketch import length_of

FACTORS = 8
"""Bytes beside the signs of a vector."""

QUERY_BITS = 8
"""Of each of a query's numbers, when it is compared with signs."""

BLOCK = 1 << 20
"""How many codes are in memory at a time."""

TAUGHT = 20_000
"""From how many vectors centres and codebooks are made, at the most."""

PROBED = 4
"""One of so many lists is looked at."""

NARROW, BYTES = 1024, 128
"""How many numbers `ivfpq` rotates a vector to, and in how many bytes it keeps them."""

LINKS, BREADTH, WIDER = 32, 1024, 8
"""Of the graph: links a vector, how many are in view while it is walked, and how many
times as many as are asked for are estimated."""


class Hits(NamedTuple):
    """What a look-up finds.

    Attributes:
      products: with the query, highest first, `[Q, n]`; -inf where there are no more.
      places: of which vectors, `[Q, n]`; -1 where there are no more.
    """

    products: np.ndarray
    places: np.ndarray


class Lookup(Protocol):
    """Something that vectors are looked up in."""

    def __call__(self, v_QxK: np.ndarray, count: int) -> Hits:
        """Returns the `count` vectors with the largest products."""
        ...


def width_of(length: int) -> int:
    """Returns how many bytes a vector of `length` numbers is kept in."""
    return length // 8 + FACTORS


def length_in(size: int) -> int:
    """Returns how many numbers a vector may have that is kept in `size` bytes.

    Raises:
      ValueError: if there is no room for any.
    """
    if size < FACTORS + 2:
        raise ValueError(
            f"{size} bytes are too few for a sequence: {FACTORS} go into factors, and "
            "two at least into signs. Give 64 or more."
        )
    return length_of(size - FACTORS)


def encode(short_BxK: np.ndarray) -> np.ndarray:
    """Returns vectors as they are kept, `[B, K / 8 + 8]` bytes.

    One that is not finite is kept as zeros, whose product with anything is 0.

    Example:
      >>> from influence.runtime.lookup import encode
      >>> encode(np.ones((3, 16), np.float32)).shape
      (3, 10)
    """
    finite_Bx1 = np.isfinite(short_BxK).all(axis=1, keepdims=True)
    kept_BxK = np.where(finite_Bx1, short_BxK, 0)
    flat = _flat(short_BxK.shape[1])
    return flat.sa_encode(np.ascontiguousarray(kept_BxK, np.float32))


def _flat(length: int) -> Any:
    """Returns an empty index of codes, around a centre of zeros."""
    flat = faiss.IndexRaBitQ(length, faiss.METRIC_INNER_PRODUCT)
    ends = np.ones((2, length), np.float32)
    ends[1] = -1
    flat.train(ends)
    flat.qb = QUERY_BITS
    return flat


@dataclass(frozen=True)
class Codes:
    """Vectors as they are kept.

    Attributes:
      rows: `[N, K / 8 + 8]` bytes, mapped from a file or in memory.

    Example:
      >>> from influence.runtime.lookup import Codes, encode, flat
      >>> vectors = np.random.default_rng(0).normal(size=(20, 64))
      >>> find = flat(Codes(encode(vectors)))
      >>> find(vectors[[7]].astype(np.float32), 1).places.tolist()
      [[7]]
    """

    rows: np.ndarray

    @property
    def length(self) -> int:
        """Returns `K`."""
        return 8 * (self.rows.shape[1] - FACTORS)

    def __len__(self) -> int:
        """Returns `N`."""
        return len(self.rows)

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the codes some at a time, and how many there were before."""
        for start in range(0, len(self), size):
            yield start, np.ascontiguousarray(self.rows[start : start + size])

    def decoded(self, rows: np.ndarray) -> np.ndarray:
        """Returns codes as vectors: their signs, each as long as the vector was."""
        return _flat(self.length).sa_decode(np.ascontiguousarray(rows))

    def some(self, count: int) -> np.ndarray:
        """Returns vectors spread over all of them."""
        places = np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))
        return self.decoded(self.rows[places])


def read_codes(path: Path, length: int) -> Codes:
    """Returns the codes in a file, mapped.

    Raises:
      ValueError: if the file does not hold whole codes of that length.
    """
    width, size = width_of(length), path.stat().st_size
    if size == 0 or size % width:
        raise ValueError(
            f"{path} has {size} bytes, which are no whole codes of {width}. Delete it "
            "and index again."
        )
    return Codes(np.memmap(path, np.uint8, "r", shape=(size // width, width)))


def flat(codes: Codes, path: Path | None = None, *, block: int = BLOCK) -> Lookup:
    """Returns the look-up that compares a query with everything.

    Codes beyond the first `block` are read from the disk at every look-up.
    """
    del path
    held = _flat(codes.length)
    first = next(codes.blocks(block))[1]
    held.add_sa_codes(first)

    def find(v_QxK: np.ndarray, count: int) -> Hits:
        found = _search(held, v_QxK, count)
        for start, rows in codes.blocks(block):
            if start:
                other = _flat(codes.length)
                other.add_sa_codes(rows)
                found = _best(found, _search(other, v_QxK, count, start), count)
        return found

    return find


def _search(index: Any, v_QxK: np.ndarray, count: int, start: int = 0) -> Hits:
    products, places = index.search(v_QxK, min(count, index.ntotal))
    return Hits(
        np.where(places < 0, -np.inf, products),
        np.where(places < 0, -1, places + start),
    )


def _best(first: Hits, second: Hits, count: int) -> Hits:
    """Returns the best of two."""
    both = Hits(*(np.concatenate(x, 1) for x in zip(first, second, strict=True)))
    order = np.argsort(-both.products, axis=1, kind="stable")[:, :count]
    return Hits(*(np.take_along_axis(x, order, 1) for x in both))


def _lists(codes: Codes) -> int:
    return max(1, round(len(codes) ** 0.5))


def make_ivf(codes: Codes, path: Path) -> None:
    """Writes lists of codes around centres."""
    coarse = faiss.IndexFlatIP(codes.length)
    index = faiss.IndexIVFRaBitQ(
        coarse, codes.length, _lists(codes), faiss.METRIC_INNER_PRODUCT
    )
    _fill(index, codes, path)


def make_ivfpq(codes: Codes, path: Path) -> None:
    """Writes lists of codes of 136 bytes around centres.

    Raises:
      ValueError: if vectors are so short that nothing would be gained.
    """
    if codes.length <= NARROW:
        raise ValueError(
            f"Vectors of {codes.length} numbers are kept in {codes.rows.shape[1]} "
            f"bytes: there is nothing to compress. Index with more --bytes, or --kind "
            "flat."
        )
    turn = faiss.RandomRotationMatrix(codes.length, NARROW)
    turn.init(0)
    metric = faiss.METRIC_INNER_PRODUCT
    coarse = faiss.IndexFlatIP(NARROW)
    lists = faiss.IndexIVFPQ(coarse, NARROW, _lists(codes), BYTES, 8, metric)
    lists.pq.cp.min_points_per_centroid, lists.pq.cp.niter = 1, 10
    _fill(faiss.IndexPreTransform(turn, lists), codes, path)


def make_hnsw(codes: Codes, path: Path) -> None:
    """Writes a graph of signs."""
    index = faiss.IndexBinaryHNSW(codes.length, LINKS)
    for _, block in codes.blocks(1 << 16):
        index.add(_signs(block))
    faiss.write_index_binary(index, str(path))


def _fill(index: Any, codes: Codes, path: Path) -> None:
    lists = faiss.extract_index_ivf(index)
    lists.cp.min_points_per_centroid = 1  # few vectors are no reason for a warning
    index.train(codes.some(TAUGHT))
    for _, block in codes.blocks(1 << 14):
        index.add(codes.decoded(block))
    faiss.write_index(index, str(path))


def _signs(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows[:, :-FACTORS])


def open_lists(codes: Codes, path: Path | None) -> Lookup:
    """Returns the look-up in lists, which stay on the disk until they are looked at."""
    del codes
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    lists = faiss.extract_index_ivf(index)
    lists.nprobe = max(1, lists.nlist // PROBED)
    return lambda v_QxK, count: _search(index, v_QxK, count)


def open_hnsw(codes: Codes, path: Path | None) -> Lookup:
    """Returns the look-up in a graph."""
    graph: Any = faiss.read_index_binary(str(path))

    def find(v_QxK: np.ndarray, count: int) -> Hits:
        near = min(WIDER * count, len(codes))
        graph.hnsw.efSearch = max(BREADTH, near)
        _, met = graph.search(_signs(encode(v_QxK)), near)
        one = [
            _among(codes, v, places, count)
            for v, places in zip(v_QxK, met, strict=True)
        ]
        return Hits(*(np.stack(x) for x in zip(*one, strict=True)))

    return find


def _among(codes: Codes, v_K: np.ndarray, places: np.ndarray, count: int) -> Hits:
    """Returns the best of some places for one query, filled up to `count`."""
    places = np.sort(places[places >= 0])
    products = codes.decoded(codes.rows[places]) @ v_K
    order = np.argsort(-products, kind="stable")[:count]
    short = (0, min(count, len(codes)) - len(order))
    return Hits(
        np.pad(products[order], short, constant_values=-np.inf),
        np.pad(places[order], short, constant_values=-1),
    )


class Kind(NamedTuple):
    """A way to look vectors up.

    Attributes:
      make: writes a file from codes; None if the codes are enough.
      open: returns the look-up, of codes and that file.
    """

    make: Callable[[Codes, Path], None] | None
    open: Callable[[Codes, Path | None], Lookup]


FLAT = "flat"

KINDS = {
    FLAT: Kind(None, flat),
    "ivf": Kind(make_ivf, open_lists),
    "ivfpq": Kind(make_ivfpq, open_lists),
    "hnsw": Kind(make_hnsw, open_hnsw),
}
"""By the name a user gives."""
