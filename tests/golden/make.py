"""Cuts a slice from the full reference file; `python tests/golden/make.py FULL.npz`.

The full file holds kronfluence 1.0.1's own float64 numbers for a tiny language model
with a tied head. The slice keeps the model, the data and what two of its layers got.
"""

import sys
from pathlib import Path

import numpy as np

KEPT = ("attn.k", "down")
SCORES = (
    *("cov/", "lambda", "ekfac/pair/", "ekfac/tok/none/", "ekfac/pair_rank3/"),
    *("kfac/", "diagonal/", "identity/pair/none/"),
)


def main(full: str) -> None:
    """Writes `kronfluence.npz` beside this file."""
    arrays = np.load(full)
    kept = {
        name: arrays[name]
        for name in arrays.files
        if name.startswith(("w/", "train/", "query/"))
        or name.startswith(SCORES)
        and name.endswith(KEPT)
    }
    np.savez_compressed(Path(__file__).with_name("kronfluence.npz"), **kept)


if __name__ == "__main__":
    main(sys.argv[1])
