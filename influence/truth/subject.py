"""What methods are asked about: a training that was carried out, and measurements."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import xarray as xr

from influence.attribution.measurements import Measurement
from influence.attribution.query import query
from influence.attribution.scan import scan
from influence.curvature.covariance import Factors, PerToken
from influence.curvature.ekfac import fit
from influence.curvature.operator import Curvature
from influence.curvature.solvers import Solver
from influence.fold import Run, run
from influence.model.task import Labels, Sampled
from influence.model.train import Training
from influence.types import Batches, Params


class Subject(NamedTuple):
    """What methods are asked about.

    Attributes:
      training: how the model came to be.
      seed: of the training.
      params: what it ended in.
      measurements: by name.
      words: the token ids of each training sequence and, by name, of each measurement;
        None if they are not text.
      layers: which layers are covered.
      batch: how many sequences are read at a time.
      run: carries out passes over data.
    """

    training: Training
    seed: int
    params: Params
    measurements: Mapping[str, Measurement]
    words: tuple[list[list[int]], dict[str, list[int]]] | None = None
    layers: str | tuple[str, ...] = "*"
    batch: int = 32
    run: Run = run

    @property
    def batches(self) -> Batches:
        """Returns the training sequences."""
        return self.training.examples.batches(self.batch)

    def sample(self, sequences: int) -> Batches:
        """Returns a fixed random sample of the training sequences."""
        n = len(self.training.examples)
        chosen = np.random.default_rng(0).permutation(n)[:sequences]
        return self.training.examples.take(np.sort(chosen)).batches(self.batch)

    def fitted(
        self,
        params: Params | None = None,
        factors: Factors = PerToken(),
        labels: Labels = Sampled(),
    ) -> Curvature:
        """Returns EK-FAC at the final or at other parameters."""
        return fit(
            self.training.task,
            self.params if params is None else params,
            self.batches,
            layers=self.layers,
            factors=factors,
            labels=labels,
            run=self.run,
        )

    def scores(self, curvature: Curvature, solver: Solver) -> xr.DataArray:
        """Returns what a curvature and a solver make of the measurements."""
        asked = query(curvature, self.params, self.measurements, solver=solver)
        return scan(
            self.training.task,
            self.params,
            asked,
            self.batches,
            by_layer=False,
            run=self.run,
        ).total
