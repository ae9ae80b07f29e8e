"""What weights and a forward pass in bfloat16 make of scores.

    python -m experiments.half_precision

Trains a small Llama on Python's sources, then fits, asks and scans twice: in float32,
and with weights and forward pass in bfloat16, statistics and curvature in float32 as
ever. Compares the scores of every question: how far they are from each other, how
alike their rankings are, how many of the top ten are the same.
"""

import json
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import tyro
import xarray as xr
from rich.console import Console
from rich.table import Table

from experiments.material import (
    random_llama,
    sources,
    trained,
    write_corpus,
    write_llama,
    write_tokenizer,
)
from experiments.process import ended, questions, started
from influence.model.config import Config
from influence.model.examples import sequences
from influence.model.train import Recipe
from influence.model.transformer import Apply
from influence.runtime.corpus.tokenizer import read_tokenizer
from influence.runtime.run.found import results

CONFIG = Config(
    vocabulary=2048, context=64, width=96, hidden=256, heads=4, blocks=3, groups=2
)

QUESTIONS = (
    ("import numpy", " as np"),
    ("def __init__(", "self"),
    ("    raise ValueError(", 'f"'),
    ("if __name__ ==", ' "__main__":'),
    ("for i in", " range("),
    ("        return", " self."),
)

TOP = 10


def trained_llama(folder: Path, steps: int) -> float:
    """Writes a Llama that was trained on sources; returns its last loss."""
    texts = list(islice(sources(), 300))
    end = write_tokenizer(folder / "tokenizer", texts, CONFIG.vocabulary)
    tokenizer = read_tokenizer(folder / "tokenizer")
    ids = [y for x in tokenizer.encode(texts) for y in (*x.ids, end)]
    whole = len(ids) // CONFIG.context * CONFIG.context
    examples = sequences(np.reshape(ids[:whole], (-1, CONFIG.context)).tolist())
    recipe = Recipe(steps, 32, 3e-3)
    params, loss = trained(Apply(CONFIG), random_llama(CONFIG), examples, recipe)
    write_llama(folder / "llama", CONFIG, params, folder / "tokenizer")
    return loss


def scores(folder: Path, dtype: str) -> xr.DataArray:
    """Returns the scores of a run with weights of some type."""
    run = folder / dtype
    model, data = str(folder / "llama"), str(folder / "corpus.jsonl")
    fit = ["--model", model, "--data", data, "--dtype", dtype, "--batch", "16"]
    for words in (["fit", str(run), *fit], ["query", str(run), *questions(QUESTIONS)],
                  ["scan", str(run), "--batch", "16"]):  # fmt: skip
        ended(started(*words))
    return results(run).total()


def ranks(values: np.ndarray) -> np.ndarray:
    """Returns at which place of the order each value is."""
    return np.argsort(np.argsort(values))


def main(megabytes: float = 1.0, steps: int = 1000) -> None:
    """Compares scores.

    Args:
        megabytes: Of text to rank.
        steps: Of training.
    """
    console = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl", megabytes)
        console.print(f"trained to {trained_llama(folder, steps):.2f} nats a token")
        whole, half = (scores(folder, x) for x in ("float32", "bfloat16"))
    table = Table(title=f"{whole.sizes['train']:,} sequences", title_justify="left")
    heads = ("question", "distance", "rank correlation", f"of the top {TOP}")
    for head in heads:
        table.add_column(head)
    rows = []
    for place, question in enumerate(QUESTIONS):
        x, y = (s.isel(query=place).values.astype(np.float64) for s in (whole, half))
        top = [set(np.argsort(-s)[:TOP].tolist()) for s in (x, y)]
        row = (
            np.linalg.norm(x - y) / np.linalg.norm(x),
            np.corrcoef(ranks(x), ranks(y))[0, 1],
            len(top[0] & top[1]),
        )
        table.add_row("".join(question), f"{row[0]:.3f}", f"{row[1]:.4f}", f"{row[2]}")
        rows.append(row)
    console.print(table)
    names = ("distance", "rank_correlation", "of_top_ten")
    mean = dict(zip(names, np.mean(rows, 0).round(4).tolist(), strict=True))
    console.print_json(json.dumps(mean), indent=None)


if __name__ == "__main__":
    tyro.cli(main)
