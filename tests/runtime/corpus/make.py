"""Small corpora in every format, and a tokenizer for them."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from datasets import Dataset, disable_progress_bars

from influence.runtime.corpus.tokenizer import ModelTokenizer, read_tokenizer
from influence.runtime.data import Text, train_tokenizer

disable_progress_bars()

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Größe: 7 µm, Straße, naïve café — “déjà vu”…",
    "x",
    "日本語のテキスト。数学的な𝄞記号と🦊の絵文字🏳️‍🌈。",
    "  indented\n\n\tand\r\nbroken lines  \n",
    "The quick brown fox again, and again, and again, and again, and again.",
    "e\u0301 is not é, and \u00a0 is no space.",
    "\n",
    "the end",
]
"""ASCII and not, characters of several tokens, short and long, white space only."""

END = "<|end|>"
BEGIN = "<|begin|>"


def lines(rows) -> bytes:
    """Returns rows as JSON lines, with blank lines between some of them."""
    found = [json.dumps(x, ensure_ascii=i % 2 == 0) for i, x in enumerate(rows)]
    return "\n\n".join(found[:2]).encode() + b"\n" + "\n".join(found[2:]).encode()


def write(folder: Path, name: str, column: str, values: list) -> Path:
    """Writes a column, beside another one, to a file or folder of some name."""
    path, rows = folder / name, [{"n": i, column: x} for i, x in enumerate(values)]
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif name.endswith(".gz"):
        # Two members one behind the other are a gzip file as well.
        data = lines(rows)
        path.write_bytes(gzip.compress(data[:50]) + gzip.compress(data[50:]))
    elif name.endswith(".zst"):
        data = lines(rows)
        frames = (zstandard.compress(x) for x in (data[:50], data[50:]))
        path.write_bytes(b"".join(frames))
    elif name == "saved":
        # In another order than the rows were written in: an indirection of the library.
        order = list(range(len(rows)))[::-1]
        Dataset.from_list(rows[::-1]).select(order).save_to_disk(path)
    elif name == "folder":
        for i, x in enumerate(values):
            below = path / f"part{i // 4}"
            below.mkdir(parents=True, exist_ok=True)
            (below / f"{i:02}.anything").write_bytes(x.encode())
    else:
        path.write_bytes(lines(rows))
    return path


TABLES = ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "saved"]
"""Formats with columns."""

FORMATS = [*TABLES, "folder"]


def tokenizer(folder: Path, **config) -> ModelTokenizer:
    """Returns a byte-level tokenizer that ends texts with `END`."""
    write_tokenizer(folder, eos_token=END, **config)
    return read_tokenizer(folder)


def write_tokenizer(folder: Path, **config) -> Path:
    """Writes the files of a byte-level tokenizer with two special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    found = train_tokenizer([Text("", TEXTS[0]), Text("", TEXTS[5])], 300)
    found.add_special_tokens([END, BEGIN])
    found.save(str(folder / "tokenizer.json"))
    put(folder / "tokenizer_config.json", config)
    return folder


def put(path: Path, value) -> None:
    """Writes a value as JSON."""
    path.write_text(json.dumps(value), encoding="utf-8")
