"""Packs a corpus: one walk over its documents, written as it goes, resumed if stopped.

What is written grows chunk by chunk, each ending with a document. A chunk gets its line
in the list of chunks, with its checksums, only when it is on the disk; whatever is
behind the last one is cut off when packing goes on. So the files are the same to the
byte however often it was stopped.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zlib import crc32

import numpy as np

from influence.runtime.corpus.document import BEGINNING, Place, said
from influence.runtime.corpus.packed import (
    CHUNKS,
    FILES,
    PIECE,
    Packed,
    check_chunks,
    digest,
    file_of,
    kinds,
    read_packed,
)
from influence.runtime.corpus.plan import Cut, Plan
from influence.runtime.corpus.source import Source, check_source, documents
from influence.runtime.corpus.tokenizer import ModelTokenizer
from influence.runtime.corpus.tokens import Tokens, packable, tokenised
from influence.runtime.store import MANIFEST, Run, signed, unsigned

TAIL = 4096
"""More bytes than a line of the list of chunks has."""

FIRST = 100
"""How many documents are looked at before packing, if to read all would be the pass."""


class Totals(NamedTuple):
    """What was packed so far.

    Attributes:
      tokens: how many, in all sequences.
      pieces: how many stretches of one document within one sequence.
      sequences: how many.
      documents: how many were read.
      left_out: how many tokens were left over alone.
      last: where the last of the documents is.
    """

    tokens: int = 0
    pieces: int = 0
    sequences: int = 0
    documents: int = 0
    left_out: int = 0
    last: Place = BEGINNING


def pack(
    source: Source,
    tokenizer: ModelTokenizer | None,
    folder: str | Path,
    plan: Plan,
    *,
    watch: Callable[[Totals], object] = lambda _: None,
) -> Packed:
    """Packs a corpus into a folder, or goes on with what was begun there.

    Every row is looked at before the first is packed. Memory does not grow with the
    corpus: a group of documents is held as text and tokens, nothing else.

    Args:
      source: the documents.
      tokenizer: makes them token ids; None if they are.
      folder: where to.
      plan: how.
      watch: is told after every document what was packed so far.

    Raises:
      FileExistsError: if the folder holds something else.
      ValueError: if a row is not good enough, naming it; if the folder holds another
        corpus or one packed otherwise; if the data changed since it was begun.

    Example:
      >>> from influence.runtime.corpus.pack import pack
      >>> from influence.runtime.corpus.plan import Plan, apart
      >>> each = Plan(context=5, separator=None, cuts=apart)
      >>> by_text = pack(source, None, folder / "by text", each)
      >>> print(by_text.ids[1], by_text.tokens_at(1))
      corpus:0:5 [6 7]
    """
    run, begun = Run(Path(folder)), _about(source, tokenizer, plan)
    if run.path(MANIFEST).is_file():
        _check_same(run, begun)
    else:
        checked = _looked_at(source, tokenizer, plan)
        packages = {name: version(name) for name in ("influence", "tokenizers")}
        Run.create(
            run.folder, {**begun, **checked, "packages": packages, "done": False}
        )
    if not run.manifest["done"]:
        totals = _write(run, source, tokenizer, plan, watch)
        _finish(run, source, totals)
    return read_packed(run.folder)


def _about(
    source: Source, tokenizer: ModelTokenizer | None, plan: Plan
) -> dict[str, Any]:
    """Returns all that the files depend on."""
    return {
        "job": "corpus",
        "name": source.name,
        "column": source.column,
        "fingerprint": source.fingerprint(),
        "tokenizer": None if tokenizer is None else tokenizer.sha256,
        "plan": plan.about,
    }


def _check_same(run: Run, about: dict[str, Any]) -> None:
    found = run.manifest
    if found.get("job") != "corpus":
        raise FileExistsError(
            f"{run.folder} holds a run of another kind. Name another folder."
        )
    if found["fingerprint"] != about["fingerprint"]:
        raise ValueError(
            f"The data of {about['name']!r} changed since {run.folder} was begun "
            f"(fingerprint {found['fingerprint'][:12]} then, "
            f"{about['fingerprint'][:12]} now). Restore it, or pack it into another "
            "folder."
        )
    was, now = ({**x, **x["plan"]} for x in (found, about))
    for key in now:
        if key not in ("plan", "chunk") and was.get(key) != now[key]:
            raise ValueError(
                f"The corpus in {run.folder} was packed with {key} {was.get(key)!r}, "
                f"not {now[key]!r}. Name another folder, or delete this one."
            )


def _looked_at(
    source: Source, tokenizer: ModelTokenizer | None, plan: Plan
) -> dict[str, Any]:
    """Returns what a walk over all rows tells, or over the first if it takes long."""
    separator = -1 if plan.separator is None else plan.separator
    if tokenizer is not None and separator >= tokenizer.size:
        raise ValueError(
            f"The separator {separator} is none of the tokenizer's {tokenizer.size} "
            "ids. Take `tokenizer.separator`, or None for nothing."
        )
    rows = None if source.here else FIRST
    look = partial(packable, tokenizer=tokenizer, plan=plan)
    found = check_source(source, skip_empty=plan.skip_empty, rows=rows, look=look)
    largest = found.largest if rows is None else 2**32 - 1
    if tokenizer is not None:
        largest = tokenizer.size - 1
    largest = max(largest, separator)
    return {
        "kind": found.kind,
        "documents": found.documents if rows is None else None,
        "dtype": "<u2" if largest < 2**16 else "<u4",
    }


def _write(
    run: Run,
    source: Source,
    tokenizer: ModelTokenizer | None,
    plan: Plan,
    watch: Callable[[Totals], object],
) -> Totals:
    """Packs what is not yet packed, and returns what then is."""
    dtype = kinds(run.manifest["dtype"])[0]
    totals = committed = _committed(run)
    rows = documents(source, totals.last, skip_empty=plan.skip_empty)
    # Going on, the first document is the last that was packed.
    rows = islice(rows, int(totals.documents > 0), None)
    with ExitStack() as stack:
        files = [stack.enter_context(x) for x in _opened(run, dtype, totals)]
        for document in tokenised(source, rows, tokenizer, plan):
            totals = _append(files, dtype, totals, document, plan)
            watch(totals)
            if totals.tokens - committed.tokens >= plan.chunk:
                committed = _commit(run, files, dtype, committed, totals)
        if totals.documents > committed.documents:
            _commit(run, files, dtype, committed, totals)
    return totals


def _committed(run: Run) -> Totals:
    """Returns what the last line of the list of chunks says; cuts off half a line.

    Raises:
      ValueError: if what was packed is damaged.
    """
    path = run.path(CHUNKS)
    path.touch()
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, end - TAIL))
        *lines, torn = file.read().split(b"\n")
        file.truncate(end - len(torn))
    if start == end or not lines:
        return Totals()
    check_chunks(run)
    found = unsigned(lines[-1], path)
    found = Totals(**{k: found[k] for k in Totals._fields})
    return found._replace(last=Place(*found.last))


def _opened(run: Run, dtype: np.dtype, totals: Totals) -> Iterator[BinaryIO]:
    """Yields the files, without what was written but not committed."""
    for name, kind in zip(FILES, kinds(dtype), strict=True):
        path = file_of(run, name)
        path.touch()
        os.truncate(path, getattr(totals, name) * kind.itemsize)
        yield path.open("ab")


def _append(
    files: list[BinaryIO], dtype: np.dtype, totals: Totals, document: Tokens, plan: Plan
) -> Totals:
    """Writes one document, cut as planned."""
    tokens, pieces, sequences = files
    cuts = list(plan.cuts(plan.context, totals.tokens, len(document.ids)))
    begins = [i for i, cut in enumerate(cuts) if cut.begins]
    tokens.write(
        np.concatenate([document.ids[x.start : x.stop] for x in cuts] or [[]])
        .astype(dtype)
        .tobytes()
    )
    pieces.write(_pieces(document, cuts, totals.tokens).tobytes())
    sequences.write((np.array(begins, "<i8") + totals.pieces).tobytes())
    kept = sum(x.stop - x.start for x in cuts)
    return Totals(
        tokens=totals.tokens + kept,
        pieces=totals.pieces + len(cuts),
        sequences=totals.sequences + len(begins),
        documents=totals.documents + 1,
        left_out=totals.left_out + len(document.ids) - kept,
        last=document.place,
    )


def _pieces(document: Tokens, cuts: list[Cut], first: int) -> np.ndarray:
    """Returns a document's pieces; `first` is the place of its first token."""
    found = np.zeros(len(cuts), PIECE)
    reached = 0
    for x, cut in zip(found, cuts, strict=True):
        start = max(reached, document.covered(cut.start))
        reached = max(start, document.covered(cut.stop))
        x["first"] = first + cut.start
        x["row"], x["file"], x["at"] = document.place
        x["offset"], x["start"], x["stop"] = cut.start, start, reached
        x["crc"] = crc32(said(document.content, start, reached))
    return found


