"""Looking up short vectors: which of very many have the largest product with a query's.

A file of vectors' codes (`coding`), one behind the other, is all that `FLAT` needs,
which compares a query with everything; the other kinds are files of faiss made from the
codes, which look at a part.

* `ivf` compares with vectors near a query: of the lists around √N centres, some.
* `ivfpq` does so with 136 bytes a vector, whatever the codes have.
* `hnsw` walks a graph of signs by Hamming distance, and estimates what it meets.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import faiss
import numpy as np

from influence.runtime.coding import BLOCK, Codes, encode, sign_bits, signs

PIECE = 1 << 16
"""How many numbers of vectors are decoded at a time, to be compared."""

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


def flat(codes: Codes, path: Path | None = None, *, block: int = BLOCK) -> Lookup:
    """Returns the look-up that compares a query with everything.

    Codes of signs beyond the first `block` bytes are read from the disk at every
    look-up, and all that are not signs.
    """
    del path
    return (_signs_compared if codes.bits == 1 else _compared)(codes, block)


def _signs_compared(codes: Codes, block: int) -> Lookup:
    size = max(1, block // codes.rows.shape[1])
    held = signs(codes.length)
    first = next(codes.blocks(size))[1]
    held.add_sa_codes(np.ascontiguousarray(first))

    def find(v_QxK: np.ndarray, count: int) -> Hits:
        found = _search(held, v_QxK, count)
        for start, rows in codes.blocks(size):
            if start:
                other = signs(codes.length)
                other.add_sa_codes(np.ascontiguousarray(rows))
                found = _best(found, _search(other, v_QxK, count, start), count)
        return found

    return find


def _compared(codes: Codes, block: int) -> Lookup:
    size = max(1, block // (4 * PIECE))

    def find(v_QxK: np.ndarray, count: int) -> Hits:
        found = Hits(np.empty((len(v_QxK), 0)), np.empty((len(v_QxK), 0), np.int64))
        for start, rows in codes.blocks(size):
            products = np.zeros((len(v_QxK), len(rows)), np.float32)
            for begin in range(0, codes.length, PIECE):
                part = slice(begin, min(begin + PIECE, codes.length))
                products += v_QxK[:, part] @ codes.decoded(rows, part).T
            places = np.broadcast_to(np.arange(len(rows)) + start, products.shape)
            found = _best(found, Hits(products, places), count)
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
    for _, block in codes.blocks(1 << 14):
        index.add(codes.bits_of(block))
    faiss.write_index_binary(index, str(path))


def _fill(index: Any, codes: Codes, path: Path) -> None:
    lists = faiss.extract_index_ivf(index)
    lists.cp.min_points_per_centroid = 1  # few vectors are no reason for a warning
    index.train(codes.some(TAUGHT))
    for _, block in codes.blocks(1 << 14):
        index.add(codes.decoded(block))
    faiss.write_index(index, str(path))


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
        _, met = graph.search(sign_bits(encode(v_QxK)), near)
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
