"""Text that is on every machine: Python's own standard library.

Each module is cut where its functions and classes begin, long ones at line ends, into
sequences of at most so many tokens, named `module:line`.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SHORTEST = 16
"""Pieces of fewer tokens are joined to the next; one at the end stays as it is."""


class Text(NamedTuple):
    """A named text."""

    id: str
    text: str


class Sequence(NamedTuple):
    """A piece of a text that a model is trained on.

    Attributes:
      id: `text:line`.
      tokens: its token ids.
      pieces: the text of each token; together the text of the sequence.
    """

    id: str
    tokens: list[int]
    pieces: list[str]


def read_modules(modules: Iterable[str]) -> list[Text]:
    """Returns the source of standard-library modules.

    Raises:
      FileNotFoundError: naming the module and where it was looked for.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for name in modules:
        place = folder.joinpath(*name.split("."))
        paths = [place.with_name(place.name + ".py"), place / "__init__.py"]
        path = next((x for x in paths if x.is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"The standard library's module {name!r} has no source in {folder}. "
                "The demo reads the library's text; use a Python that has it as files."
            )
        found.append(Text(name, path.read_text(encoding="utf-8")))
    return found


def digest(texts: Iterable[Text]) -> str:
    """Returns a SHA-256 of all ids and texts."""
    state = hashlib.sha256()
    for id_, text in texts:
        state.update(f"{id_}\0{text}\0".encode())
    return state.hexdigest()


def train_tokenizer(texts: Iterable[Text], vocabulary: int) -> Tokenizer:
    """Returns a byte-level byte-pair tokenizer trained on texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((x.text for x in texts), trainer)
    return tokenizer


def cut(module: Text, tokenizer: Tokenizer, longest: int) -> list[Sequence]:
    """Returns a module in sequences of at most `longest` tokens.

    A sequence begins where a function or class does, unless what came before it is
    shorter than `SHORTEST`; one that is too long goes on in further sequences, cut at
    line ends, or within a line if the line alone is too long.
    """
    found: list[Sequence] = []
    starts, first, text = _definitions(module.text), 1, ""

    def tokens(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    def close() -> None:
        if text.strip():
            whole = _encoded(tokenizer, f"{module.id}:{first}", text)
            found.extend(_parts(whole, longest))

    for number, line in enumerate(module.text.splitlines(keepends=True), 1):
        begins = number in starts and len(tokens(text)) >= SHORTEST
        if text and (begins or len(tokens(text + line)) > longest):
            close()
            text = ""
        first, text = (first, text + line) if text else (number, line)
    close()
    return found


def split(
    tokenizer: Tokenizer, prompt: str, completion: str
) -> tuple[list[int], list[int]]:
    """Returns the token ids of a prompt and its completion, encoded as one text.

    Encoded apart, they would fall into tokens the model never saw side by side.

    Raises:
      ValueError: if a token reaches across the end of the prompt, or one part is empty.
    """
    if not divides(tokenizer, prompt, completion):
        raise ValueError(
            f"The prompt {prompt!r} does not end where a token of "
            f"{prompt + completion!r} does, so the completion has no tokens of its "
            "own. Move the border: leave white space to the completion."
        )
    encoding = tokenizer.encode(prompt + completion)
    border = [end for _, end in encoding.offsets].index(len(prompt)) + 1
    return encoding.ids[:border], encoding.ids[border:]


def divides(tokenizer: Tokenizer, prompt: str, completion: str) -> bool:
    """Returns whether a token ends where the prompt does, with one before and after."""
    ends = [end for _, end in tokenizer.encode(prompt + completion).offsets]
    return bool(prompt) and bool(completion) and len(prompt) in ends[:-1]


def _encoded(tokenizer: Tokenizer, name: str, text: str) -> Sequence:
    """Returns a text as a sequence.

    A character may be several tokens; its text goes to the first of them.
    """
    encoding = tokenizer.encode(text)
    pieces, reached = [], 0
    for _, end in encoding.offsets:
        pieces.append(text[reached:end])
        reached = max(reached, end)
    return Sequence(name, encoding.ids, pieces)


def _parts(whole: Sequence, longest: int) -> Iterator[Sequence]:
    """Yields a sequence whole if short enough, or in parts, `id.1`, `id.2`."""
    if len(whole.tokens) <= longest:
        yield whole
        return
    for part, start in enumerate(range(0, len(whole.tokens), longest), 1):
        place = slice(start, start + longest)
        yield Sequence(f"{whole.id}.{part}", whole.tokens[place], whole.pieces[place])


def _definitions(source: str) -> set[int]:
    """Returns the lines on which functions and classes begin, decorators included."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {
        min([node.lineno, *(x.lineno for x in node.decorator_list)])
        for node in ast.walk(ast.parse(source))
        if isinstance(node, kinds)
    }