def _commit(
    run: Run, files: list[BinaryIO], dtype: np.dtype, before: Totals, totals: Totals
) -> Totals:
    """Writes the line of what was written since, once that is on the disk."""
    sums = {}
    for file, name, kind in zip(files, FILES, kinds(dtype), strict=True):
        file.flush()
        os.fsync(file.fileno())
        start, stop = (getattr(x, name) * kind.itemsize for x in (before, totals))
        sums[name] = digest(file_of(run, name), start, stop)
    line = json.dumps(signed({**totals._asdict(), "sha256": sums}))
    with run.path(CHUNKS).open("ab") as chunks:
        chunks.write(f"{line}\n".encode())
        chunks.flush()
        os.fsync(chunks.fileno())
    return totals


def _finish(run: Run, source: Source, totals: Totals) -> None:
    """Says that all is packed."""
    if source.fingerprint() != run.manifest["fingerprint"]:
        raise ValueError(
            f"The data of {source.name!r} changed while it was packed. Delete "
            f"{run.folder} and pack it again."
        )
    # One token alone in the last sequence predicts nothing.
    single = int(_last_length(run, totals) == 1)
    sequences = totals.sequences - single
    if not sequences:
        raise ValueError(
            f"There are no sequences in {source.name!r}: its {totals.documents} "
            "documents have one token each at most."
        )
    run.note(
        tokens=totals.tokens,
        pieces=totals.pieces,
        sequences=totals.sequences,
        used=sequences,
        left_out=totals.left_out + single,
        done=True,
    )


def _last_length(run: Run, totals: Totals) -> int:
    """Returns how many tokens the last sequence has."""
    if not totals.sequences:
        return 0
    (piece,) = np.fromfile(
        file_of(run, "sequences"), "<i8", 1, offset=8 * (totals.sequences - 1)
    )
    offset = int(piece) * PIECE.itemsize
    (last,) = np.fromfile(file_of(run, "pieces"), PIECE, 1, offset=offset)
    return totals.tokens - int(last["first"])
