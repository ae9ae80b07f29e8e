"""How long stages take on some devices, what each holds there, and what does not fit.

Devices stand in a mesh: batches are split over `data`; parameters, curvature and
queries over `model`. Statistics are added up over `data` once a pass. Whole sides of
layers are dealt out for their eigendecompositions.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import NamedTuple

from influence.attribution.cost import Stage

SPLIT = ("parameters", "curvature", "queries", "copies")
"""The memory that is split over `model`."""

MOVED = 0.8
"""Of the bytes of all results outside matrix products, what programs write and read:
chains of elementwise steps are fused. One number for all stages, set to the middle of
what the bench's stages on the CPU say (`experiments/results/plan_check.json`)."""


class Device(NamedTuple):
    """What one device can do.

    Attributes:
      kind: its name.
      flops: operations of matrix products a second, as published or measured.
      eigen: operations of eigendecompositions a second.
      bandwidth: bytes a second to and from its memory.
      link: bytes a second to and from other devices.
      memory: bytes.
      efficiency: the share of `flops`, `bandwidth` and `link` that programs reach.
      base: bytes a process holds before it has done anything.
    """

    kind: str
    flops: float
    eigen: float
    bandwidth: float
    link: float
    memory: float
    efficiency: float = 1.0
    base: float = 0.0


class Mesh(NamedTuple):
    """How many devices batches are split over, and how many parameters are."""

    data: int = 1
    model: int = 1

    @property
    def devices(self) -> int:
        """Returns how many there are in all."""
        return self.data * self.model


class Cost(NamedTuple):
    """What a stage takes.

    Attributes:
      stage: its name.
      held: bytes on each device, by what they hold.
      flops: operations, all devices together.
      sent: bytes each device exchanges with others.
      computing: seconds of operations and of its memory.
      sending: seconds of exchange, as if nothing else went on meanwhile.
    """

    stage: str
    held: Mapping[str, float]
    flops: float
    sent: float
    computing: float
    sending: float

    @property
    def seconds(self) -> float:
        """Returns the whole time."""
        return self.computing + self.sending

    @property
    def bytes(self) -> float:
        """Returns how much each device holds at most."""
        return sum(self.held.values())

    @property
    def largest(self) -> str:
        """Returns what most of that is."""
        return max(self.held, key=self.held.__getitem__)

    def times_as_many(self, memory: float) -> int | None:
        """Returns how many times as many devices have to share what can be split.

        None if what can't be split is more than a device has.
        """
        split = sum(x for k, x in self.held.items() if k in SPLIT)
        room = memory - (self.bytes - split)
        return None if room <= 0 else max(1, ceil(split / room))


def cost(stage: Stage, device: Device, mesh: Mesh) -> Cost:
    """Returns what a stage takes on a mesh of devices.

    Time is that of operations or of the operands' bytes, whichever is longer, for each
    part of a stage, and that of everything else's results; exchange is added to it.

    Example:
      >>> from influence.attribution.plan import Device, Mesh, cost
      >>> from influence.attribution.cost import Stage
      >>> from influence.model.passes import Pass
      >>> stage = Stage("one", 10, {"model": Pass(flops=1e9)}, {"parameters": 8.0})
      >>> device = Device("slow", 1e9, 1e9, 1e9, 1e9, 1e9)
      >>> found = cost(stage, device, Mesh(data=5, model=2))
      >>> found.seconds, found.bytes
      (1.0, 4.0)
    """
    held = {k: x / mesh.model if k in SPLIT else x for k, x in stage.memory.items()}
    # Queries are solved one after the other, by one group of devices that share them.
    share = mesh.devices if stage.batches else mesh.model
    seconds = sum(
        max(
            x.flops / (device.flops * device.efficiency),
            x.moved / (device.bandwidth * device.efficiency),
        )
        + MOVED * x.made / (device.bandwidth * device.efficiency)
        for x in stage.parts.values()
    )
    seconds *= (stage.batches or 1) / share
    seconds += max(stage.eigen / mesh.devices, stage.largest) / device.eigen
    sent = _sent(stage, mesh)
    return Cost(
        stage.name,
        {**held, "process": device.base} if device.base else held,
        stage.flops,
        sent,
        seconds,
        sent / (device.link * device.efficiency),
    )


def _sent(stage: Stage, mesh: Mesh) -> float:
    """Returns the bytes each device exchanges, rings taken for granted."""
    across = (mesh.model - 1) / mesh.model
    beside = (mesh.data - 1) / mesh.data
    batches = stage.batches / mesh.data
    # Adding up sends everything round twice, gathering once.
    return across * stage.exchanged * batches + 2 * beside * stage.summed / mesh.model


def longest(costs: Sequence[Cost]) -> Cost:
    """Returns the stage that takes most time."""
    return max(costs, key=lambda x: x.seconds)


def fullest(costs: Sequence[Cost]) -> Cost:
    """Returns the stage that takes most memory."""
    return max(costs, key=lambda x: x.bytes)


def arranged(
    at: Callable[[int], list[Stage]], device: Device, devices: int, batch: int | None
) -> tuple[Mesh, int, list[Cost]]:
    """Returns a mesh, a batch size and the costs: the quickest of those that fit.

    Args:
      at: the stages at a batch size for each device.
      device: one of the devices.
      devices: how many there are.
      batch: sequences a batch; the best power of two up to 64 if None.

    Returns:
      Where nothing fits, of those with the fewest stages that do not, the one that
      needs least memory.
    """
    sizes = [batch] if batch else [2**i for i in range(7)]
    models = [m for m in range(1, devices + 1) if devices % m == 0]
    found = []
    for size in sizes:
        stages = at(size)
        for model in models:
            mesh = Mesh(devices // model, model)
            found.append((mesh, size, [cost(x, device, mesh) for x in stages]))

    def worth(one: tuple[Mesh, int, list[Cost]]) -> tuple[int, float, float]:
        full = sum(x.bytes > device.memory for x in one[2])
        lacking = fullest(one[2]).bytes if full else 0.0
        return full, lacking, sum(x.seconds for x in one[2])

    return min(found, key=worth)
