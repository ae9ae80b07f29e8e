"""Does the plan hold? Every row of the bench, measured and planned in one run.

    python -m experiments.plan_check --reference DIR

Each stage runs in a process of its own (`alone.py`); the machine's rates are measured
in that process around it, and the plan is made with them. Written: seconds and
megabytes of each stage as measured and as planned, of the process and (`grown`) of the
stage alone, beyond what its process held when it began.

With `--stages` only these are measured; what was measured of the others stands in the
result, and is planned anew.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from experiments import results
from experiments.alone import taken
from experiments.bench_engine import OURS, SIZES
from experiments.bench_engine import job as bench_job
from experiments.contender import Job, data
from experiments.reference import GPT, Counted
from influence.attribution import query_cost
from influence.attribution import stages as planned
from influence.attribution.cost import (
    Stage,
    Subject,
    Work,
    layer_shapes,
    parameter_bytes,
    passes,
    sides,
    subject,
)
from influence.attribution.plan import Device, Mesh, cost
from influence.runtime.planning.kinds import BASE

SEQUENCES = {"small": 64, "medium": 16}
"""Of each configuration: enough for several batches, few enough for two cores."""

ENOUGH = {"seconds": 2.0, "megabytes": 1.25, "grown_megabytes": 1.25}
"""How far apart plan and measurement may be, as a ratio: time, memory of the process,
and memory that the stage alone adds to it."""

MEGABYTE = 1 << 20
"""As the system counts them."""

KIND = {
    "forward+backward": "unit",
    "covariance": "covariance",
    "eigenvalues": "eigenvalues",
    "scan, per token": "tokens",
}
"""What the bench calls a stage's batch; of all others it is `scan`."""


def stages(job: Job, of: Subject, low: bool) -> dict[str, Stage]:
    """Returns the bench's stages as planned, by the bench's names."""
    parameters, at = parameter_bytes(of.params), passes(of, job.context)
    layers, tail = layer_shapes(of), f", rank {job.rank}" if low else ""

    def work(stage: str) -> Work:
        reduced = low and stage == "scan"
        size = job.size(OURS, "low rank" if reduced else KIND.get(stage, "scan"))
        rank = job.rank if low else None
        many = (job.sequences, job.sequences, job.queries)
        return Work(job.context, size, *many, rank, job.token_sequences)

    made = {
        "query": lambda w, x: query_cost.query(layers, w, x, parameters),
        "scan": lambda w, x: planned.scan(layers, w, x.given, parameters),
        "scan, per token": lambda w, x: planned.scan_per_token(
            layers, w, x.given, parameters
        ),
    }
    if not low:
        made |= {
            "scan, per layer": made["scan"],
            "forward+backward": lambda w, x: planned.step(w, x.step, parameters),
            "covariance": lambda w, x: planned.covariances(
                layers, w, x.sampled, parameters
            ),
            "eigendecomposition": lambda w, x: planned.eigendecomposition(layers),
            "eigenvalues": lambda w, x: planned.eigenvalues(
                layers, w, x.sampled, parameters
            ),
        }
    found = {}
    for name, make in made.items():
        asked = work(name)
        found[f"{name}{tail}"] = make(asked, at(asked.batch))
    return found


def held_before(stage: Stage, name: str, of: Subject) -> float:
    """Returns the bytes a stage finds when it begins: what is given to it."""
    layers = layer_shapes(of)
    all_sides = sides(layers)
    given = {
        "eigendecomposition": sum(x.covariance for x in all_sides),
        "eigenvalues": sum(x.basis for x in all_sides),
        "query": stage.memory.get("curvature", 0.0),
        "scan": stage.memory.get("queries", 0.0),
    }
    return stage.memory.get("parameters", 0.0) + given.get(name.partition(",")[0], 0.0)


def measured(job: Job, name: str, repetitions: int) -> dict[str, Any]:
    """Returns one row of the bench, measured."""
    real = taken(job, name, repetitions)
    return {
        "stage": name,
        "seconds": real.seconds,
        "megabytes": real.megabytes,
        "grown_megabytes": real.grown,
        "gflops": real.rates.flops / 1e9,
        "eigen_gflops": real.rates.eigen / 1e9,
        "gigabytes_a_second": real.rates.bandwidth / 1e9,
    }


