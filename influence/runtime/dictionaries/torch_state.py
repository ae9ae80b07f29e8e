"""Tensors of a file that `torch.save` wrote, without running what is in it.

The file is a zip with a pickle that describes tensors, and their numbers beside it. The
pickle is never loaded: its instructions are walked, and only those few are carried out
that a dictionary of tensors needs. Any other, and any name that is not torch's own for
a tensor, is an error.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "BoolStorage": "?",
    "BFloat16Storage": "<u2",
}
"""Of numbers, torch's name and numpy's; bfloat16 is widened after."""

MARK = object()


class _Name(NamedTuple):
    """A name in a pickle, which is not looked up."""

    module: str
    name: str


class _Storage(NamedTuple):
    """Numbers beside the pickle."""

    kind: str
    key: str


class _Call(NamedTuple):
    """A call that is understood and not made."""

    name: _Name
    args: tuple


def read_state(path: Path) -> dict[str, Any]:
    """Returns the tensors and numbers of a state dict, by name.

    Raises:
      FileNotFoundError: if there is no file.
      ValueError: if it is damaged, or holds something else than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}.")
    try:
        with zipfile.ZipFile(path) as file:
            (pickled,) = [x for x in file.namelist() if x.endswith("data.pkl")]
            found = _walked(file.read(pickled), path)
            folder = pickled.removesuffix("data.pkl")
            return {k: _value(file, folder, x, path) for k, x in found.items()}
    except (zipfile.BadZipFile, KeyError, IndexError, EOFError) as error:
        raise ValueError(
            f"{path} is no whole file of `torch.save`: {error}. Fetch it again."
        ) from error


def _walked(data: bytes, path: Path) -> dict[str, Any]:
    """Returns what a pickle describes, its few instructions carried out one by one."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for code, said, _ in pickletools.genops(data):
        name, arg = code.name, cast(Any, said)
        if name in ("PROTO", "FRAME", "STOP"):
            continue
        if name == "MARK":
            stack.append(MARK)
        elif name in PUSHED:
            stack.append(PUSHED[name](arg))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            words = arg.split(" ", 1) if name == "GLOBAL" else _popped(stack, 2)
            stack.append(_allowed(_Name(*words), path))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(arg)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(arg)])
        elif name in TUPLES:
            stack.append(tuple(_popped(stack, TUPLES[name])))
        elif name in ("TUPLE", "LIST"):
            stack.append(tuple(_to_mark(stack)))
        elif name == "REDUCE":
            called, args = _popped(stack, 2)
            stack.append(_called(called, args, path))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), path))
        elif name == "SETITEMS":
            items = _to_mark(stack)
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "SETITEM":
            key, value = _popped(stack, 2)
            stack[-1][key] = value
        elif name == "BUILD":
            stack.pop()  # attributes of an ordered dict: its metadata
        else:
            raise ValueError(_refused(path, f"the instruction {name}"))
    (found,) = stack
    if not isinstance(found, dict):
        raise ValueError(_refused(path, f"a {type(found).__name__}"))
    return found


PUSHED: dict[str, Any] = {
    **dict.fromkeys(
        ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINFLOAT", "BINSTRING"),
        lambda x: x,
    ),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "INT"), lambda x: x),
    "EMPTY_DICT": lambda _: {},
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: (),
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "NONE": lambda _: None,
}
"""Instructions that put something on the stack."""

TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _popped(stack: list[Any], count: int) -> list[Any]:
    found = stack[-count:]
    del stack[-count:]
    return found


def _to_mark(stack: list[Any]) -> list[Any]:
    start = len(stack) - 1 - stack[::-1].index(MARK)
    found = stack[start + 1 :]
    del stack[start:]
    return found


def _allowed(name: _Name, path: Path) -> _Name:
    known = (
        name == _Name("collections", "OrderedDict")
        or name == _Name("torch._utils", "_rebuild_tensor_v2")
        or name == _Name("torch._utils", "_rebuild_parameter")
        or (name.module == "torch" and name.name in STORAGES)
    )
    if not known:
        raise ValueError(_refused(path, f"{name.module}.{name.name}"))
    return name


def _called(called: Any, args: Any, path: Path) -> Any:
    if called == _Name("collections", "OrderedDict"):
        return {}
    if called == _Name("torch._utils", "_rebuild_parameter"):
        return args[0]
    if called == _Name("torch._utils", "_rebuild_tensor_v2"):
        return _Call(called, args)
    raise ValueError(_refused(path, f"a call of {called}"))


def _storage(said: Any, path: Path) -> _Storage:
    word, kind, key, *_ = said
    if word != "storage" or not isinstance(kind, _Name):
        raise ValueError(_refused(path, f"a reference to {word!r}"))
    return _Storage(kind.name, str(key))


def _value(file: zipfile.ZipFile, folder: str, x: Any, path: Path) -> Any:
    """Returns a tensor's numbers, or the number itself."""
    if isinstance(x, int | float | bool) or x is None:
        return x
    if not isinstance(x, _Call):
        raise ValueError(_refused(path, f"a {type(x).__name__} among its tensors"))
    storage, offset, shape, stride = x.args[:4]
    if any(n < 0 for n in (*shape, *stride, offset)):
        raise ValueError(f"{path} has a tensor of shape {shape}. Fetch it again.")
    kind = STORAGES[storage.kind]
    numbers = np.frombuffer(file.read(f"{folder}data/{storage.key}"), kind)
    if storage.kind == "BFloat16Storage":
        numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if shape and min(shape) > 0 and last >= len(numbers):
        raise ValueError(
            f"{path} has a tensor of shape {shape} and {len(numbers)} numbers for it. "
            "Fetch it again."
        )
    places = np.full(shape, offset, np.int64)
    for axis, (n, s) in enumerate(zip(shape, stride, strict=True)):
        along = [1] * len(shape)
        along[axis] = n
        places += s * np.arange(n).reshape(along)
    return numbers[places]


def _refused(path: Path, what: str) -> str:
    return (
        f"{path} holds {what}, which is not read: it is no plain dictionary of "
        "tensors, and nothing in it is run. Save its state dict alone."
    )
