"""Where a run's scores are kept, by model and corpus."""

from pathlib import Path

from influence.runtime.run.job import MODEL, Job
from influence.runtime.store import checksum


def named(role: str, corpus: str) -> str:
    """Returns what a scan is called: its corpus, and its model if not the own."""
    return corpus if role == MODEL else f"{corpus} under {role}"


def check_scores(job: Job, role: str, corpus: str) -> None:
    """Raises if the scores of a corpus are not what was written.

    Raises:
      FileNotFoundError: if there are none.
      ValueError: if they changed since.
    """
    entry = job.ledger.needed(f"scores of {named(role, corpus)}", "scan")
    path = scores_at(job, role, corpus)
    if not path.is_dir() or checksum(path) != entry["checksum"]:
        raise ValueError(
            f"{path} is not what the run wrote: its checksum differs from the "
            "manifest's. Restore it, or delete it and scan again."
        )


def scores_at(job: Job, role: str, corpus: str) -> Path:
    """Returns where the scores of a corpus are."""
    return job.folder / role / f"scores-{corpus}.zarr"


def shares_at(role: str, corpus: str) -> str:
    """Returns the artifact with the shares of tokens of a corpus's top sequences."""
    return f"{role}/tokens-{corpus}.zarr"