def with_plan(row: Mapping[str, Any], of: Subject, stage: Stage) -> dict[str, Any]:
    """Returns a row with what was planned for it, from the rates measured beside it."""
    flops, bandwidth = 1e9 * row["gflops"], 1e9 * row["gigabytes_a_second"]
    eigen = 1e9 * row["eigen_gflops"]
    device = Device("cpu", flops, eigen, bandwidth, bandwidth, 1e12, base=BASE)
    # The model's parameters are in every process, also where a stage has none of them.
    whole = {"parameters": parameter_bytes(of.params), **stage.memory}
    stage = stage._replace(memory=whole)
    found = cost(stage, device, Mesh())
    grown = found.bytes - BASE - held_before(stage, row["stage"], of)
    return {
        **row,
        "gflop": stage.flops / 1e9,
        "planned_seconds": found.seconds,
        "planned_megabytes": found.bytes / MEGABYTE,
        "planned_grown_megabytes": grown / MEGABYTE,
    }


def ratio(x: float, y: float) -> float:
    """Returns how far apart two numbers are, at least 1."""
    return max(x / y, y / x)


def claims(rows: Sequence[Mapping[str, Any]]) -> list[results.Claim]:
    """Returns what the plan promises, and what came of it."""
    found = []
    for what, most in ENOUGH.items():
        apart = [ratio(x[what], x[f"planned_{what}"]) for x in rows]
        worst = max(range(len(rows)), key=apart.__getitem__)
        said = (
            f"at most ×{apart[worst]:.2f} ({rows[worst]['config']}, "
            f"{rows[worst]['stage']}); {sum(x <= most for x in apart)} of {len(rows)}"
        )
        found.append(
            results.Claim(
                f"planned {what} within ×{most:g} of measured ones in every row",
                said,
                max(apart) <= most,
            )
        )
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the rows as a table to print."""
    found = Table(title="measured, planned")
    numbers = ("s", "planned", "MB", "planned", "grown", "planned", "× floor")
    for head in ("config", "stage", *numbers):
        found.add_column(head, justify="left" if head == "stage" else "right")
    for x in rows:
        numbers = [
            f"{x[k]:.2f}" if "seconds" in k else f"{x[k]:.0f}"
            for what in ("seconds", "megabytes", "grown_megabytes")
            for k in (what, f"planned_{what}")
        ]
        numbers.append(f"{x['seconds'] * x['gflops'] / x['gflop']:.2f}")
        found.add_row(x["config"], x["stage"], *numbers)
    return found


def main() -> None:
    """Measures and plans every row, and writes them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--reference", type=Path, required=True, help="the reference folder")
    add("--configs", nargs="+", choices=SIZES, default=list(SIZES))
    add("--stages", nargs="+", help="measure only these")
    add("--repetitions", type=int, default=2)
    given, console, progress = parser.parse_args(), Console(), Console(stderr=True)
    before = {(x["config"], x["stage"]): x for x in kept()} if given.stages else {}
    rows = []
    for config in given.configs:
        job = bench_job(given.reference, config, sequences=SEQUENCES[config])
        params = jax.eval_shape(lambda job=job: data(job).params)
        patterns = [f"{name}.weight" for name in job.names()]
        of = subject(Counted(GPT(job.blocks, job.heads)), params, patterns)
        every = {**stages(job, of, low=False), **stages(job, of, low=True)}
        for name, stage in every.items():
            row = before.get((config, name))
            if row is None or name in (given.stages or ()):
                progress.print(config, name)
                row = {"config": config, **measured(job, name, given.repetitions)}
            rows.append(with_plan(row, of, stage))
    console.print(table(rows))
    said = claims(rows)
    settings = {"sequences": SEQUENCES, "layers": "mlp", "threads": 1}
    results.write("plan_check", seed=0, settings=settings, rows=rows, claims=said)
    console.print(results.table(said))


def kept() -> list[dict[str, Any]]:
    """Returns the rows that were measured before."""
    path = results.FOLDER / "plan_check.json"
    return json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []


if __name__ == "__main__":
    main()
