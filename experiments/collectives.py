"""What a compiled program sends between devices, read from its text."""

import re
from dataclasses import dataclass

import numpy as np

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "collective-broadcast",
    "ragged-all-to-all",
)

LINE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\((.*)")
SHAPE = re.compile(r"[a-z]+[0-9]*\[[\d,]*\]")
LISTED = re.compile(r"replica_groups=\{(\{.*?\})\}")
COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
NAMED = re.compile(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? "
    r"\{(.*?)\}"
)


@dataclass(frozen=True, order=True)
class Collective:
    """Something that is sent.

    Attributes:
      kind: one of `KINDS`.
      shape: of the result, as the compiler writes it.
      data: whether it goes between devices of different rows of the mesh.
      model: whether it goes between devices of one row.
    """

    kind: str
    shape: str
    data: bool
    model: bool


def collectives(text: str, rows: int, columns: int) -> list[Collective]:
    """Returns what a program sends, of a mesh of so many rows and columns.

    Raises:
      ValueError: if the text says in an unknown way who sends to whom.
    """
    found = []
    for line in text.splitlines():
        if match := LINE.search(line):
            shapes, kind, rest = match.groups()
            pairs = [np.asarray(x) for x in groups(rest, rows * columns)]
            found.append(
                Collective(
                    kind,
                    " ".join(SHAPE.findall(shapes)),
                    data=any(len(set(x // columns)) > 1 for x in pairs),
                    model=any(len(set(x % columns)) > 1 for x in pairs),
                )
            )
    return found


def groups(text: str, count: int) -> list[list[int]]:
    """Returns which devices send to one another, from an instruction's text.

    Raises:
      ValueError: if the text says so in an unknown way.
    """
    if match := COUNTED.search(text):
        shape, dims, order = (_numbers(x) for x in match.groups())
        ids = np.arange(int(np.prod(dims))).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape).tolist()
    if match := NAMED.search(text):
        sizes = dict(x.replace("'", "").split("=") for x in match[1].split(","))
        names, own = list(sizes), match[4].replace("'", "").split(",")
        ids = np.arange(count)
        if match[2]:
            ids = ids.reshape(_numbers(match[2])).transpose(_numbers(match[3]))
        ids = ids.reshape([int(x) for x in sizes.values()])
        last = [names.index(x.strip()) for x in own]
        each = int(np.prod([ids.shape[i] for i in last]))
        rest = [i for i in range(ids.ndim) if i not in last]
        return ids.transpose(*rest, *last).reshape(-1, each).tolist()
    if match := LISTED.search(text):
        return [_numbers(x) for x in re.findall(r"\{([\d,]*)\}", match[1])]
    if "source_target_pairs=" in text:
        said = text.split("source_target_pairs=")[1]
        return [[int(x), int(y)] for x, y in re.findall(r"\{(\d+),(\d+)\}", said)]
    if "replica_groups={}" in text:
        return [list(range(count))]
    raise ValueError(
        f"It is not known who sends to whom in {text[:200]!r}. Teach `groups` that."
    )


def _numbers(text: str | None) -> list[int]:
    return [int(x) for x in text.split(",")] if text else []
