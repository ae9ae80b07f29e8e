"""Kinds of devices, by what their makers publish; the CPU at hand, by measuring it."""

import os

import jax

from influence.attribution.plan import Device
from influence.runtime.planning.rates import measure
from influence.runtime.run.batching import free_bytes

EFFICIENCY = 0.5
"""The share of published rates that is planned with: an assumption, not measured. Large
matrix products reach more, everything else less."""

BASE = 450e6
"""Bytes a process on the CPU holds before it has computed anything: Python, JAX and the
programs it has compiled. Measured for the bench's stages: 0.40 to 0.54 GB."""

SLOWLY = 0.002
"""Operations of an eigendecomposition for one of a product in bfloat16 on an
accelerator, whose eigensolvers are bound by memory and latency: an assumption, not
measured."""

WHOLE = {"gpu": 1 / 2, "tpu": 1 / 6}
"""Products in float32 for one in bfloat16: in TF32 on a GPU, of six passes on a TPU."""

PUBLISHED = {
    "A100-40": ("gpu", 312e12, 1.555e12, 600e9, 40e9),
    "A100-80": ("gpu", 312e12, 2.039e12, 600e9, 80e9),
    "H100": ("gpu", 989e12, 3.35e12, 900e9, 80e9),
    "H200": ("gpu", 989e12, 4.8e12, 900e9, 141e9),
    "TPU-v4": ("tpu", 275e12, 1.2e12, 300e9, 32e9),
    "TPU-v5e": ("tpu", 197e12, 0.819e12, 200e9, 16e9),
    "TPU-v5p": ("tpu", 459e12, 2.765e12, 600e9, 95e9),
    "TPU-v6e": ("tpu", 918e12, 1.6e12, 400e9, 32e9),
}
"""Of each kind: what it is; bfloat16 operations a second; bytes a second to and from
memory; to and from other devices (NVLink, or ICI one way); bytes of memory. From
NVIDIA's data sheets (SXM, dense) and Google's documentation of Cloud TPU."""


def device(kind: str, dtype: str) -> Device:
    """Returns what one device of a kind can do, with numbers of a type.

    Raises:
      ValueError: if there is no such kind.

    Example:
      >>> from influence.runtime.planning.kinds import device
      >>> device("H100", "bfloat16").memory
      80000000000.0
    """
    if kind == "cpu":
        rates = measure()
        return Device(
            "cpu",
            flops=rates.flops,
            eigen=rates.eigen,
            bandwidth=rates.bandwidth,
            link=rates.bandwidth,
            memory=float(free_bytes()),
            base=BASE,
        )
    if kind not in PUBLISHED:
        raise ValueError(
            f"{kind!r} is no kind of device that is known. Choose one of "
            f"{', '.join(PUBLISHED)}, or cpu for this machine's, which is measured."
        )
    sort, flops, bandwidth, link, memory = PUBLISHED[kind]
    if dtype == "float32":
        flops *= WHOLE[sort]
    return Device(
        kind,
        flops=flops,
        eigen=SLOWLY * PUBLISHED[kind][1],
        bandwidth=bandwidth,
        link=link,
        memory=memory,
        efficiency=EFFICIENCY,
    )


def measured_on() -> str:
    """Returns the words for what `cpu` was measured on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return f"{jax.devices()[0].device_kind}, {cores or os.cpu_count()} cores"
