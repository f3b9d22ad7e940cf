"""A lookup as benchmarks see it, whoever answers it."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Lookup = Callable[[list[str]], npt.NDArray[np.floating]]
"""Keys → [keys, features]."""
