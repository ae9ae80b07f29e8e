"""Vectors as they are kept: their signs, or every number of them in a byte.

A vector of `K` numbers is kept as their signs and two factors, `K / 8 + 8` bytes
(RaBitQ, Gao & Long 2024, as faiss has it). Whatever the length of a vector and of its
signs, the product with a query is right on average. Where there is room for a byte each
they are kept as whole numbers up to 127 and one factor, `K + 4` bytes, and a product
errs by about a fiftieth of what that of signs does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np

from influence.attribution.countsketch import length_of

Bits = Literal[1, 8]
"""In which a number is kept."""

FACTORS: dict[Bits, int] = {1: 8, 8: 4}
"""Bytes beside the numbers of a vector."""

HIGHEST = 127
"""A vector's largest number, as a byte has it."""

QUERY_BITS = 8
"""Of each of a query's numbers, when it is compared with signs."""

BLOCK = 1 << 29
"""How many bytes of codes, or of what they are decoded to, are in memory at a time."""


def width_of(length: int, bits: Bits = 1) -> int:
    """Returns how many bytes a vector of `length` numbers is kept in."""
    return length * bits // 8 + FACTORS[bits]


def length_in(size: int) -> int:
    """Returns how many numbers a vector may have whose signs are kept in `size` bytes.

    Raises:
      ValueError: if there is no room for any.
    """
    if size < FACTORS[1] + 2:
        raise ValueError(
            f"{size} bytes are too few for a sequence: {FACTORS[1]} go into factors, "
            "and two at least into signs. Give 64 or more."
        )
    return length_of(size - FACTORS[1])


def encode(short_BxK: np.ndarray, bits: Bits = 1) -> np.ndarray:
    """Returns vectors as they are kept, rows of bytes.

    One that is not finite is kept as zeros, whose product with anything is 0.

    Example:
      >>> from influence.runtime.coding import encode
      >>> encode(np.ones((3, 16), np.float32)).shape
      (3, 10)
      >>> encode(np.ones((3, 16), np.float32), bits=8).shape
      (3, 20)
    """
    finite_Bx1 = np.isfinite(short_BxK).all(axis=1, keepdims=True)
    kept_BxK = np.where(finite_Bx1, short_BxK, 0).astype(np.float32, order="C")
    if bits == 1:
        return signs(short_BxK.shape[1]).sa_encode(kept_BxK)
    factor_Bx1 = np.abs(kept_BxK).max(axis=1, keepdims=True, initial=0) / HIGHEST
    kept_BxK /= np.where(factor_Bx1 == 0, 1, factor_Bx1)
    whole_BxK = np.rint(kept_BxK, out=kept_BxK).astype(np.int8)
    return np.concatenate([whole_BxK, factor_Bx1.view(np.int8)], axis=1).view(np.uint8)


def sign_bits(codes_NxW: np.ndarray) -> np.ndarray:
    """Returns codes of signs without their factors."""
    return np.ascontiguousarray(codes_NxW[:, : -FACTORS[1]])


def signs(length: int) -> Any:
    """Returns an empty index of vectors' signs, around a centre of zeros."""
    empty = faiss.IndexRaBitQ(length, faiss.METRIC_INNER_PRODUCT)
    ends = np.ones((2, length), np.float32)
    ends[1] = -1
    empty.train(ends)
    empty.qb = QUERY_BITS
    return empty


@dataclass(frozen=True)
class Codes:
    """Vectors as they are kept.

    Attributes:
      rows: `[N, W]` bytes, mapped from a file or in memory.
      bits: of a number.

    Example:
      >>> from influence.runtime.coding import Codes, encode
      >>> from influence.runtime.lookup import flat
      >>> vectors = np.random.default_rng(0).normal(size=(20, 64))
      >>> find = flat(Codes(encode(vectors)))
      >>> find(vectors[[7]].astype(np.float32), 1).places.tolist()
      [[7]]
    """

    rows: np.ndarray
    bits: Bits = 1

    @property
    def length(self) -> int:
        """Returns `K`."""
        return (self.rows.shape[1] - FACTORS[self.bits]) * 8 // self.bits

    def __len__(self) -> int:
        """Returns `N`."""
        return len(self.rows)

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the codes some at a time, and how many there were before."""
        for start in range(0, len(self), size):
            yield start, self.rows[start : start + size]

    def decoded(self, rows: np.ndarray, part: slice = slice(None)) -> np.ndarray:
        """Returns codes as vectors, or a part of these.

        Those of signs have each number as long as it was on average.
        """
        if self.bits == 1:
            return signs(self.length).sa_decode(np.ascontiguousarray(rows))[:, part]
        whole, factor = rows[:, : self.length], rows[:, self.length :]
        numbers = whole.view(np.int8)[:, part].astype(np.float32)
        numbers *= np.ascontiguousarray(factor).view(np.float32)
        return numbers

    def bits_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the signs of codes, one bit each."""
        own = rows if self.bits == 1 else encode(self.decoded(rows))
        return sign_bits(own)

    def some(self, count: int) -> np.ndarray:
        """Returns vectors spread over all of them."""
        places = np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))
        return self.decoded(self.rows[places])


def read_codes(path: Path, length: int, bits: Bits = 1) -> Codes:
    """Returns the codes in a file, mapped.

    Raises:
      ValueError: if the file does not hold whole codes of that length.
    """
    width, size = width_of(length, bits), path.stat().st_size
    if size == 0 or size % width:
        raise ValueError(
            f"{path} has {size} bytes, which are no whole codes of {width}. Delete it "
            "and index again."
        )
    return Codes(np.memmap(path, np.uint8, "r", shape=(size // width, width)), bits)
