"""A source is the same rows whatever file they are in, from any of them on."""

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import zstandard
from datasets import Dataset, DatasetDict

from influence.runtime.corpus.hub import Streamed
from influence.runtime.corpus.source import (
    LONGEST,
    check_source,
    documents,
    open_source,
    reread,
)
from tests.runtime.corpus.make import FORMATS, TABLES, TEXTS, write


def texts(source, **options):
    return [x.content for x in documents(source, **options)]


@pytest.mark.parametrize("name", FORMATS)
def test_a_source_is_its_rows_and_can_be_walked_again(tmp_path, name):
    source = open_source(write(tmp_path, name, "text", TEXTS))
    assert texts(source) == TEXTS
    assert texts(source) == TEXTS
    assert [x.place.row for x in documents(source)] == list(range(len(TEXTS)))
    assert check_source(source)[:2] == ("text", len(TEXTS))


@pytest.mark.parametrize("name", FORMATS)
def test_a_walk_can_begin_at_every_row(tmp_path, name):
    source = open_source(write(tmp_path, name, "text", TEXTS))
    whole = list(documents(source))
    for i, document in enumerate(whole):
        assert list(documents(source, document.place)) == whole[i:]


@pytest.mark.parametrize("name", FORMATS)
def test_a_place_leads_back_to_its_row(tmp_path, name):
    source = open_source(write(tmp_path, name, "text", TEXTS))
    places = [x.place for x in documents(source)]
    for which in ([0], [3], [0, 1, 5, 8], [2, 7], range(len(TEXTS))):
        found = list(reread(source, [places[i] for i in which]))
        assert found == [TEXTS[i] for i in which]


@pytest.mark.parametrize("name", TABLES)
def test_a_column_may_hold_token_ids_or_messages(tmp_path, name):
    ids = [[1, 2, 70000], [3]]
    source = open_source(write(tmp_path / "ids", name, "ids", ids), column="ids")
    assert [np.asarray(x).tolist() for x in texts(source)] == ids
    assert check_source(source) == ("token ids", 2, 70000)
    talks = [
        [{"role": "user", "content": "Hi"}],
        [{"role": "user", "content": "é"}, {"role": "assistant", "content": ""}],
    ]
    source = open_source(write(tmp_path / "talks", name, "said", talks), column="said")
    assert texts(source) == talks
    assert check_source(source).kind == "messages"


