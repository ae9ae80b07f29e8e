"""Gemma Scope's arrays are read as its formulas say; objects are not."""

import jax.numpy as jnp
import numpy as np
import pytest

from influence.interpret.dictionary import encode, reconstruct
from influence.runtime.dictionaries import gemma_scope
from tests.runtime.dictionaries import cases
from tests.runtime.dictionaries.cases import D, F, drawn

INSIDE = "layer_20/width_16k/average_l0_71"


def written(folder, **changes):
    """Writes a folder as it is published; returns its arrays."""
    arrays = {
        "W_enc": drawn(0, D, F),
        "b_enc": drawn(1, F),
        "W_dec": drawn(2, F, D),
        "b_dec": drawn(3, D),
        "threshold": np.abs(drawn(4, F)),
        **changes,
    }
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **arrays)
    return arrays


def test_arrays_do_what_their_formulas_say(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-res" / INSIDE
    a, x = written(folder), drawn(9, 5, D)
    pre = x @ a["W_enc"] + a["b_enc"]
    z = np.where(pre > a["threshold"], np.maximum(pre, 0), 0)
    found = gemma_scope.read(folder).dictionary
    cases.close(encode(found, jnp.asarray(x)), z)
    cases.close(reconstruct(found, jnp.asarray(x)), z @ a["W_dec"] + a["b_dec"])


@pytest.mark.parametrize(
    ("name", "site", "model"),
    [
        ("gemma-scope-2b-pt-res", "resid.21", "google/gemma-2-2b"),
        ("gemma-scope-9b-it-res", "resid.21", "google/gemma-2-9b-it"),
        ("gemma-scope-2b-pt-att", "attention_heads.20", "google/gemma-2-2b"),
        (
            "models--google--gemma-scope-2b-pt-mlp/snapshots/ab12",
            "mlp_out.20",
            "google/gemma-2-2b",
        ),
    ],
)
def test_the_path_says_what_it_is_of(name, site, model, tmp_path):
    written(tmp_path / name / INSIDE)
    about = gemma_scope.read(tmp_path / name / INSIDE).about
    assert (about.site, about.writes, about.model) == (site, None, model)


def test_a_transcoder_reads_a_normed_value_without_the_norms_scale(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / INSIDE
    written(folder)
    with pytest.raises(ValueError, match="before its norm's scale"):
        gemma_scope.read(folder)
    about = gemma_scope.read(folder, folded=True).about
    assert (about.site, about.writes) == ("mlp_in.20", "mlp_out.20")


def test_what_does_not_fit_is_refused(tmp_path):
    place = tmp_path / "gemma-scope-2b-pt-res"
    for name, changes, said in (
        ("objects", {"b_enc": np.array([None] * F)}, "can't be read as arrays"),
        ("turned", {"W_dec": drawn(2, D, F)}, r"W_dec has shape \(8, 16\)"),
        ("beside", {"W_skip": drawn(2, D, D)}, "has W_dec, W_enc, W_skip"),
        ("structs", {"b_dec": np.zeros(D, [("a", "<f4")])}, "no real numbers"),
    ):
        written(place / name / INSIDE, **changes)
        with pytest.raises(ValueError, match=rf"params\.npz.*{said}"):
            gemma_scope.read(place / name / INSIDE)
    path = place / "turned" / INSIDE / "params.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="can't be read as arrays"):
        gemma_scope.read(path.parent)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no params\.npz"):
        gemma_scope.read(path.parent)
    written(tmp_path / "anything")
    with pytest.raises(ValueError, match="does not say which site"):
        gemma_scope.read(tmp_path / "anything")
