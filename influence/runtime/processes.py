"""Several processes at one job: who writes, when they wait, and how they find another.

All carry out the same command at the same time, each with its own devices. What goes
between them is JAX's: arrays by its collectives, the rest by the service that
`jax.distributed` starts. Process 0 alone writes what there is one of.
"""

import os
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

PATIENCE = 7 * 24 * 3600
"""Seconds that a process waits for others: as long as process 0 may pack a corpus."""

LEAVE = 60
"""Seconds that a process which ends, with an error say, waits for others to end."""

ASKED = "INFLUENCE_PROCESSES"
"""The variable that says `auto` where nothing else tells that there are others."""


def others(environment: Mapping[str, str]) -> bool:
    """Returns whether the environment says that the job has several processes.

    Example:
      >>> from influence.runtime.processes import others
      >>> others({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4"}), others({})
      (True, False)
    """
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return (
        environment.get(ASKED) == "auto"
        or "JAX_COORDINATOR_ADDRESS" in environment
        or any(int(environment.get(x) or 1) > 1 for x in counts)
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    )


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of the job, if there are others; before anything else.

    What is known of them is what `jax.distributed.initialize` finds (SLURM, Open MPI,
    GKE, TPU pods), or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      ValueError: if one of these three is missing, or is no number.
    """
    if not others(environment):
        return
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if address is None:
        jax.distributed.initialize(shutdown_timeout_seconds=LEAVE)
        return
    said = [environment.get(x) for x in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")]
    if not all(x and x.isdecimal() for x in said):
        raise ValueError(
            f"JAX_COORDINATOR_ADDRESS is {address}, but JAX_NUM_PROCESSES is {said[0]} "
            f"and JAX_PROCESS_ID is {said[1]}. Set all three, or none."
        )
    count, number = (int(x or 0) for x in said)
    jax.distributed.initialize(address, count, number, shutdown_timeout_seconds=LEAVE)


def several() -> bool:
    """Returns whether there are other processes."""
    return jax.process_count() > 1


def leads() -> bool:
    """Returns whether this is the process that writes what there is one of."""
    return jax.process_index() == 0


def together(name: str) -> None:
    """Waits until every process has come here.

    Args:
      name: of the place, for the message if one never comes.
    """
    if several():
        from orbax.checkpoint import multihost  # takes half as long as ours

        everyone = set(range(jax.process_count()))
        multihost.get_barrier_sync_fn(processes=everyone)(
            key=name, timeout_ms=PATIENCE * 1000
        )


def led(name: str, work: Callable[[], object]) -> None:
    """Does some work in the leading process, with all others waiting.

    Before it too: what they have read by then is what was there before.

    Args:
      name: of the work.
      work: changes something on the disk.
    """
    together(f"before {name}")
    if leads():
        work()
    together(f"after {name}")


def agreed(said: bool) -> bool:
    """Returns what the leading process says. All of them have to ask."""
    if not several():
        return said
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(said)))


def check_alone(what: str) -> None:
    """Raises where there are other processes.

    Raises:
      ValueError: naming what can't be done by several.
    """
    if several():
        raise ValueError(
            f"{what} can't be done by {jax.process_count()} processes. Do it with one; "
            "it may use all devices of its machine."
        )
