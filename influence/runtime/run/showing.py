"""`influence show`, `report` and `status`: what a run has found, and how far it is."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from influence.runtime import formats
from influence.runtime.corpus.packed import check_chunks, check_packed
from influence.runtime.report import page
from influence.runtime.run.asking import (
    asked,
    chosen,
    queries_file,
)
from influence.runtime.run.codes import check_codes
from influence.runtime.run.found import found
from influence.runtime.run.indexing import codes_at
from influence.runtime.run.job import MODEL, Job, Models, code, opened_job
from influence.runtime.run.kept import check_scores, named, scores_at
from influence.runtime.run.ledger import locked, opened, worker
from influence.runtime.run.options import Report, Show, Status
from influence.runtime.run.paging import Pages
from influence.runtime.run.printing import print_rankings
from influence.runtime.run.stream import check_begun
from influence.runtime.sae.linked import carried
from influence.runtime.saves import Saves
from influence.runtime.store import Run

REPORT, DIFFERENCE = "report.html", "report-difference.html"


def show(
    options: Show, console: Console | None = None, given: Models | None = None
) -> None:
    """Prints the sequences that matter most for a run's questions.

    Raises:
      FileNotFoundError: if nothing was scanned.
      ValueError: if there is no such question, or something is damaged.

    Example:
      >>> from influence.runtime.run.options import Show
      >>> from influence.runtime.run.showing import show
      >>> show(Show(done, query="3", top=2), quiet, own)
    """
    job = opened_job(opened(options.run), console, given)
    results = found(job)
    total = results.total(difference=options.difference)
    known = asked(job)
    wanted = chosen(known, options.query)
    total = total.isel(query=[known.index(x) for x in wanted])
    texts = results.texts(page.shown(total, options.top))
    print_rankings(job.console, wanted, total, texts, options.top)


def report(
    options: Report, console: Console | None = None, given: Models | None = None
) -> Path:
    """Writes a page about a run; a second one about the difference if it has a base.

    Raises:
      FileNotFoundError: if nothing was scanned.
      ValueError: if something is damaged.

    Example:
      >>> from influence.runtime.run.options import Report
      >>> from influence.runtime.run.showing import report
      >>> report(Report(done), quiet, own).name
      'report.html'
    """
    with locked(options.run):
        job = opened_job(opened(options.run), console, given)
        results, model = found(job), job.model(MODEL)
        for name, difference in ((REPORT, False), (DIFFERENCE, True)):
            if not difference or len(job.roles) > 1:
                total = results.total(difference=difference)
                wanted = page.shown(total, page.COLUMNS)
                features = {} if difference else carried(job)
                made = Pages(results, model, asked(job), features).findings(
                    total,
                    results.layers(wanted, difference=difference),
                    results.shares(difference=difference),
                )
                job.ledger.run.write(name, formats.write_text(page.render(made)))
                job.say(f"The page: {job.folder / name}")
    return job.folder / REPORT


class _Row(NamedTuple):
    """What is said of one stage."""

    stage: str
    state: str
    why: str


def status(
    options: Status, console: Console | None = None, given: Models | None = None
) -> bool:
    """Prints what a run has finished, what is stale and why, and what is damaged.

    Returns:
      whether everything that was begun is finished, fresh and whole.

    Example:
      >>> from influence.runtime.run.options import Status
      >>> from influence.runtime.run.showing import status
      >>> status(Status(done), quiet, own)
      True
    """
    job = opened_job(opened(options.run), console, given)
    rows = list(examined(job))
    table = Table(title=escape(str(options.run)), title_justify="left")
    for name in ("stage", "state", "why"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    job.console.print(table)
    return all(x.state == "finished" for x in rows)


def examined(job: Job) -> Iterator[_Row]:
    """Yields what there is to say of every stage, and of everything that is damaged.

    What another process is writing is not looked at: it is not the same twice.
    """
    stale, models, working = set[str](), _models(job), worker(job.folder)
    for name, entry in job.ledger.stages.items():
        now = _now(job, entry, models)
        changed = [k for k, x in entry["inputs"].items() if now.get(k, x) != x]
        behind = [x for x in _upstream(job, name, entry) if x in stale]
        if changed or behind:
            stale.add(name)
            yield _Row(name, "stale", ", ".join([*changed, *behind]) + " changed")
        elif not entry["finished"]:
            at_work = "" if working is None else f"process {working} is at work, "
            yield _Row(name, "begun", at_work + _saved(job, name))
        else:
            yield _Row(name, "finished", "")
    for what, problem in _damage(job, writing=working is not None):
        yield _Row(what, "damaged", problem)


def _models(job: Job) -> dict[str | None, dict[str, str]]:
    """Returns the inputs that are models', by role; of no role, what all read with."""
    read = {"tokenizer": _or_why_not(partial(_tokenizer, job))}
    weights = {x: _or_why_not(partial(job.weights, x)) for x in job.roles}
    return {None: read} | {k: {**read, "weights": x} for k, x in weights.items()}


