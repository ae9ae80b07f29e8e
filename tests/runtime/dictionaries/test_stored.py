"""A dictionary is of a model whose widths and weights are those it was trained on."""

from dataclasses import replace

import pytest

from influence.runtime.dictionaries.stored import About, Stored
from tests.runtime.dictionaries import cases
from tests.runtime.dictionaries.cases import OUT, D

CODER = Stored(
    cases.random("topk", out=OUT), About("mlp_in.2", "mlp_out.2", "tiny", "ab" * 32)
)


def test_a_dictionary_of_the_model_passes():
    CODER.check_fits(reads=D, writes=OUT, digest="ab" * 32)
    CODER.check_fits(reads=D, writes=OUT)
    plain = replace(CODER, about=About("resid.2"), dictionary=cases.random("topk"))
    plain.check_fits(reads=D, digest="cd" * 32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reads": 9}, "reads 8 numbers at mlp_in.2, where the model has 9. Give the"),
        ({"writes": 9}, "writes 6 numbers at mlp_out.2, where the model has 9"),
        ({"writes": None}, "writes 6 numbers at mlp_out.2, where the model has 8"),
        ({"digest": "cd" * 32}, "of the digest abababababab…, and this model has cdcd"),
    ],
)
def test_one_of_another_model_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        CODER.check_fits(**{"reads": D, "writes": OUT, **changes})
