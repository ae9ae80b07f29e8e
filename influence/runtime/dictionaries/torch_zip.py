"""State dicts that `torch.save` wrote, read without unpickling.

Such a file is a zip of the tensors' bytes and of a pickle that says how they make up a
dictionary. A pickle is a program. This one is not run: its instructions are listed, and
the few that a state dict consists of are followed here. Any other, and any function but
the two that make dictionaries and tensors, is an error.
"""

import pickletools
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

ORDERED, TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
STORAGES = {
    "torch DoubleStorage": np.dtype("<f8"),
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
    "torch BoolStorage": np.dtype("?"),
}
"""The names that may occur beside the two functions."""


class _ForeignError(ValueError):
    """What is in the file is none of a state dict."""


class _Name(NamedTuple):
    """The name of something in a module, which is not looked up."""

    text: str


_MARK = _Name("")


def read_state(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a state dict.

    Raises:
      ValueError: if it is something else, or damaged, saying what was found.
    """
    try:
        with zipfile.ZipFile(path) as file:
            found = _Machine(path, _Members(path, file)).run()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) can't be read: {error}. It may be "
            "cut short, or written by a torch before 1.6; save it again."
        ) from error
    if not isinstance(found, dict):
        raise _foreign(path, f"a {type(found).__name__}")
    for name, x in found.items():
        if not isinstance(name, str) or not isinstance(x, np.ndarray):
            raise _foreign(path, f"{name!r}, which is no tensor")
    return found


def _foreign(path: Path, what: str) -> _ForeignError:
    return _ForeignError(
        f"{path} holds {what}, and a state dict has tensors alone. Nothing of it was "
        "run. Save `dictionary.state_dict()` instead."
    )


class _Members(NamedTuple):
    """The parts of a zip, all in one folder."""

    path: Path
    file: zipfile.ZipFile

    def read(self, name: str) -> bytes:
        """Returns a part's bytes: as they lie there, so no more than the file has."""
        inside = [x for x in self.file.infolist() if x.filename.endswith(f"/{name}")]
        if len(inside) != 1 or inside[0].compress_type != zipfile.ZIP_STORED:
            raise _foreign(self.path, f"no part {name!r} that can be read")
        return self.file.read(inside[0])

    def order(self) -> str:
        """Returns in which order bytes make up numbers."""
        names = [x for x in self.file.namelist() if x.endswith("/byteorder")]
        return self.file.read(names[0]).decode("ascii") if names else "little"


class _Storage(NamedTuple):
    """The numbers of a tensor, in a row."""

    values: np.ndarray


class _Machine:
    """Follows the instructions of a pickle."""

    def __init__(self, path: Path, members: _Members) -> None:
        self.path, self.members = path, members
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Returns what the program makes.

        Raises:
          ValueError: if it is none of a state dict.
        """
        if self.members.order() != "little":
            raise _foreign(self.path, "numbers of another byte order")
        program = self.members.read("data.pkl")
        try:
            for code, argument, _ in pickletools.genops(program):
                if code.name == "STOP":
                    break
                self._step(code.name, argument)
            return self.stack.pop()
        except _ForeignError:
            raise
        except (IndexError, KeyError, TypeError, ValueError) as error:
            what = f"a pickle that does not hold together ({error!r})"
            raise _foreign(self.path, what) from error

    def _step(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self.stack.append(_VALUES[name](argument))
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise _foreign(self.path, f"the pickle instruction {name}")

    def marked(self) -> list[Any]:
        """Takes everything down to the last mark off the stack, and the mark."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    def tuple_of(self, count: int) -> None:
        """Replaces the last values by a tuple of them."""
        found = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(found)

    def put(self, place: int) -> None:
        """Remembers the last value."""
        self.memo[place] = self.stack[-1]

    def name(self, text: str) -> None:
        """Puts a name on the stack, if it is one of a state dict's."""
        if text not in (ORDERED, TENSOR, *STORAGES):
            raise _foreign(self.path, f"the name {text!r}")
        self.stack.append(_Name(text))

    def storage(self) -> None:
        """Replaces what says where numbers are by them."""
        kind, name, key, _, count = self.stack.pop()
        if kind != "storage" or not isinstance(name, _Name):
            raise _foreign(self.path, f"a reference to {kind!r}")
        values = np.frombuffer(self.members.read(f"data/{key}"), STORAGES[name.text])
        if values.size != count:
            what = f"{values.size} numbers for a tensor of {count}"
            raise _foreign(self.path, what)
        self.stack.append(_Storage(values))

    def call(self) -> None:
        """Replaces a function's name and its arguments by what it makes."""
        arguments, name = self.stack.pop(), self.stack.pop()
        if name == _Name(ORDERED) and arguments == ():
            self.stack.append({})
        elif name == _Name(TENSOR) and isinstance(arguments[0], _Storage):
            self.stack.append(self._tensor(arguments[0].values, *arguments[1:4]))
        else:
            raise _foreign(self.path, f"a call of {name!r}")

    def _tensor(
        self, values: np.ndarray, first: int, shape: Any, strides: Any
    ) -> np.ndarray:
        last = first + sum((n - 1) * x for n, x in zip(shape, strides, strict=True))
        inside = prod(shape) == 0 or (first >= 0 and last < values.size)
        if not inside or min((*shape, *strides), default=0) < 0:
            raise _foreign(self.path, "a tensor that is not in its storage")
        if prod(shape) > values.size:
            raise _foreign(self.path, "a tensor larger than its storage")
        steps = [x * values.itemsize for x in strides]
        return np.lib.stride_tricks.as_strided(values[first:], shape, steps).copy()

    def set_items(self, pairs: list[Any]) -> None:
        """Adds keys and values, one after the other, to the dictionary below them."""
        if not isinstance(self.stack[-1], dict):
            raise _foreign(self.path, "items of something else")
        self.stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    def set_item(self) -> None:
        """Adds a key and a value to the dictionary below them."""
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def build(self) -> None:
        """Drops the attributes of a state dict: the versions of its modules."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise _foreign(self.path, "attributes of something else")


_VALUES: dict[str, Callable[[Any], Any]] = {
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_DICT": lambda _: {},
    "MARK": lambda _: _MARK,
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), lambda x: x),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), lambda x: x),
}
"""Instructions that put a value on the stack."""

_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "GLOBAL": lambda m, text: m.name(text),
    "BINPUT": lambda m, place: m.put(place),
    "LONG_BINPUT": lambda m, place: m.put(place),
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "BINGET": lambda m, place: m.stack.append(m.memo[place]),
    "LONG_BINGET": lambda m, place: m.stack.append(m.memo[place]),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.marked())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "BINPERSID": lambda m, _: m.storage(),
    "REDUCE": lambda m, _: m.call(),
    "SETITEM": lambda m, _: m.set_item(),
    "SETITEMS": lambda m, _: m.set_items(m.marked()),
    "BUILD": lambda m, _: m.build(),
}
"""Instructions that change it."""
