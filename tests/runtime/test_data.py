"""The corpus is all of the text, in pieces a model can take, under stable names."""

import ast

import pytest

from influence.runtime.data import (
    Text,
    cut,
    digest,
    divides,
    read_modules,
    split,
    train_tokenizer,
)
from influence.runtime.demo import MODULES
from influence.runtime.questions import IDIOMS, PASSAGES

TEXTS = read_modules(["bisect", "stat", "this"])
TOKENIZER = train_tokenizer(TEXTS, 400)


@pytest.mark.parametrize("text", TEXTS, ids=lambda x: x.id)
@pytest.mark.parametrize("longest", [16, 64])
def test_the_pieces_of_a_module_are_the_module(text, longest):
    sequences = cut(text, TOKENIZER, longest)
    found = "".join("".join(x.pieces) for x in sequences)
    # Only stretches of white space between pieces are left out.
    assert "".join(found.split()) == "".join(text.text.split())
    assert all(0 < len(x.tokens) <= longest for x in sequences)
    assert all(len(x.tokens) == len(x.pieces) for x in sequences)
    assert len({x.id for x in sequences}) == len(sequences)


def test_a_name_leads_back_to_the_line():
    for x in cut(TEXTS[0], TOKENIZER, 64):
        module, line = x.id.split(":")
        assert module == "bisect"
        lines = TEXTS[0].text.splitlines(keepends=True)
        rest = "".join(lines[int(line.split(".")[0]) - 1 :])
        assert rest.startswith("".join(x.pieces)) or "." in line


def test_functions_begin_sequences():
    sequences = cut(TEXTS[1], TOKENIZER, 64)
    starts = {int(x.id.split(":")[1].split(".")[0]) for x in sequences}
    functions = [
        x.lineno
        for x in ast.parse(TEXTS[1].text).body
        if isinstance(x, ast.FunctionDef)
    ]
    # All but those that follow a piece too short to stand alone.
    assert len([x for x in functions if x in starts]) > 0.8 * len(functions)


def test_a_line_too_long_is_cut_within():
    text = Text("long", "x = '" + "ab " * 200 + "'\n")
    sequences = cut(text, TOKENIZER, 16)
    assert "".join("".join(x.pieces) for x in sequences) == text.text
    assert [x.id for x in sequences][:2] == ["long:1.1", "long:1.2"]


def test_characters_of_several_tokens_are_shown_once():
    text = Text("accents", "s = 'é…𝄞'\n")
    (sequence,) = cut(text, TOKENIZER, 64)
    assert "".join(sequence.pieces) == text.text


def test_the_same_text_has_the_same_digest():
    assert digest(TEXTS) == digest(read_modules(["bisect", "stat", "this"]))
    assert digest(TEXTS) != digest(TEXTS[:2])


def test_a_prompt_is_split_where_a_token_ends():
    prompt, completion = split(TOKENIZER, "def S_ISREG(mode):", "\n    return")
    assert TOKENIZER.decode(prompt) == "def S_ISREG(mode):"
    assert TOKENIZER.decode(completion) == "\n    return"
    whole = TOKENIZER.encode("def S_ISREG(mode):\n    return").ids
    assert [*prompt, *completion] == whole
    # Four spaces and a word are one token too many for this border.
    assert not divides(TOKENIZER, "def S_ISREG(mode):\n  ", "  return")
    with pytest.raises(ValueError, match="leave white space to the completion"):
        split(TOKENIZER, "def S_ISREG(mode):\n  ", "  return")
    with pytest.raises(ValueError, match="no tokens of its own"):
        split(TOKENIZER, "def", "")


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="'no_such_module' has no source in"):
        read_modules(["no_such_module"])


def test_every_module_of_the_demo_is_there():
    assert len(read_modules(MODULES)) == len(set(MODULES))


def test_this_python_s_library_has_enough_to_ask_about():
    texts = [x.text for x in read_modules(MODULES[:8])]
    passages = [x for x in PASSAGES if any(x.prompt + x.completion in y for y in texts)]
    idioms = [
        x for x in IDIOMS if sum(x.prompt + x.completion in y for y in texts) >= 2
    ]
    assert len(passages) >= 3
    assert len(idioms) >= 3
