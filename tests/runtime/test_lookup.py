"""What is looked up is what a comparison with everything finds, or mostly."""

import numpy as np
import pytest

from influence.runtime.coding import Codes, encode, length_in, read_codes, width_of
from influence.runtime.lookup import KINDS, PIECE, flat

LENGTH = 8 * 131
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(3000, LENGTH)).astype(np.float32)
CODES = Codes(encode(VECTORS))
ASKED = VECTORS[[5, 70, 2999]] + RNG.normal(size=(3, LENGTH)).astype(np.float32)


def test_codes_keep_signs_and_products_on_average():
    decoded = CODES.decoded(CODES.rows)
    np.testing.assert_array_equal(np.sign(decoded), np.sign(VECTORS))
    # The length that makes the product of a vector with its own code right.
    own = (decoded * VECTORS).sum(1)
    np.testing.assert_allclose(own, (VECTORS**2).sum(1), rtol=1e-4)  # float32


def test_codes_of_bytes_keep_every_number_to_half_a_step():
    codes = Codes(encode(VECTORS[:50], 8), 8)
    assert (codes.length, codes.rows.shape[1]) == (LENGTH, width_of(LENGTH, 8))
    step = abs(VECTORS[:50]).max(axis=1, keepdims=True) / 127
    error = abs(codes.decoded(codes.rows) - VECTORS[:50])
    assert (error <= 0.5001 * step).all()  # and what float32 rounds
    part = slice(100, 300)
    np.testing.assert_array_equal(
        codes.decoded(codes.rows[3:5], part), codes.decoded(codes.rows)[3:5, part]
    )


@pytest.mark.parametrize("block", [1, 1 << 22, 1 << 29])
def test_codes_of_bytes_are_compared_number_by_number(block):
    rng = np.random.default_rng(0)
    # More numbers than are decoded at a time, and more vectors.
    vectors = rng.normal(size=(20, PIECE + 64)).astype(np.float32)
    asked = vectors[[3, 17]] + rng.normal(size=(2, PIECE + 64)).astype(np.float32)
    codes = Codes(encode(vectors, 8), 8)
    expected = asked @ codes.decoded(codes.rows).T
    found = flat(codes, block=block)(asked, 5)
    order = np.argsort(-expected, axis=1)[:, :5]
    np.testing.assert_array_equal(found.places, order)
    products = np.take_along_axis(expected, order, 1)
    # Products of 65,600 and more, to some of float32's steps of 0.008.
    np.testing.assert_allclose(found.products, products, atol=1e-1)
    assert flat(codes, block=block)(asked, 99).places.shape == (2, 20)


@pytest.mark.parametrize("bits", [1, 8])
def test_what_is_no_number_is_kept_as_nothing(bits):
    vectors = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    vectors[1, 5], vectors[2] = np.nan, 0
    kept = encode(vectors, bits)
    np.testing.assert_array_equal(kept[1], kept[2])
    codes = Codes(kept, bits)
    assert not codes.decoded(kept)[1:].any()
    assert flat(codes)(vectors[[0]], 1).places.tolist() == [[0]]


def test_flat_compares_with_everything():
    expected = ASKED @ CODES.decoded(CODES.rows).T
    found = flat(CODES)(ASKED, 20)
    order = np.argsort(-expected, axis=1)[:, :20]
    assert (found.places[:, 0] == [5, 70, 2999]).all()
    # A query's numbers are rounded to 8 bits: 1 / 256 of their range, at random.
    error = abs(found.products - np.take_along_axis(expected, found.places, 1)).max()
    scale = abs(CODES.decoded(CODES.rows[:1])).max() * LENGTH**0.5
    assert error < 6 * scale * np.ptp(ASKED) / 256
    shared = [len({*a} & {*b}) for a, b in zip(found.places, order, strict=True)]
    assert min(shared) >= 18  # neighbours as close as that error may change places


def test_memory_for_a_part_of_the_codes_is_enough():
    whole, parts = (
        flat(CODES)(ASKED, 50),
        flat(CODES, block=700 * CODES.rows.shape[1])(ASKED, 50),
    )
    np.testing.assert_array_equal(whole.places, parts.places)
    np.testing.assert_array_equal(whole.products, parts.products)


@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_what_is_near(kind, bits, tmp_path):
    path, codes = tmp_path / "made", Codes(encode(VECTORS, bits), bits)
    if make := KINDS[kind].make:
        make(codes, path)
    found = KINDS[kind].open(codes, path)(ASKED, 10)
    assert found.places.shape == found.products.shape == (3, 10)
    for own, places in zip([5, 70, 2999], found.places, strict=True):
        assert own in places
    assert (np.diff(found.products, axis=1) <= 0).all()


def test_more_than_there_are_is_all_there_are():
    few = Codes(CODES.rows[:4])
    found = flat(few)(ASKED, 10)
    assert np.sort(found.places).tolist() == [[0, 1, 2, 3]] * 3


def test_a_sequence_takes_no_more_bytes_than_it_may():
    assert width_of(length_in(512)) == 511
    assert CODES.rows.shape[1] == width_of(LENGTH)
    with pytest.raises(ValueError, match="9 bytes are too few"):
        length_in(9)


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    path = tmp_path / "codes"
    path.write_bytes(CODES.rows[:3].tobytes()[:-1])
    with pytest.raises(ValueError, match="no whole codes of 139"):
        read_codes(path, LENGTH)
    path.write_bytes(CODES.rows[:3].tobytes())
    np.testing.assert_array_equal(read_codes(path, LENGTH).rows, CODES.rows[:3])
