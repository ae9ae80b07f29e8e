"""Questions about features: which data made this feature, rather than this text."""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from influence.interpret import features
from influence.interpret.features import Survey
from influence.interpret.link import Activity, activity, check_feature
from influence.model.sites import Address
from influence.runtime.corpus.packed import Packed
from influence.runtime.dictionaries.folders import open_dictionary
from influence.runtime.dictionaries.stored import Stored
from influence.runtime.models import Model
from influence.runtime.run.job import Job
from influence.runtime.run.packing import Corpus, sample
from influence.runtime.sae.reading import Reading, check_stored, site_of

LOOKED_AT = 4096
"""Sequences in which a feature's strongest tokens are looked for, at most."""

PEAKS = 16
"""Tokens that a feature is measured at."""

Place = tuple[list[int], list[int]]
"""Tokens up to the last that counts, and the positions of those that do."""

Feature = dict[str, Any]
"""A feature and where it is measured, as JSON has it.

`sae` and `index`; `weights`, a checksum of the dictionary's; `places`.
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
        places = peaks(reading, some, survey, index)
        if not places:
            raise ValueError(
                f"Feature {index} of {sae} is on at none of the {int(survey.tokens):,} "
                "tokens that were looked at. Choose one that is on, or say where to "
                "measure it with --prompt and --completion."
            )
        found.append(_feature(stored, sae, index, places))
    return found


def peaks(reading: Reading, packed: Packed, survey: Survey, index: int) -> list[Place]:
    """Returns the places at which a feature is on most, `PEAKS` of them at most.

    Args:
      reading: the model, and how it reads.
      packed: the sequences that were surveyed.
      survey: where features are on.
      index: which feature.
    """
    value, sequence, token, _ = (x[index][:PEAKS] for x in survey.top)
    rows = [int(x) for x in sequence[value > 0]]
    if not rows:
        return []
    (batch,) = reading.job.batches(packed.take(rows), len(rows))
    found = []
    for i, at in enumerate(token[value > 0]):
        # A document that attention does not leave is read as if it were alone.
        document = batch.inputs.get("segments", np.zeros_like(batch.inputs["tokens"]))
        start = int(np.argmax(document[i] == document[i, at]))
        tokens = batch.inputs["tokens"][i, start : at + 1]
        found.append((tokens.tolist(), [int(at) - start]))
    return found


def at_tokens(sae: str, index: int, prompt: list[int], rest: list[int]) -> Feature:
    """Returns a feature, measured at the tokens of a completion."""
    stored = open_dictionary(sae)
    check_feature(stored.dictionary, index)
    positions = list(range(len(prompt), len(prompt) + len(rest)))
    return _feature(stored, sae, index, [([*prompt, *rest], positions)])


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
    places = feature["places"]
    shape = len(places), max(len(tokens) for tokens, _ in places)
    site = site_of(model, {"tokens": np.zeros(shape, np.int32)}, stored.about.site)
    return measured_at(model, stored, site, index, places, shape)


def measured_at(
    model: Model,
    stored: Stored,
    site: Address,
    index: int,
    places: Sequence[Place],
    shape: tuple[int, int],
) -> Activity:
    """Returns a feature's mean pre-activation at places, a measurement.

    Args:
      model: the model.
      stored: the dictionary.
      site: what it reads.
      index: the feature.
      places: where it is measured.
      shape: what rows are filled up to; alike for many features, they compile once.
    """
    tokens, weights = np.zeros(shape, np.int32), np.zeros(shape)
    for i, (row, positions) in enumerate(places):
        tokens[i, : len(row)] = row
        weights[i, positions] = 1.0
    inputs = {"tokens": tokens}
    weights /= weights.sum()
    return activity(model.task, stored.dictionary, site, index, inputs, weights)


def _feature(stored: Stored, sae: str, index: int, places: Sequence[Place]) -> Feature:
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
