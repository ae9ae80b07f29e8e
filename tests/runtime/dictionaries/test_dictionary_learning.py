"""dictionary_learning's state dicts are read as its classes use them."""

import jax.numpy as jnp
import numpy as np
import pytest

from influence.interpret.activations import JumpReLU
from influence.runtime.dictionaries import dictionary_learning
from tests.runtime.dictionaries import cases
from tests.runtime.dictionaries.cases import D, F

CLASSES = sorted(x.name for x in (cases.GOLDEN / "dictionary_learning").iterdir())


@pytest.mark.parametrize("name", CLASSES)
def test_a_state_dict_does_what_its_class_does(name):
    folder = cases.GOLDEN / "dictionary_learning" / name
    stored = dictionary_learning.read(folder)
    cases.as_expected(stored, folder)
    about = stored.about
    assert (about.site, about.writes) == ("resid.2", None)
    assert (about.model, about.context) == ("tiny", 32)
    assert about.facts["trainer"]["dict_class"] == name


def test_activations_times_lengths_are_those_of_a_decoder_of_unit_rows():
    for name in ("GatedAutoEncoder", "JumpReluAutoEncoder"):
        stored = dictionary_learning.read(cases.GOLDEN / "dictionary_learning" / name)
        rows = np.linalg.norm(np.asarray(stored.dictionary.decoder_FxO), axis=1)
        np.testing.assert_allclose(rows, 1, rtol=1e-6)


def rewritten(folder, **parts):
    """Changes the numbers of a state dict's tensors, by their place in it."""
    whole = folder / "whole.pt"
    (folder / "ae.pt").rename(whole)
    changed = {f"data/{k[1:]}": np.asarray(x).tobytes() for k, x in parts.items()}
    cases.zipped(folder / "ae.pt", whole, changed)
    whole.unlink()


def test_a_threshold_that_was_not_estimated_leaves_all_features_on(tmp_path):
    folder = cases.copied("dictionary_learning/BatchTopKSAE", tmp_path)
    rewritten(folder, _2=np.float32(-1))
    found = dictionary_learning.read(folder).dictionary
    assert isinstance(found.activation, JumpReLU)
    pre = jnp.asarray(cases.drawn(0, 4, F))
    cases.close(found.activation(pre), jnp.maximum(pre, 0))


@pytest.mark.parametrize(
    ("name", "parts", "said"),
    [
        ("BatchTopKSAE", {"_0": np.full(D, np.nan, "f4")}, "8 of the 8 numbers in b_d"),
        ("BatchTopKSAE", {"_2": np.float32(np.nan)}, "a threshold .*not one finite"),
        ("AutoEncoderTopK", {"_1": np.int32(F + 1)}, "the 17 largest of 16"),
    ],
)
def test_numbers_that_can_not_be_are_refused(name, parts, said, tmp_path):
    folder = cases.copied(f"dictionary_learning/{name}", tmp_path)
    rewritten(folder, **parts)
    with pytest.raises(ValueError, match=rf"ae\.pt.*{said}"):
        dictionary_learning.read(folder)


@pytest.mark.parametrize(
    ("name", "other", "said"),
    [
        ("AutoEncoder", "AutoEncoderNew", "has bias, decoder.weight, encoder.bias, en"),
        (
            "AutoEncoderTopK",
            "JumpReluAutoEncoder",
            "has W_dec, W_enc, b_dec, b_enc, th",
        ),
        ("MatryoshkaBatchTopKSAE", "BatchTopKSAE", "group_sizes"),
        ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE", "not one finite number"),
    ],
)
def test_arrays_of_another_class_are_refused(name, other, said, tmp_path):
    folder = cases.copied(f"dictionary_learning/{name}", tmp_path)
    cases.words(folder / "config.json", trainer={"dict_class": other, "layer": 1})
    with pytest.raises(ValueError, match=rf"ae\.pt.*{said}"):
        dictionary_learning.read(folder)


SITES = {
    ("resid_post_layer_3", 3): "resid.4",
    ("mlp_out_layer_3", 3): "mlp_out.3",
    ("attn_layer0", 0): "attention_out.0",
    (None, 3): "resid.4",
}


@pytest.mark.parametrize("where", SITES)
def test_a_submodule_is_a_site(where, tmp_path):
    folder = cases.copied("dictionary_learning/AutoEncoder", tmp_path)
    name, layer = where
    trainer = {"dict_class": "AutoEncoder", "submodule_name": name, "layer": layer}
    cases.words(folder / "config.json", trainer=trainer)
    assert dictionary_learning.read(folder).about.site == SITES[where]


def test_configs_that_can_not_be_followed_are_refused(tmp_path):
    folder = cases.copied("dictionary_learning/AutoEncoder", tmp_path)
    known = {"dict_class": "AutoEncoder", "layer": 1}
    for changes, said in (
        ({"dict_class": "CrossCoder"}, "dict_class 'CrossCoder'"),
        ({"submodule_name": "embedding"}, "'embedding' and layer 1, which name no"),
        ({"layer": None}, "submodule_name None and layer None"),
        ({"activation_dim": 9}, r"encoder\.weight has shape \(16, 8\)"),
    ):
        cases.words(folder / "config.json", trainer={**known, **changes})
        with pytest.raises(ValueError, match=said):
            dictionary_learning.read(folder)
    (folder / "ae.pt").unlink()
    cases.words(folder / "config.json", trainer=known)
    with pytest.raises(FileNotFoundError, match=r"has no ae\.pt"):
        dictionary_learning.read(folder)
