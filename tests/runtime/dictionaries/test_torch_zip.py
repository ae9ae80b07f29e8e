"""State dicts are read without being run, and nothing else is read at all."""

import shutil
import zipfile

import numpy as np
import pytest

from influence.runtime.dictionaries.torch_zip import read_state
from tests.runtime.dictionaries import cases

GOLDEN = cases.GOLDEN / "dictionary_learning" / "AutoEncoderTopK" / "ae.pt"
START, END = b"\x80\x02", b"."


STORAGE = np.arange(128, dtype=np.float32)


def program(path, code):
    """Writes a copy of a state dict with another pickle, and with a storage for it."""
    data = STORAGE.tobytes()
    parts = {"data.pkl": START + code + END, "data/0": data}
    return cases.zipped(path, GOLDEN, parts)


def tensor(first=b"K\x00", shape=b"K\x03\x85", strides=b"K\x01\x85", count=b"K\x80"):
    """Returns what rebuilds a tensor from the storage of 128 numbers."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    place = b"X\x03\x00\x00\x00cpu" + count + b"tQ"
    rest = first + shape + strides + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + place + rest


def item(value):
    """Returns what makes a dictionary with one item."""
    return b"}X\x01\x00\x00\x00a" + value + b"s"


def test_tensors_have_their_types_and_shapes():
    found = read_state(GOLDEN)
    assert {k: (x.dtype.name, x.shape) for k, x in found.items()} == {
        "b_dec": ("float32", (8,)),
        "k": ("int32", ()),
        "threshold": ("float32", ()),
        "encoder.weight": ("float32", (16, 8)),
        "encoder.bias": ("float32", (16,)),
        "decoder.weight": ("float32", (8, 16)),
    }
    assert int(found["k"]) == 3


def test_a_tensor_is_a_view_of_its_storage(tmp_path):
    made = tensor(b"K\x05", b"K\x02K\x03\x86", b"K\x01K\x02\x86")
    found = read_state(program(tmp_path / "ae.pt", item(made)))["a"]
    expected = 5 + np.arange(2)[:, None] + 2 * np.arange(3)[None]
    np.testing.assert_array_equal(found, expected)


FOREIGN = {
    "a system call": (b"cos\nsystem\nX\x02\x00\x00\x00ls\x85R", "the name 'os system'"),
    "an instance": (b"(ios\nsystem\n", "the pickle instruction INST"),
    "a new object": (b"c__builtin__\nobject\n)\x81", "the name '__builtin__ object'"),
    "a stacked name": (
        b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93",
        "the pickle instruction STACK_GLOBAL",
    ),
    "an extension": (b"\x82\x01", "the pickle instruction EXT1"),
    "a list": (b"]", "the pickle instruction EMPTY_LIST"),
    "a number": (b"K\x01", "a int"),
    "a dictionary of numbers": (item(b"K\x01"), "'a', which is no tensor"),
    "a name alone": (item(b"ctorch\nFloatStorage\n"), "'a', which is no tensor"),
    "a call of a storage": (b"ctorch\nFloatStorage\n)R", "a call of"),
    "an ordered dictionary of something": (
        b"ccollections\nOrderedDict\nK\x01\x85R",
        "a call of",
    ),
    "attributes of a tuple": (b")}b", "attributes of something else"),
    "items of a tuple": (b")K\x01K\x02s", "items of something else"),
    "another reference": (
        b"(X\x04\x00\x00\x00fileNNNNtQ",
        "a reference to 'file'",
    ),
    "nothing on the stack": (b"R", "does not hold together"),
    "no mark": (b"t", "does not hold together"),
    "nothing remembered": (b"h\x07", "does not hold together"),
    "a key without a value": (b"}(K\x01u", "does not hold together"),
    "no such instruction": (b"\xff", "does not hold together"),
    "before the storage": (item(tensor(b"J\xff\xff\xff\xff")), "not in its storage"),
    "after the storage": (item(tensor(b"K\x7e")), "not in its storage"),
    "backwards": (
        item(tensor(b"K\x05", strides=b"J\xff\xff\xff\xff\x85")),
        "not in its storage",
    ),
    "one number a billion times": (
        item(tensor(shape=b"J\x00\x00\x00\x40\x85", strides=b"K\x00\x85")),
        "larger than its storage",
    ),
    "fewer strides": (item(tensor(strides=b")")), "does not hold together"),
    "more numbers than there are": (
        item(tensor(count=b"K\x7f")),
        "for a tensor of 127",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_pickle_of_anything_else_is_refused(case, tmp_path):
    code, said = FOREIGN[case]
    path = program(tmp_path / "ae.pt", code)
    with pytest.raises(ValueError, match=rf"ae\.pt holds .*{said}") as caught:
        read_state(path)
    assert "Nothing of it was run" in str(caught.value)


def test_files_that_are_no_whole_zip_are_refused(tmp_path):
    path = tmp_path / "ae.pt"
    shutil.copy(GOLDEN, path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"ae\.pt \([\d,]+ bytes\) can't be read"):
        read_state(path)
    path.write_bytes(START + b"}.")
    with pytest.raises(ValueError, match="before 1.6"):
        read_state(path)
    with pytest.raises(ValueError, match=r"no part 'data\.pkl' that can be read"):
        read_state(cases.zipped(path, GOLDEN, {}, zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="another byte order"):
        read_state(cases.zipped(path, GOLDEN, {"byteorder": b"big"}))


def test_parts_that_are_missing_or_cut_short_are_refused(tmp_path):
    path = tmp_path / "ae.pt"
    with pytest.raises(ValueError, match="for a tensor of"):
        read_state(cases.zipped(path, GOLDEN, {"data/0": b"1234"}))
    with pytest.raises(ValueError, match="does not hold together"):
        read_state(cases.zipped(path, GOLDEN, {"data/0": b"12345"}))
    with pytest.raises(ValueError, match="no part 'data/0'"):
        read_state(cases.zipped(path, GOLDEN, {"data/0": None}))
