"""What is kept of features' part in a run."""

import xarray as xr

from influence.runtime import formats
from influence.runtime.run.asking import queries_file
from influence.runtime.run.job import MODEL, Job

FEATURES = "features.json"
"""The artifact with what features have to do with a run's questions."""

PATHS = "features.zarr"
"""The artifact with the influence that goes through features."""


def made_from(job: Job) -> dict[str, str]:
    """Returns what features' part in a run is made from, to tell whether it changed."""
    entries = (job.ledger.needed(f"scores of {x}", "scan") for x in _scanned(job))
    queries = job.ledger.run.manifest["artifacts"][queries_file(MODEL)]["sha256"]
    return {"queries": queries, "scores": " ".join(x["checksum"] for x in entries)}


def _scanned(job: Job) -> list[str]:
    return job.noted("scanned").get("corpora", [])


def carried(job: Job) -> dict[str, xr.DataArray]:
    """Returns the influence through features that was found, by question.

    `(feature, train)`; of no question if it was not looked for, or the scores are
    others now.
    """
    run = job.ledger.run
    if not {FEATURES, PATHS} <= run.manifest["artifacts"].keys():
        return {}
    said = run.read(FEATURES, formats.read_json)
    if said["of"] != made_from(job):
        return {}
    paths = run.read(PATHS, formats.read_scores)["score"]
    found: dict[str, xr.DataArray] = {}
    for name in said["questions"]:
        own = [x for x in paths["path"].values if str(x).rpartition("\0")[0] == name]
        if own:
            each = paths.sel(path=own)
            labels = [f"feature {str(x).rpartition(chr(0))[2]}" for x in own]
            found[name] = each.rename(path="feature").assign_coords(feature=labels)
    return found
