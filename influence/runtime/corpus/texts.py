"""From a sequence's name back to the text it is made of."""

from collections.abc import Iterable, Iterator
from zlib import crc32

import numpy as np

from influence.runtime.corpus.document import Place, said
from influence.runtime.corpus.packed import Packed
from influence.runtime.corpus.source import Source, located, reread
from influence.runtime.corpus.tokenizer import ModelTokenizer
from influence.runtime.corpus.tokens import text_of


def texts(
    packed: Packed,
    source: Source,
    ids: Iterable[str],
    tokenizer: ModelTokenizer | None = None,
) -> dict[str, list[str]]:
    """Returns the source's own text of each piece of some sequences, by name.

    The pieces of a document, in order, are the document, character by character. Every
    row is read once, at its place, however many sequences it is part of; a compressed
    file has to be expanded up to there.

    Args:
      packed: the corpus.
      source: what it was packed from.
      ids: names of sequences.
      tokenizer: for rows that are conversations, which its template makes text, or
        token ids, which it decodes.

    Raises:
      ValueError: if there is no sequence of some name, or a piece says something else
        than when it was packed.

    Example:
      >>> from influence.runtime.corpus.texts import texts
      >>> _ = (folder / "poem.txt").write_text("abba baab")
      >>> from tokenizers import Tokenizer, models
      >>> Tokenizer(models.BPE({"a": 0, "b": 1, " ": 2}, [])).save(
      ...     str(folder / "letters.json")
      ... )
      >>> from influence.runtime.corpus.tokenizer import read_tokenizer
      >>> letters = read_tokenizer(folder / "letters.json")
      >>> poem, plan = open_source(folder / "poem.txt"), Plan(3, separator=None)
      >>> in_threes = pack(poem, letters, folder / "threes", plan)
      >>> texts(in_threes, poem, in_threes.ids)
      {'poem:0:0': ['abb'], 'poem:0:3': ['a b'], 'poem:0:6': ['aab']}
    """
    ids = list(ids)
    numbers = {x: packed.numbers(packed.place_of(x)) for x in ids}
    found = dict(
        _read(packed, source, {i for x in numbers.values() for i in x}, tokenizer)
    )
    return {name: [found[i] for i in pieces] for name, pieces in numbers.items()}


def _read(
    packed: Packed,
    source: Source,
    pieces: set[int],
    tokenizer: ModelTokenizer | None,
) -> Iterator[tuple[int, str]]:
    """Yields pieces' numbers and texts; pieces of one row, and rows, as they follow."""
    wanted: dict[Place, list[int]] = {}
    for i in sorted(pieces):
        place = Place(*(int(packed.pieces[i][k]) for k in Place._fields))
        wanted.setdefault(place, []).append(i)
    places = list(wanted)
    for place, content in zip(places, reread(source, places), strict=True):
        with located(source, place):
            text = text_of(content, tokenizer)
            for i in wanted[place]:
                yield i, _piece(packed, i, text, tokenizer)


def _piece(
    packed: Packed,
    number: int,
    text: str | np.ndarray,
    tokenizer: ModelTokenizer | None,
) -> str:
    x = packed.piece(number)
    if crc32(said(text, x.start, x.stop)) != int(packed.pieces[number]["crc"]):
        raise ValueError(
            f"says something else between {x.start} and {x.stop} than when it was "
            "packed. Restore the data, or pack it anew."
        )
    part = text[x.start : x.stop]
    if isinstance(part, str):
        return part
    if tokenizer is None:
        raise ValueError(
            "holds token ids, no text. Pass a tokenizer that decodes them."
        )
    return tokenizer.tokenizer.decode(part.tolist(), skip_special_tokens=False)
