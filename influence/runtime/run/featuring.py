"""Questions about features: which data made this feature, rather than this text."""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from influence.interpret import features
from influence.interpret.link import Activity, activity, check_feature
from influence.model.examples import sequences
from influence.runtime.dictionaries.folders import open_dictionary
from influence.runtime.dictionaries.stored import Stored
from influence.runtime.models import Model
from influence.runtime.run.job import Corpus, Job, sample
from influence.runtime.sae.reading import Reading, check_stored, site_of

LOOKED_AT = 4096
"""Sequences in which a feature's strongest tokens are looked for, at most."""

PEAKS = 16
"""Tokens that a feature is measured at."""

Feature = dict[str, Any]
"""A feature and where it is measured, as JSON has it.

`sae` and `index`; `weights`, a checksum of the dictionary's; `places`: tokens up to the
last place that counts, and the positions of those that do.
"""


def at_peaks(
    job: Job, model: Model, corpus: Corpus, sae: str, chosen: Sequence[int]
) -> list[Feature]:
    """Returns features, measured at the tokens of a corpus at which they are on most.

    Raises:
      ValueError: if the dictionary is not the model's, or a feature is never on.
    """
    stored = open_dictionary(sae)
    reading = Reading(job, model, corpus.packed, corpus.digest)
    check_stored(stored, reading)
    for index in chosen:
        check_feature(stored.dictionary, index)
    some = sample(corpus.packed, LOOKED_AT, job.options.seed)
    site = reading.site(stored.about.site)
    fold = features.survey(reading.source, stored.dictionary, site, top=PEAKS)
    survey = job.driver.run(fold, reading.batches(some))
    found = []
    for index in chosen:
        value, sequence, token, _ = (x[index] for x in survey.top)
        places = [
            [[int(x) for x in some.tokens_at(int(row))[: at + 1]], [int(at)]]
            for on, row, at in zip(value, sequence, token, strict=True)
            if on > 0
        ]
        if not places:
            raise ValueError(
                f"Feature {index} of {sae} is on at none of the {int(survey.tokens):,} "
                "tokens that were looked at. Choose one that is on, or say where to "
                "measure it with --prompt and --completion."
            )
        found.append(_feature(stored, sae, index, places))
    return found


def at_tokens(sae: str, index: int, prompt: list[int], rest: list[int]) -> Feature:
    """Returns a feature, measured at the tokens of a completion."""
    stored = open_dictionary(sae)
    check_feature(stored.dictionary, index)
    positions = list(range(len(prompt), len(prompt) + len(rest)))
    return _feature(stored, sae, index, [[[*prompt, *rest], positions]])


def measured(model: Model, feature: Feature) -> Activity:
    """Returns a feature's mean pre-activation at its places, a measurement.

    Raises:
      ValueError: if the dictionary changed since it was asked about.
    """
    stored, index = open_dictionary(feature["sae"]), feature["index"]
    if _digest(stored) != feature["weights"]:
        raise ValueError(
            f"The dictionary in {feature['sae']} is not the one that was asked about: "
            "its weights differ. Restore it, or ask again."
        )
    tokens, positions = zip(*feature["places"], strict=True)
    # A single token predicts nothing, so the shortest rows are given one that is not
    # looked at.
    inputs = sequences([[*x, 0] for x in tokens]).inputs
    weights = np.zeros(inputs["tokens"].shape)
    for row, places in enumerate(positions):
        weights[row, places] = 1.0
    site = site_of(model, inputs, stored.about.site)
    return activity(
        model.task, stored.dictionary, site, index, inputs, weights / weights.sum()
    )


def _feature(stored: Stored, sae: str, index: int, places: list) -> Feature:
    return {
        "sae": sae,
        "index": index,
        "weights": _digest(stored),
        "places": places,
    }


def _digest(stored: Stored) -> str:
    state = hashlib.sha256()
    for x in jax.tree.leaves(stored.dictionary):
        state.update(np.ascontiguousarray(x).tobytes())
    return state.hexdigest()
