"""The type of a lookup in benchmarks, independent of the store that answers it."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Lookup = Callable[[list[str]], npt.NDArray[np.floating]]
"""A function from keys to an array [keys, features]."""