def test_a_folder_is_read_in_the_order_of_its_paths_without_what_is_hidden(tmp_path):
    for path in ("b/1.txt", "a/2.txt", "a/10.txt", ".git/x.txt", "a/.x.txt", "c.md"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(path)
    assert texts(open_source(tmp_path)) == ["a/10.txt", "a/2.txt", "b/1.txt", "c.md"]
    assert texts(open_source(tmp_path, pattern="a/*")) == ["a/10.txt", "a/2.txt"]
    assert open_source(tmp_path).name == tmp_path.name
    assert open_source(tmp_path, name="other").name == "other"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_the_rows_of_a_folder_of_tables_are_numbered_through(tmp_path, name):
    for i, part in enumerate((TEXTS[:4], TEXTS[4:])):
        write(tmp_path, f"{i}{name}", "text", part)
    source = open_source(tmp_path)
    whole = list(documents(source))
    assert [x.content for x in whole] == TEXTS
    assert [x.place.row for x in whole] == list(range(len(TEXTS)))
    assert list(documents(source, whole[6].place)) == whole[6:]
    assert list(reread(source, [whole[1].place, whole[7].place])) == [
        TEXTS[1],
        TEXTS[7],
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_the_fingerprint_is_of_the_data(tmp_path, name):
    one, same, other = (
        open_source(write(tmp_path / folder, name, "text", values))
        for folder, values in (
            ("one", TEXTS),
            ("same", TEXTS),
            ("other", [*TEXTS[:-1], "The end"]),
        )
    )
    assert one.fingerprint() == one.fingerprint()
    assert one.fingerprint() != other.fingerprint()
    if name != "saved":  # In its files the library writes where they came from.
        assert one.fingerprint() == same.fingerprint()


def test_a_file_that_was_renamed_changes_a_folder_s_fingerprint(tmp_path):
    path = write(tmp_path, "folder", "text", TEXTS)
    before = open_source(path).fingerprint()
    (path / "part0" / "00.anything").rename(path / "part0" / "000.anything")
    assert open_source(path).fingerprint() != before


def test_a_dataset_of_several_splits_needs_one_named(tmp_path):
    path = tmp_path / "splits"
    split = Dataset.from_dict({"text": ["a"]})
    DatasetDict({"train": split, "test": split}).save_to_disk(path)
    assert texts(open_source(path, split="test")) == ["a"]
    with pytest.raises(ValueError, match="no split None but 'train', 'test'. Name one"):
        open_source(path)
    DatasetDict({"only": split}).save_to_disk(tmp_path / "one")
    assert texts(open_source(tmp_path / "one")) == ["a"]


@pytest.mark.parametrize("name", TABLES)
def test_a_column_that_is_not_there_is_told_from_those_that_are(tmp_path, name):
    path = write(tmp_path, name, "body", TEXTS)
    with pytest.raises(ValueError, match="no column 'text'. There are 'n', 'body'"):
        check_source(open_source(path))


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_without_text_is_named_or_skipped(tmp_path, name):
    path = write(tmp_path, name, "text", ["a", "b", "", "d"])
    with pytest.raises(ValueError, match=r"row 2 of '\w+' .*: 'text' is empty"):
        check_source(open_source(path))
    found = list(documents(open_source(path), skip_empty=True))
    assert [(x.place.row, x.content) for x in found] == [(0, "a"), (1, "b"), (3, "d")]


def test_none_and_a_missing_key_are_no_text_either(tmp_path):
    rows = ['{"text": "a"}', '{"text": null}', '{"other": 1}', '{"text": []}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert texts(open_source(tmp_path / "a.jsonl"), skip_empty=True) == ["a"]
    for wrong in rows[1:]:
        (tmp_path / "b.jsonl").write_text(f"{rows[0]}\n{wrong}\n")
        with pytest.raises(ValueError, match="row 1 of 'b' .*, byte 14.* is empty"):
            check_source(open_source(tmp_path / "b.jsonl"))


def put(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


GOOD = json.dumps({"text": "good"}).encode() + b"\n"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            b'{"text": "a"}\n\n{"text": "b}\n',
            r"a\.jsonl, line 3, column 13: this is no",
        ),
        (
            b'{"text": "a"}\n{"text": "\xff"}\n',
            r"line 2: byte 24 \(0xff\) is not UTF-8",
        ),
        (b'[{"text": "a"}]', "line 1: this is no JSON object but b'"),
        (b'["' + b"x" * 5000 + b'"]', "longer than 1,600 bytes. The file is one JSON"),
        (GOOD + b"x" * 5000, "longer than 1,600 bytes. Cut it, or pass a larger"),
        (b"[" * 1500 + b"]" * 90, "is nested too deeply|is not JSON"),
        (GOOD + b'{"text": 3}', "row 1 .*: 'text' is of type int"),
        (GOOD + b'{"text": {"a": 1}}', "'text' is of type dict"),
        (GOOD + b'{"text": [1, 2]}', "row 1 .* holds token ids, rows before it text"),
        (b'{"text": [1, -2]}', "'text' has -2 at 1. Token ids are from 0"),
        (b'{"text": [1.5]}', r"'text' is a list that begins \[1\.5\]"),
        (b'{"text": [[1], [2]]}', "is a list that begins"),
        (b'{"text": [[1], [2, 3]]}', "is a list that begins"),
        (b'{"text": [1, "a"]}', "is a list that begins"),
        (b'{"text": [{"role": "user"}]}', "has a message 0 without role and content"),
        (b'{"text": "a\\ud83d"}', r"has half a character, '\\ud83d' at 1"),
        (GOOD + b'{"text": "' + b"y" * 101 + b'"}', "101 characters; .* at most 100"),
        (b"", "There are no documents in 'a'"),
        (b"\n\n", "There are no documents in 'a'"),
    ],
)
def test_a_bad_line_is_named_before_the_long_pass(tmp_path, data, said):
    source = open_source(put(tmp_path / "a.jsonl", data), longest=100)
    with pytest.raises(ValueError, match=said):
        check_source(source)


def test_a_text_that_is_not_utf_8_is_named_with_the_byte(tmp_path):
    put(tmp_path / "1.txt", "grün")
    put(tmp_path / "2.txt", "grün".encode("latin-1"))
    with pytest.raises(ValueError, match=r"2\.txt: byte 2 \(0xfc\) is not UTF-8"):
        check_source(open_source(tmp_path))


def test_a_text_too_long_is_not_even_read(tmp_path):
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes, more than a docu"):
        check_source(open_source(tmp_path / "a.txt"))


@pytest.mark.parametrize("cut", [10, 200])
def test_a_compressed_file_that_was_cut_short_is_no_shorter_corpus(tmp_path, cut):
    noise = np.random.default_rng(0).bytes(300).hex()
    data = json.dumps({"text": noise}).encode() + b"\n"
    for name, pack in (("gz", gzip.compress), ("zst", zstandard.compress)):
        path = put(tmp_path / f"a.jsonl.{name}", pack(data * 2)[:-cut])
        with pytest.raises(ValueError, match=f"a.jsonl.{name} is damaged or was cut"):
            check_source(open_source(path))
        put(path, b"\x00" + pack(data)[1:])
        with pytest.raises(ValueError, match=f"a.jsonl.{name} is damaged or was cut"):
            check_source(open_source(path))


def test_what_is_no_parquet_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.parquet is no whole Parquet file"):
        check_source(open_source(put(tmp_path / "a.parquet", b"PAR1 and no more")))


@pytest.mark.parametrize(
    ("place", "error", "said"),
    [
        ("no/such.jsonl", FileNotFoundError, "no file or folder 'no/such.jsonl'"),
        ("./no such", FileNotFoundError, "and it is no name of a dataset"),
        ("a.csv", ValueError, r"a\.csv is of no kind that can be read"),
        ("empty", FileNotFoundError, "no file like '\\*' in empty"),
        ("mixed", ValueError, "mixed has files of several kinds"),
    ],
)
def test_what_is_not_there_or_unknown_is_said(
    tmp_path, monkeypatch, place, error, said
):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "a.csv", "text\na\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for name in ("a.jsonl", "README.md"):
        put(tmp_path / "mixed" / name, GOOD)
    with pytest.raises(error, match=said):
        open_source(place)


def streamed(column="text"):
    rows = Dataset.from_dict({"n": range(len(TEXTS)), "text": TEXTS})
    return Streamed(
        "owner/name", column, "sha", "all train", rows.to_iterable_dataset(), LONGEST
    )


def test_a_stream_is_its_rows_from_any_of_them_on():
    source = streamed()
    whole = list(documents(source))
    assert [x.content for x in whole] == TEXTS
    assert list(documents(source, whole[5].place)) == whole[5:]
    assert list(reread(source, [whole[i].place for i in (1, 8)])) == [
        TEXTS[1],
        TEXTS[8],
    ]
    assert source.fingerprint() == "sha all train"
    assert source.where(whole[3].place) == "row 3 of 'owner/name' (at sha)"
    with pytest.raises(
        ValueError, match="'owner/name' has no column 'a'. There are 'n'"
    ):
        check_source(streamed("a"))


def test_a_stream_is_looked_at_no_further_than_asked():
    seen = []
    assert check_source(streamed(), rows=3, look=seen.append).documents == 3
    assert seen == TEXTS[:3]


def test_a_dataset_that_can_t_be_reached_is_said_so():
    script = (
        "from influence.runtime.corpus.source import open_source\n"
        "try: open_source('owner/no-such-dataset')\n"
        "except FileNotFoundError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert "'owner/no-such-dataset' is no file or folder here, and as" in done.stdout


def test_a_row_that_is_gone_is_said_so(tmp_path):
    path = write(tmp_path, "a.jsonl", "text", TEXTS)
    source = open_source(path)
    place = list(documents(source))[1].place
    put(path, path.read_bytes().replace(TEXTS[1].encode(), b""))
    with pytest.raises(ValueError, match="is empty now: the data changed"):
        list(reread(source, [place]))
    folder = open_source(write(tmp_path, "folder", "text", TEXTS))
    *_, last = documents(folder)
    (tmp_path / "folder" / "part0" / "00.anything").unlink()
    with pytest.raises(FileNotFoundError, match="no longer has a file number 8"):
        list(reread(folder, [last.place]))
