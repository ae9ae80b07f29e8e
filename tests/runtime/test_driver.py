"""A driver changes what one sees, not what comes out."""

import io

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from influence.fold import Fold, run
from influence.runtime.driver import Driver
from tests import cases

COUNT = Fold(
    "counting",
    init=lambda: jnp.zeros(cases.V),
    update=lambda state, batch: (
        state + jnp.eye(cases.V)[batch.inputs["tokens"][batch.real_B]].sum((0, 1))
    ),
    finish=lambda state: state,
)


def test_a_driver_gives_what_the_plain_loop_gives():
    batches = cases.texts(7).batches(3)
    for terminal in (False, True):
        out = io.StringIO()
        driver = Driver(Console(file=out, force_terminal=terminal, width=100))
        np.testing.assert_array_equal(driver.run(COUNT, batches), run(COUNT, batches))
        assert "counting" in out.getvalue()
        assert driver.seconds["counting"] > 0


def test_a_pass_can_be_shown_under_another_name():
    out = io.StringIO()
    driver = Driver(Console(file=out, width=100))
    driver.named("once more")(COUNT, cases.texts(7).batches(3))
    assert list(driver.seconds) == ["once more"]
