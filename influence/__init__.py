"""Which training sequences made this model say that, and is it true?

    task = LanguageModel(apply)                # apply(params, tokens_BxT) -> logits
    train = sequences(tokens, ids)
    curvature = fit(task, params, train.batches(32), layers="blocks.*")
    asked = query(curvature, params, completions(task, {"name": (prompt, completion)}))
    print(scan(task, params, asked, train.batches(32)).top(5))

Where the names of this package are documented:

* `LanguageModel`, `Task`, `Sampled`, `Empirical` in `influence.model.task`;
  `sequences`, `Examples` in `influence.model.examples`; `layers` in
  `influence.model.coverage`.
* `fit` in `influence.curvature.ekfac`; `Curvature` in `influence.curvature.operator`;
  `Eigenbasis`, `ConjugateGradients` in `influence.curvature.solvers`; `Relative`,
  `Absolute` in `influence.linalg.damping`.
* `completions` in `influence.attribution.measurements`; `query` in
  `influence.attribution.query`; `Whitened` in `influence.attribution.forms`.
* `scan` in `influence.attribution.scan`; `Scores` in `influence.attribution.scores`;
  `token_scores` in `influence.attribution.tokens`; `bm25` in
  `influence.attribution.lexical`.

.. include:: ../docs/setting.md
"""

from influence.attribution.forms import Whitened as Whitened
from influence.attribution.lexical import bm25 as bm25
from influence.attribution.measurements import completions as completions
from influence.attribution.query import query as query
from influence.attribution.scan import scan as scan
from influence.attribution.scores import Scores as Scores
from influence.attribution.tokens import token_scores as token_scores
from influence.curvature.ekfac import fit as fit
from influence.curvature.operator import Curvature as Curvature
from influence.curvature.solvers import ConjugateGradients as ConjugateGradients
from influence.curvature.solvers import Eigenbasis as Eigenbasis
from influence.linalg.damping import Absolute as Absolute
from influence.linalg.damping import Relative as Relative
from influence.model.coverage import layers as layers
from influence.model.examples import Examples as Examples
from influence.model.examples import sequences as sequences
from influence.model.task import Empirical as Empirical
from influence.model.task import LanguageModel as LanguageModel
from influence.model.task import Sampled as Sampled
from influence.model.task import Task as Task
