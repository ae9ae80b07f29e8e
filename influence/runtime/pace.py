"""How often work under way is saved: so that saving takes little of the time."""

import time
from dataclasses import dataclass, field

COST = 0.02
"""The largest share of a pass's time that may go into saving it."""


@dataclass
class Pace:
    """The time between two saves.

    Attributes:
      every: seconds of work between them, or more if saving takes long.

    Example:
      >>> from influence.runtime.pace import Pace
      >>> Pace(every=60.0).due(), Pace(every=0.0).due()
      (False, True)
    """

    every: float
    _since: float = field(default_factory=time.monotonic)
    _took: float = 0.0

    def begin(self) -> None:
        """Counts from now."""
        self._since = time.monotonic()

    def due(self) -> bool:
        """Returns whether enough was done since the last save to be worth another."""
        return time.monotonic() - self._since >= max(self.every, self._took / COST)

    def saved(self, begun: float) -> None:
        """Notes that what was begun at some time, by `time.monotonic`, is saved."""
        self._since = time.monotonic()
        self._took = self._since - begun
