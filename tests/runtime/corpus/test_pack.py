"""Packed is every token of every document once; stopped anywhere, the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from itertools import pairwise
from textwrap import dedent

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from influence.runtime.corpus.hub import Streamed
from influence.runtime.corpus.pack import pack
from influence.runtime.corpus.packed import check_packed, read_packed
from influence.runtime.corpus.plan import Plan, apart, joined
from influence.runtime.corpus.source import open_source
from influence.runtime.corpus.tokenizer import read_tokenizer
from influence.runtime.store import Run
from tests.cases import thinned
from tests.runtime.corpus import make
from tests.runtime.corpus.make import BEGIN, END, FORMATS, TABLES, TEXTS

FILES = [f"{x}.bin" for x in ("tokens", "pieces", "sequences")]
FILES += ["chunks.jsonl", "manifest.json"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make.tokenizer(tmp_path_factory.mktemp("tokenizer"), bos_token=BEGIN)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = make.write(tmp_path_factory.mktemp("source"), "a.jsonl", "text", TEXTS)
    return open_source(path)


def encoded(tokenizer, special=False):
    return [x.ids for x in tokenizer.encode(TEXTS, special=special)]


def sequences(packed):
    return [packed.tokens_at(i).tolist() for i in range(len(packed))]


@pytest.mark.parametrize("context", [2, 3, 16, 1000])
@pytest.mark.parametrize("separated", [True, False])
def test_joined_is_one_stream_cut_into_equal_parts(
    tmp_path, source, tokenizer, context, separated
):
    end = tokenizer.separator if separated else None
    packed = pack(source, tokenizer, tmp_path / "packed", Plan(context, end))
    stream = [i for x in encoded(tokenizer) for i in [*x, *([end] * separated)]]
    parts = [stream[i : i + context] for i in range(0, len(stream), context)]
    assert sequences(packed) == [x for x in parts if len(x) > 1]
    assert packed.length == len(stream)


@pytest.mark.parametrize("context", [2, 3, 16, 1000])
def test_apart_is_every_document_cut_by_itself(tmp_path, source, tokenizer, context):
    end = tokenizer.separator
    plan = Plan(context, end, cuts=apart)
    packed = pack(source, tokenizer, tmp_path / "packed", plan)
    parts = [
        [*x, end][i : i + context]
        for x in encoded(tokenizer)
        for i in range(0, len(x) + 1, context)
    ]
    assert sequences(packed) == [x for x in parts if len(x) > 1]
    left_out = Run(tmp_path / "packed").manifest["left_out"]
    assert left_out == sum(len(x) == 1 for x in parts)
    if context == 3:
        assert left_out


@pytest.mark.parametrize("cuts", [joined, apart])
@pytest.mark.parametrize("context", [2, 5, 16])
def test_names_are_where_sequences_begin(tmp_path, source, tokenizer, cuts, context):
    plan = Plan(context, tokenizer.separator, cuts=cuts)
    packed = pack(source, tokenizer, tmp_path / "packed", plan)
    documents = [[*x, tokenizer.separator] for x in encoded(tokenizer)]
    names = list(packed.ids)
    assert len(set(names)) == len(names)
    for place, name in enumerate(names):
        assert packed.place_of(name) == place
        corpus, row, offset = name.split(":")
        assert corpus == "a"
        pieces = packed.pieces_of(name)
        assert (int(row), int(offset)) == (pieces[0].row, pieces[0].offset)
        found = [
            i for x in pieces for i in documents[x.row][x.offset : x.offset + x.tokens]
        ]
        assert found == packed.tokens_at(place).tolist()
    for wrong in ("a:0", "b:0:0", "a:0:1", "a:99:0", "a:x:0", "a:-1:0", ""):
        with pytest.raises(ValueError, match=f"There is no sequence '{wrong}' among"):
            packed.place_of(wrong)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_packed_does_not_depend_on_the_kind_of_file(
    tmp_path, source, tokenizer, name
):
    plan = Plan(16, tokenizer.separator, chunk=20)
    expected = pack(source, tokenizer, tmp_path / "expected", plan)
    path = make.write(tmp_path, name, "text", TEXTS)
    found = pack(open_source(path, name="a"), tokenizer, tmp_path / "packed", plan)
    assert sequences(found) == sequences(expected)
    assert found.ids == expected.ids


def test_a_stream_is_packed_without_walking_it_twice(tmp_path, source, tokenizer):
    rows = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    stream = Streamed("a", "text", "sha", "", rows, 1000)
    plan = Plan(16, tokenizer.separator, chunk=20)
    expected = pack(source, tokenizer, tmp_path / "expected", plan)
    with pytest.raises(Stopped):
        pack(stream, tokenizer, tmp_path / "packed", plan, watch=stopping(5))
    found = pack(stream, tokenizer, tmp_path / "packed", plan)
    assert sequences(found) == sequences(expected)
    assert Run(tmp_path / "packed").manifest["documents"] is None
    changed = Streamed("a", "text", "sha", "test", rows, 1000)
    with pytest.raises(ValueError, match="The data of 'a' changed since"):
        pack(changed, tokenizer, tmp_path / "packed", plan)


def test_a_row_of_a_stream_that_is_no_good_is_named_when_it_comes(tmp_path, tokenizer):
    texts = [*["good"] * 120, None]
    rows = Dataset.from_dict({"text": texts}).to_iterable_dataset()
    stream = Streamed("a", "text", "sha", "", rows, 1000)
    with pytest.raises(ValueError, match="row 120 of 'a' .* 'text' is empty"):
        pack(stream, tokenizer, tmp_path / "packed", Plan(8, tokenizer.separator))


@pytest.mark.parametrize("name", TABLES)
def test_token_ids_are_packed_as_they_are(tmp_path, name):
    ids = [[5, 70000], [1, 2, 3], [4]]
    source = open_source(make.write(tmp_path, name, "ids", ids), column="ids")
    packed = pack(source, None, tmp_path / "packed", Plan(4, 9))
    assert sequences(packed) == [[5, 70000, 9, 1], [2, 3, 9, 4]]
    assert packed.tokens.dtype == np.uint32
    assert packed.pieces_of("ids:0:0" if name == "ids" else packed.ids[0])[0][2:] == (
        3,
        0,
        2,
    )


def test_small_ids_take_two_bytes(tmp_path, source, tokenizer):
    packed = pack(source, tokenizer, tmp_path / "packed", Plan(8, None))
    assert packed.tokens.dtype == np.uint16
    size = (tmp_path / "packed" / "tokens.bin").stat().st_size
    assert size == 2 * packed.length


def test_special_tokens_are_there_if_asked_for(tmp_path, source, tmp_path_factory):
    from tokenizers import Tokenizer, processors

    folder = make.write_tokenizer(tmp_path_factory.mktemp("t"), eos_token=END)
    found = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, found.token_to_id(BEGIN))]
    )
    found.save(str(folder / "tokenizer.json"))
    tokenizer = read_tokenizer(folder)
    begin, end = found.token_to_id(BEGIN), tokenizer.separator
    for special in (False, True):
        plan = Plan(1000, end, cuts=apart, special_tokens=special)
        packed = pack(source, tokenizer, tmp_path / f"{special}", plan)
        whole = [[*[begin] * special, *x, end] for x in encoded(tokenizer)]
        assert sequences(packed) == whole


def bytes_of(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


class Stopped(Exception):
    """What a test stops packing with."""


def stopping(after):
    def watch(totals):
        if totals.documents == after:
            raise Stopped

    return watch


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("cuts", [joined, apart])
def test_stopped_and_gone_on_with_is_the_same_to_the_byte(
    tmp_path, tokenizer, name, cuts
):
    source = open_source(make.write(tmp_path, name, "text", TEXTS))
    plan = Plan(16, tokenizer.separator, cuts=cuts, chunk=30)
    pack(source, tokenizer, tmp_path / "whole", plan)
    assert len(_chunks(tmp_path / "whole")) > 3
    check_packed(tmp_path / "whole")
    for after in range(1, len(TEXTS) + 1):
        folder = tmp_path / f"stopped-{after}"
        with pytest.raises(Stopped):
            pack(source, tokenizer, folder, plan, watch=stopping(after))
        with pytest.raises(ValueError, match="was not packed to its end"):
            read_packed(folder)
        with pytest.raises(Stopped):  # And stopped again.
            pack(source, tokenizer, folder, plan, watch=stopping(len(TEXTS)))
        pack(source, tokenizer, folder, plan)
        assert bytes_of(folder) == bytes_of(tmp_path / "whole")
        pack(source, tokenizer, folder, plan)  # Finished: nothing is done again.
        assert bytes_of(folder) == bytes_of(tmp_path / "whole")


def test_empty_rows_are_passed_over_wherever_it_was_stopped(tmp_path, tokenizer):
    texts = ["", "one two", "", "", "three four", "", "five"]
    source = open_source(make.write(tmp_path, "a.jsonl", "text", texts))
    plan = Plan(4, tokenizer.separator, skip_empty=True, chunk=1)
    whole = pack(source, tokenizer, tmp_path / "whole", plan)
    assert {int(x.split(":")[1]) for x in whole.ids} <= {1, 4, 6}
    assert Run(tmp_path / "whole").manifest["documents"] == 3
    for after in (1, 2, 3):
        folder = tmp_path / f"{after}"
        with pytest.raises(Stopped):
            pack(source, tokenizer, folder, plan, watch=stopping(after))
        pack(source, tokenizer, folder, plan)
        assert bytes_of(folder) == bytes_of(tmp_path / "whole")


def test_killed_and_gone_on_with_is_the_same_to_the_byte(tmp_path, tokenizer):
    path = make.write(tmp_path, "a.jsonl", "text", TEXTS * 20)
    folder = make.write_tokenizer(tmp_path / "tokenizer", eos_token=END)
    script = """
        import sys, time
        from influence.runtime.corpus.pack import pack
        from influence.runtime.corpus.plan import Plan
        from influence.runtime.corpus.source import open_source
        from influence.runtime.corpus.tokenizer import read_tokenizer

        source, tokenizer = open_source(sys.argv[1]), read_tokenizer(sys.argv[2])
        plan = Plan(16, tokenizer.separator, chunk=100)
        pack(source, tokenizer, sys.argv[3], plan, watch=lambda _: time.sleep(0.01))
    """
    out = tmp_path / "killed"
    command = [sys.executable, "-c", dedent(script), path, folder, out]
    with subprocess.Popen(command) as process:
        while not _chunks(out):
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert not Run(out).manifest["done"]
    source, tokenizer = open_source(path), read_tokenizer(folder)
    plan = Plan(16, tokenizer.separator, chunk=100)
    pack(source, tokenizer, out, plan)
    pack(source, tokenizer, tmp_path / "whole", plan)
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def _chunks(folder):
    path = folder / "chunks.jsonl"
    return (
        [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    )


def test_what_was_begun_otherwise_is_not_gone_on_with(tmp_path, source, tokenizer):
    plan = Plan(16, tokenizer.separator)
    pack(source, tokenizer, tmp_path / "packed", plan)
    other = make.tokenizer(tmp_path / "tokenizer", chat_template="x")
    for changed, said in (
        ((source, tokenizer, Plan(8, tokenizer.separator)), "with context 16, not 8"),
        ((source, tokenizer, Plan(16, None)), f"separator {plan.separator}, not None"),
        ((source, tokenizer, Plan(16, plan.separator, apart)), "'joined', not 'apart'"),
        ((source, other, plan), "with tokenizer '.*', not '"),
    ):
        with pytest.raises(ValueError, match=said):
            pack(*changed[:2], tmp_path / "packed", changed[2])


def test_data_that_changed_is_not_gone_on_with(tmp_path, tokenizer):
    path = make.write(tmp_path, "a.jsonl", "text", TEXTS)
    plan = Plan(16, tokenizer.separator, chunk=30)
    with pytest.raises(Stopped):
        pack(open_source(path), tokenizer, tmp_path / "a", plan, watch=stopping(5))
    make.write(tmp_path, "a.jsonl", "text", ["Another", *TEXTS[1:]])
    with pytest.raises(ValueError, match="The data of 'a' changed since .*a was begun"):
        pack(open_source(path), tokenizer, tmp_path / "a", plan)

    def change(totals):
        make.write(tmp_path, "a.jsonl", "text", [*TEXTS, f"{totals.documents}"])

    with pytest.raises(ValueError, match="'a' changed while it was packed"):
        pack(open_source(path), tokenizer, tmp_path / "b", plan, watch=change)


def test_folders_of_something_else_are_left_alone(tmp_path, source, tokenizer):
    Run.create(tmp_path / "run", {"job": "demo"})
    with pytest.raises(FileExistsError, match="holds a run of another kind"):
        pack(source, tokenizer, tmp_path / "run", Plan(16, None))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "1.tex").write_text("years")
    with pytest.raises(FileExistsError, match="is not empty and holds no run"):
        pack(source, tokenizer, tmp_path / "thesis", Plan(16, None))
    with pytest.raises(FileNotFoundError, match="There is no packed corpus in"):
        read_packed(tmp_path / "thesis")


def test_a_damaged_chunk_is_named(tmp_path, source, tokenizer):
    plan = Plan(16, tokenizer.separator, chunk=30)
    packed = pack(source, tokenizer, tmp_path / "a", plan)
    ends = [2 * x["tokens"] for x in _chunks(tmp_path / "a")]
    start, stop = list(pairwise(ends))[1]
    path = tmp_path / "a" / "tokens.bin"
    data = bytearray(path.read_bytes())
    data[start] ^= 1
    path.write_bytes(data)
    said = rf"tokens\.bin is damaged between byte {start} and {stop}"
    with pytest.raises(ValueError, match=said):
        check_packed(tmp_path / "a")
    path.write_bytes(data[:-2])
    said = rf"tokens\.bin has {len(data) - 2} bytes of the {2 * packed.length}"
    with pytest.raises(ValueError, match=said):
        read_packed(tmp_path / "a")


def test_half_a_line_of_the_list_of_chunks_is_none(tmp_path, source, tokenizer):
    plan = Plan(16, tokenizer.separator, chunk=30)
    pack(source, tokenizer, tmp_path / "whole", plan)
    with pytest.raises(Stopped):
        pack(source, tokenizer, tmp_path / "a", plan, watch=stopping(5))
    with (tmp_path / "a" / "chunks.jsonl").open("a") as file:
        file.write('{"tokens": 12')
    pack(source, tokenizer, tmp_path / "a", plan)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "whole")
    (tmp_path / "a" / "chunks.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"chunks\.jsonl ends before the files do"):
        check_packed(tmp_path / "a")


def test_what_was_lost_of_a_stopped_run_is_not_gone_on_with(
    tmp_path, source, tokenizer
):
    plan = Plan(16, tokenizer.separator, chunk=30)
    with pytest.raises(Stopped):
        pack(source, tokenizer, tmp_path / "a", plan, watch=stopping(5))
    (tmp_path / "a" / "pieces.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pieces\.bin is damaged between byte 0 and"):
        pack(source, tokenizer, tmp_path / "a", plan)


@pytest.mark.parametrize(
    ("column", "values", "options", "said"),
    [
        ("text", ["a", ""], {}, "row 1 of 'a' .* 'text' is empty. Fill it, or skip"),
        ("body", ["a"], {}, "no column 'text'. There are 'n', 'body'"),
        ("text", [[1, 2]], {"special_tokens": True}, None),
        ("text", [[1, 999]], {}, "'text' has the token id 999, the tokenizer"),
        ("text", [[{"role": "a", "content": "b"}]], {}, "has no chat template"),
        (
            "text",
            [[{"role": "a", "content": "b"}]],
            {"special_tokens": True},
            "`special_tokens` would put them there again",
        ),
        ("text", ["x"], {"separator": None}, "documents have one token each at most"),
        ("text", ["x"], {"separator": 5000}, "The separator 5000 is none of the"),
    ],
)
def test_rows_that_would_mean_nothing_are_refused(
    tmp_path, tokenizer, column, values, options, said
):
    source = open_source(make.write(tmp_path, "a.jsonl", column, values))
    plan = Plan(**{"context": 8, "separator": tokenizer.separator, **options})
    if said is None:
        pack(source, tokenizer, tmp_path / "packed", plan)
        return
    with pytest.raises(ValueError, match=said):
        pack(source, tokenizer, tmp_path / "packed", plan)
    assert not (tmp_path / "packed" / "tokens.bin").exists() or "at most" in said


def test_text_without_a_tokenizer_and_plans_of_nothing_are_refused(tmp_path, source):
    with pytest.raises(ValueError, match="row 0 of 'a' .* is text, not token ids"):
        pack(source, None, tmp_path / "packed", Plan(8, None))
    for make_plan, said in (
        (lambda: Plan(1, None), "at most 1 tokens predicts nothing"),
        (lambda: Plan(8, -1), "The separator is a token id"),
        (lambda: Plan(8, None, chunk=0), "at least one token, not 0"),
    ):
        with pytest.raises(ValueError, match=said):
            make_plan()


@pytest.mark.parametrize("cuts", thinned([joined, apart], [joined]))
def test_a_corpus_four_times_as_long_takes_no_more_memory(tmp_path, cuts):
    # What Python and numpy allocate is the same from run to run.
    peaks = []
    rng = np.random.default_rng(0)
    for size in (600, 2400):
        ids = pa.array(list(rng.integers(0, 1000, (size, 2000))))
        path = tmp_path / f"{size}.parquet"
        pq.write_table(pa.table({"ids": ids}), path, row_group_size=100)
        source, out = open_source(path, column="ids"), tmp_path / f"packed-{size}"
        del ids
        tracemalloc.start()
        packed = pack(source, None, out, Plan(128, 0, cuts=cuts, chunk=50_000))
        for _ in packed.take(np.arange(0, len(packed), 99)).batches(32):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
