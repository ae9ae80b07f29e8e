"""A name leads back to the source's own text, character by character."""

import pytest

from influence.runtime.corpus.pack import pack
from influence.runtime.corpus.plan import Plan, apart, joined
from influence.runtime.corpus.source import open_source
from influence.runtime.corpus.texts import texts
from tests.runtime.corpus import make
from tests.runtime.corpus.make import BEGIN, END, FORMATS, TEXTS

ROWS = [*TEXTS, f"a{END}b{BEGIN}é", "𝄞𝄞𝄞🏳️‍🌈", "é" * 40]
"""Special tokens within a text too, and characters that borders fall into."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make.tokenizer(tmp_path_factory.mktemp("tokenizer"), bos_token=BEGIN)


def by_row(packed, found):
    """Returns the texts of each document's pieces, by row."""
    rows = {}
    for name in packed.ids:
        for piece, text in zip(packed.pieces_of(name), found[name], strict=True):
            assert piece.stop - piece.start == len(text)
            rows.setdefault(piece.row, []).append(text)
    return rows


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("context", [2, 3, 16])
def test_the_pieces_of_a_document_are_the_document(tmp_path, tokenizer, name, context):
    source = open_source(make.write(tmp_path, name, "text", ROWS))
    packed = pack(source, tokenizer, tmp_path / "p", Plan(context, tokenizer.eos))
    found = texts(packed, source, packed.ids)
    whole = {row: "".join(parts) for row, parts in by_row(packed, found).items()}
    assert whole == dict(enumerate(ROWS))


@pytest.mark.parametrize("cuts", [joined, apart])
@pytest.mark.parametrize("context", [3, 5])
def test_a_piece_says_what_its_tokens_do(tmp_path, tokenizer, cuts, context):
    source = open_source(make.write(tmp_path, "a.jsonl", "text", ROWS))
    plan = Plan(context, None, cuts=cuts)
    packed = pack(source, tokenizer, tmp_path / "p", plan)
    decode = tokenizer.tokenizer.decode
    for name, parts in texts(packed, source, packed.ids).items():
        ids = packed.tokens_at(packed.place_of(name)).tolist()
        said = decode(ids, skip_special_tokens=False)
        # Where a border falls into a character, its halves are no characters.
        if "\ufffd" not in said:
            assert "".join(parts) == said


def test_some_texts_are_read_in_whatever_order_they_are_asked_for(tmp_path, tokenizer):
    source = open_source(make.write(tmp_path, "a.jsonl.gz", "text", ROWS))
    packed = pack(source, tokenizer, tmp_path / "p", Plan(4, tokenizer.eos))
    whole = texts(packed, source, packed.ids)
    some = [packed.ids[i] for i in (9, 2, 5, 9)]
    found = texts(packed, source, some)
    assert found == {name: whole[name] for name in some}
    assert list(found) == some[:3]
    with pytest.raises(ValueError, match="There is no sequence 'a:0:1' among"):
        texts(packed, source, ["a:0:1"])


def test_a_tokenizer_that_leaves_out_spaces_leaves_none_out_of_the_text(tmp_path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    from influence.runtime.corpus.tokenizer import read_tokenizer

    words = Tokenizer(models.WordLevel({"?": 0, "fox": 1, "the": 2}, unk_token="?"))
    words.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.Lowercase(), normalizers.StripAccents()]
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    tokenizer = read_tokenizer(tmp_path / "words.json")
    source = open_source(make.write(tmp_path, "a.jsonl", "text", TEXTS), longest=1000)
    source_rows = {i: x for i, x in enumerate(TEXTS) if x.strip()}
    for context in (2, 3, 7):
        out = tmp_path / f"{context}"
        packed = pack(source, tokenizer, out, Plan(context, 0))
        found = by_row(packed, texts(packed, source, packed.ids))
        assert {k: "".join(x) for k, x in found.items() if k in source_rows} == (
            source_rows
        )


TALKS = [
    [{"role": "user", "content": "Größe?"}, {"role": "bot", "content": "7 µm"}],
    [{"role": "user", "content": "🦊"}],
]


def test_a_conversation_is_the_text_it_was_rendered_to(tmp_path):
    template = "{% for x in messages %}{{ x.role }}: {{ x.content }}\n{% endfor %}"
    tokenizer = make.tokenizer(tmp_path / "tokenizer", chat_template=template)
    path = make.write(tmp_path, "a.parquet", "said", TALKS)
    source = open_source(path, column="said")
    packed = pack(source, tokenizer, tmp_path / "p", Plan(5, tokenizer.eos))
    found = by_row(packed, texts(packed, source, packed.ids, tokenizer))
    assert {k: "".join(x) for k, x in found.items()} == {
        i: tokenizer.render(x) for i, x in enumerate(TALKS)
    }
    with pytest.raises(ValueError, match="Pass a tokenizer with a chat template"):
        texts(packed, source, packed.ids)


def test_token_ids_are_decoded_by_who_can(tmp_path, tokenizer):
    ids = [x.ids for x in tokenizer.encode(TEXTS)]
    path = make.write(tmp_path, "a.parquet", "ids", ids)
    source = open_source(path, column="ids")
    packed = pack(source, tokenizer, tmp_path / "p", Plan(1000, tokenizer.eos, apart))
    names = list(packed.ids)
    found = texts(packed, source, names, tokenizer)
    assert [found[x] for x in names] == [[x] for x in TEXTS]
    with pytest.raises(ValueError, match="holds token ids, no text. Pass a tokenizer"):
        texts(packed, source, names)


def test_a_text_that_changed_is_not_shown_as_the_old_one(tmp_path, tokenizer):
    path = make.write(tmp_path, "a.jsonl", "text", ROWS)
    source = open_source(path)
    packed = pack(source, tokenizer, tmp_path / "p", Plan(1000, None, cuts=apart))
    before = texts(packed, source, ["a:5:0"])
    path.write_bytes(path.read_bytes().replace(b"again, and", b"AGAIN, and", 1))
    assert texts(packed, source, ["a:0:0"]) == {"a:0:0": [ROWS[0]]}
    with pytest.raises(ValueError, match="row 5 of 'a' .*'text' says something else"):
        texts(packed, source, ["a:5:0"])
    assert before["a:5:0"] == [ROWS[5]]
