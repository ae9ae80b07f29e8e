"""What an update makes of a gradient, and what of that influence has to know."""

import abc
import math
from dataclasses import dataclass

import optax


class Optimizer(abc.ABC):
    """What an update makes of a gradient."""

    @property
    @abc.abstractmethod
    def reach(self) -> float:
        """Returns how far one gradient moves the weights in the end, over its rate."""

    @property
    @abc.abstractmethod
    def adaptive(self) -> bool:
        """Returns whether gradients are divided by the root of their second moment."""

    @abc.abstractmethod
    def __call__(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Returns the optimizer for a schedule of learning rates."""


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).

    Attributes:
      decay: of the weights.
      clip: the largest norm of a gradient; None or infinity for none. Where gradients
        are clipped, training is less smooth.
      root: added under the root of the second moment. Weights whose gradients are all
        but zero otherwise jump when one comes, and what training ends in is no smooth
        function of the data: metagradients need `root > 0`.
      b2: how slowly the second moment forgets.

    Example:
      >>> smooth = train.Recipe(100, 5, 0.03, train.AdamW(clip=None, root=1e-8))
      >>> smooth.optimizer.root
      1e-08
    """

    decay: float = 0.01
    clip: float | None = 1.0
    root: float = 0.0
    b2: float = 0.99

    @property
    def reach(self) -> float:
        """Returns 1, in the metric of the second moments."""
        return 1.0

    @property
    def adaptive(self) -> bool:
        """Returns that they are."""
        return True

    def __call__(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Returns the optimizer for a schedule of learning rates."""
        adamw = optax.adamw(
            rate, b2=self.b2, eps_root=self.root, weight_decay=self.decay
        )
        if self.clip in (None, math.inf):
            return adamw
        return optax.chain(optax.clip_by_global_norm(self.clip), adamw)


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent with heavy-ball momentum.

    Attributes:
      momentum: how much of the last update is made again.
      decay: of the weights, added to the gradient.

    Example:
      >>> train.Recipe(100, 5, 0.03, train.SGD(momentum=0.9)).optimizer
      SGD(momentum=0.9, decay=0.0)
    """

    momentum: float = 0.0
    decay: float = 0.0

    @property
    def reach(self) -> float:
        """Returns `1 / (1 - β)`: what momentum makes of one gradient."""
        return 1 / (1 - self.momentum)

    @property
    def adaptive(self) -> bool:
        """Returns that they are not."""
        return False

    def __call__(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Returns the optimizer for a schedule of learning rates."""
        return optax.chain(
            optax.add_decayed_weights(self.decay),
            optax.sgd(rate, momentum=self.momentum or None),
        )
