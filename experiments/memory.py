"""How much memory this process had at most: the package's own measure."""

from influence.runtime.memory import forget_peak as forget_peak
from influence.runtime.memory import peak as peak
