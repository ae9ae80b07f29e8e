"""The language task splits its text, and says what is too short."""

import jax
import pytest
from flax import nnx

from experiments.tasks import LITTLE, QUERIES, TASKS
from influence.model.transformer import Decoder


def test_what_is_asked_about_was_not_trained_on_and_nothing_was_read_before():
    setting = TASKS["language"](None, 0)
    own, asked = setting.training.examples, setting.asked
    assert (len(own), len(asked)) == (1024, QUERIES)
    assert not {*own.ids} & {*asked.ids}
    _, params = nnx.split(Decoder(LITTLE.config, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(params)) == 95_472
    again = TASKS["language"](None, 1)
    assert {*again.training.examples.ids} != {*own.ids}


def test_a_text_that_is_too_short_is_an_error_before_anything_is_trained(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("All happy families are alike. " * 2000)
    with pytest.raises(ValueError, match="takes 8,252 to train on and to ask about"):
        TASKS["language-large"](path, 0)
