"""What a layer's curvature looks like, and what a damping does to it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from influence.curvature.operator import Curvature
from influence.types import rows

FACTORS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""The dampings of a sweep, as multiples of the mean eigenvalue."""


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of one matrix.

    Attributes:
      label: which matrix.
      lam: its eigenvalues, descending.
    """

    label: str
    lam: np.ndarray

    @property
    def effective_rank(self) -> float:
        """Returns `(Σ λ)² / Σ λ²`: how many equal eigenvalues would be as uneven."""
        return float(self.lam.sum() ** 2 / (self.lam**2).sum())

    def kept(self, damping: float) -> float:
        """Returns `Σ λ / (λ + damping)`: how many directions the damping leaves alone.

        The effective number of parameters (MacKay 1992).
        """
        return float((self.lam / (self.lam + damping)).sum())

    def sweep(self, factors: Sequence[float] = FACTORS) -> list[tuple[float, float]]:
        """Returns each damping factor, with the share of directions it leaves alone."""
        mean = self.lam.mean()
        return [(x, self.kept(x * mean) / len(self.lam)) for x in factors]

    def __str__(self) -> str:
        """Returns the quantiles of the eigenvalues and a sweep of dampings."""
        marks = (0, 0.01, 0.1, 0.5, 0.9, 1)
        values = [self.lam[round(x * (len(self.lam) - 1))] for x in marks]
        lines = [
            f"{self.label}: {len(self.lam)} eigenvalues, mean {self.lam.mean():.3g}, "
            f"effective rank {self.effective_rank:.1f}",
            f"{'of the largest':<18}" + "".join(f"{x:>10.0%}" for x in marks),
            f"{'λ':<18}" + "".join(f"{x:>10.2g}" for x in values),
            f"{'damping / mean λ':<18}" + "".join(f"{x:>10g}" for x in FACTORS),
            f"{'left alone':<18}" + "".join(f"{x:>10.1%}" for _, x in self.sweep()),
        ]
        return "\n".join(lines)


def spectrum(curvature: Curvature, label: str) -> Spectrum:
    """Returns the eigenvalues of one matrix of a curvature.

    Args:
      curvature: as fitted.
      label: a layer's name, with its place in the stack if it has one: `mlp.up[3]`.

    Raises:
      ValueError: if there is no such matrix.

    Example:
      >>> from influence.curvature.spectrum import spectrum
      >>> found = spectrum(curvature, curvature.layers[0].name)
      >>> found.effective_rank < len(found.lam)
      True
    """
    named = {name: (x, place) for x, place, name in rows(curvature.layers)}
    if label not in named:
        raise ValueError(
            f"There is no matrix {label!r} in the curvature; it has "
            f"{', '.join(list(named)[:10])}{', …' if len(named) > 10 else ''}."
        )
    layer, place = named[label]
    lam = np.asarray(curvature.blocks[layer.name].lam_OxI[place], float)
    return Spectrum(label, np.sort(lam.ravel())[::-1])
