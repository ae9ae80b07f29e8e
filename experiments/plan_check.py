"""Does the plan hold? Every row of the bench, measured and planned in one run.

    python -m experiments.plan_check --reference DIR

Each stage runs in a process of its own (`alone.py`); the machine's rates are measured
in that process around it, and the plan is made with them. Written: seconds and
megabytes of each stage as measured and as planned, of the process and (`grown`) of the
stage alone, beyond what its process held when it began.
"""

import argparse
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
from influence.attribution import stages as planned
from influence.attribution.cost import (
    Subject,
    Work,
    layer_shapes,
    parameter_bytes,
    passes,
    subject,
)
from influence.attribution.plan import Device, Mesh, cost
from influence.runtime.planning.kinds import BASE, EIGEN
from influence.runtime.planning.rates import Rates

SEQUENCES = {"small": 64, "medium": 16}
"""Of each configuration: enough for several batches, few enough for two cores."""

ENOUGH = {"seconds": 2.0, "megabytes": 1.25}
"""How far apart plan and measurement may be, as a ratio."""

KIND = {
    "forward+backward": "unit",
    "covariance": "covariance",
    "eigenvalues": "eigenvalues",
    "scan, per token": "tokens",
}
"""What the bench calls a stage's batch; of all others it is `scan`."""


def stages(job: Job, of: Subject, low: bool) -> dict[str, planned.Stage]:
    """Returns the bench's stages as planned, by the bench's names."""
    parameters, at = parameter_bytes(of.params), passes(of, job.context)
    layers, tail = layer_shapes(of), f", rank {job.rank}" if low else ""

    def work(stage: str) -> Work:
        size = job.size(OURS, KIND.get(stage, "scan"))
        rank = job.rank if low else None
        many = (job.sequences, job.sequences, job.queries)
        return Work(job.context, size, *many, rank, job.token_sequences)

    made = {
        "query": lambda w, x: planned.query(layers, w, x.gradient, parameters),
        "scan": lambda w, x: planned.scan(layers, w, x.given, parameters),
        "scan, per token": lambda w, x: planned.scan_per_token(
            layers, w, x.given, parameters
        ),
    }
    if not low:
        made |= {
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


def held_before(stage: planned.Stage, name: str, of: Subject) -> float:
    """Returns the bytes a stage finds when it begins: what is given to it."""
    layers = layer_shapes(of)
    sides = planned.sides(layers)
    given = {
        "eigendecomposition": sum(x.covariance for x in sides),
        "eigenvalues": sum(x.basis for x in sides),
        "query": stage.memory.get("curvature", 0.0),
        "scan": stage.memory.get("queries", 0.0),
    }
    return stage.memory.get("parameters", 0.0) + given.get(name.partition(",")[0], 0.0)


def row(
    job: Job, of: Subject, name: str, stage: planned.Stage, repetitions: int
) -> dict[str, Any]:
    """Returns one row of the bench, measured and planned."""
    real = taken(job, name, repetitions)
    rates: Rates = real.rates
    link = rates.bandwidth
    device = Device(
        "cpu", rates.flops, EIGEN * rates.flops, rates.bandwidth, link, 1e12, base=BASE
    )
    # The model's parameters are in every process, also where a stage has none of them.
    whole = {"parameters": parameter_bytes(of.params), **stage.memory}
    found = cost(stage._replace(memory=whole), device, Mesh())
    mega = 1 << 20
    begun = held_before(stage._replace(memory=whole), name, of)
    return {
        "stage": name,
        "seconds": real.seconds,
        "planned_seconds": found.seconds,
        "megabytes": real.megabytes,
        "planned_megabytes": found.bytes / mega,
        "grown_megabytes": real.grown,
        "planned_grown_megabytes": (found.bytes - BASE - begun) / mega,
        "gflops": rates.flops / 1e9,
        "gigabytes_a_second": rates.bandwidth / 1e9,
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
    numbers = ("s", "planned", "MB", "planned", "grown", "planned")
    for head in ("config", "stage", *numbers):
        found.add_column(head, justify="left" if head == "stage" else "right")
    for x in rows:
        numbers = [
            f"{x[k]:.2f}" if "seconds" in k else f"{x[k]:.0f}"
            for what in ("seconds", "megabytes", "grown_megabytes")
            for k in (what, f"planned_{what}")
        ]
        found.add_row(x["config"], x["stage"], *numbers)
    return found


def main() -> None:
    """Measures and plans every row, and writes them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--reference", type=Path, required=True, help="the reference folder")
    add("--configs", nargs="+", choices=SIZES, default=list(SIZES))
    add("--stages", nargs="+", help="only these")
    add("--repetitions", type=int, default=2)
    given, console, progress = parser.parse_args(), Console(), Console(stderr=True)
    rows = []
    for config in given.configs:
        asked = {"config": config, "sequences": SEQUENCES[config], "threads": 1}
        job = bench_job(
            argparse.Namespace(
                **asked, reference=given.reference, layers="mlp", queries=None
            )
        )
        params = jax.eval_shape(lambda job=job: data(job).params)
        patterns = [f"{name}.weight" for name in job.names()]
        of = subject(Counted(GPT(job.blocks, job.heads)), params, patterns)
        every = {**stages(job, of, low=False), **stages(job, of, low=True)}
        for name, stage in every.items():
            if given.stages and name not in given.stages:
                continue
            progress.print(config, name)
            found = row(job, of, name, stage, given.repetitions)
            progress.print(found)
            rows.append({"config": config, **found})
    console.print(table(rows))
    if not given.stages:
        found = claims(rows)
        settings = {"sequences": SEQUENCES, "layers": "mlp", "threads": 1}
        results.write("plan_check", seed=0, settings=settings, rows=rows, claims=found)
        console.print(results.table(found))


if __name__ == "__main__":
    main()
