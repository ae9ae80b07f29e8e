"""What is printed of a layer's eigenvalues is true of them."""

import numpy as np
import pytest

from influence.curvature.diagonal import identity
from influence.curvature.spectrum import Spectrum, spectrum
from tests import cases


def test_effective_rank_counts_equal_eigenvalues():
    lam = np.array([2.0, 2.0, 2.0, 0.0, 0.0])
    np.testing.assert_allclose(Spectrum("w", lam).effective_rank, 3)


def test_a_damping_leaves_alone_what_is_far_above_it():
    found = Spectrum("w", np.array([1.0, 1.0, 1e-6]))
    np.testing.assert_allclose(found.kept(1e-3), 2, atol=0.01)
    shares = [share for _, share in found.sweep()]
    assert shares == sorted(shares, reverse=True)
    np.testing.assert_allclose(found.kept(1.0), 1, atol=1e-5)


def test_any_matrix_can_be_printed():
    case = cases.case(cases.MAKERS["raw-scan"], True)
    curvature = identity(case.task, case.params, case.examples.batches(7))
    found = spectrum(curvature, "blocks.up.w[1]")
    assert str(found).startswith("blocks.up.w[1]: 108 eigenvalues, mean 1")
    assert found.effective_rank == 108
    with pytest.raises(ValueError, match=r"no matrix 'blocks\.up\.w' in.*q\.w\[0\]"):
        spectrum(curvature, "blocks.up.w")