def _now(
    job: Job, entry: Mapping[str, Any], models: Mapping[str | None, dict[str, str]]
) -> dict[str, str]:
    """Returns the inputs of a stage as they are now, as far as they are known."""
    role, corpus = entry.get("role"), entry["corpus"]
    model = models.get(role, {"weights": f"no {role} any more"})
    if role is None:  # the corpus itself
        return model | {"data": _or_why_not(partial(_fingerprint, job, corpus))}
    made = job.ledger.stages.get(f"corpus {corpus}", {})
    scores = job.ledger.stages.get(f"scores of {named(role, corpus)}", {})
    queries = job.ledger.stages.get(f"queries of {role}", {"inputs": {}})
    truth = job.ledger.stages.get(f"retrainings by {entry.get('protocol')}", {})
    return model | {
        "code": code(),
        "corpus": made.get("key", "none"),
        "scores": scores.get("checksum", "none"),
        "questions": queries["inputs"].get("questions", "none"),
        "retrainings": truth.get("key", "none"),
        "index": job.ledger.stages.get(f"index of {corpus}", {}).get("key", "none"),
        "responses": job.ledger.stages.get("responses", {}).get("key", "none"),
        **_made(job, role),
    }


def _tokenizer(job: Job) -> str:
    tokenizer = job.tokenizer()
    return tokenizer.sha256 if tokenizer else "none"


def _fingerprint(job: Job, corpus: str) -> str:
    return job.source(*job.data_of(corpus)).fingerprint()


def _or_why_not(find: Callable[[], str]) -> str:
    """Returns a checksum, or why there is none."""
    try:
        return find()
    except (OSError, ValueError) as gone:
        return str(gone)


def _made(job: Job, role: str) -> dict[str, str]:
    """Returns the checksums of what later stages are made from."""
    sums = {k: x["sha256"] for k, x in job.ledger.run.manifest["artifacts"].items()}
    files = job.noted(f"curvature of {role}").get("files", [])
    return {
        "curvature": " ".join(sums.get(x, "none") for x in files),
        "queries": sums.get(queries_file(role), "none"),
    }


def _upstream(job: Job, name: str, entry: Mapping[str, Any]) -> list[str]:
    """Returns the stages that a stage is made from."""
    role, corpus = entry.get("role"), entry["corpus"]
    kind = name.partition(" ")[0]
    if kind == "curvature":
        return [f"corpus {corpus}"]
    if kind == "queries":
        return job.noted(f"curvature of {role}").get("stages", [])
    if kind == "scores":
        return [f"corpus {corpus}", f"queries of {role}"]
    if kind in ("baseline", "retrainings"):
        return [f"corpus {corpus}"]
    if kind in ("responses", "index"):
        return [
            f"corpus {corpus}",
            *job.noted(f"curvature of {role}").get("stages", []),
        ]
    if kind == "look-up":
        return [f"index of {corpus}"]
    scores = f"scores of {named(str(role), corpus)}"
    if kind == "LDS":
        return [scores, "baseline", f"retrainings by {entry['protocol']}"]
    if kind == "PBRF":
        return [scores, "responses"]
    return [scores] if kind in ("tokens", "removal") else []


def _saved(job: Job, stage: str) -> str:
    """Returns how far a stage is that is not finished."""
    notes = job.saves(stage).glob("*/*.json")
    done = [int(x.stem) for x in notes if x.stem.isdecimal()]
    said = [f"{x} batches saved" for x in done]
    return ", ".join(said) or "nothing saved yet"


def _damage(job: Job, *, writing: bool) -> Iterator[tuple[str, str]]:
    """Yields every artifact that is not what was written, and how.

    Args:
      job: the run's.
      writing: whether a process is at work on what is not finished.
    """
    run = job.ledger.run
    checks: list[tuple[str, Any]] = [
        (name, partial(run.read, name, Path)) for name in run.manifest["artifacts"]
    ]
    for name, entry in job.ledger.stages.items():
        corpus, finished = entry["corpus"], entry["finished"]
        if writing and not finished:
            continue
        if name.startswith("corpus "):
            folder = job.folder / "corpora" / corpus
            begun = partial(check_chunks, Run(folder))
            checks.append((name, partial(check_packed, folder) if finished else begun))
        if name.startswith("scores of "):
            asked_of = job, entry["role"], corpus
            begun = partial(check_begun, scores_at(*asked_of))
            whole = partial(check_scores, *asked_of)
            checks.append((name, whole if finished else begun))
        if name.startswith("index of "):
            checks.append((name, partial(check_codes, codes_at(job, corpus))))
        saves = job.saves(name).glob("*")
        checks += [(name, Saves(x, entry["key"], 0.0).check) for x in saves]
    for name, check in checks:
        try:
            check()
        except (OSError, ValueError) as problem:
            yield name, str(problem)
