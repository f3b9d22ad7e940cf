"""The answer as one NumPy matrix (see `shoal.engine.lookup.matrix`) in the .npy format."""

import io
from functools import lru_cache

import numpy as np

from shoal.engine.lookup.allowance import UNLIMITED, Allowance
from shoal.engine.lookup.result import MatrixResult

MEDIA_TYPE = "application/x-npy"


def encode(result: MatrixResult, allowance: Allowance = UNLIMITED) -> bytes:
    """Return the answer as a .npy file; raise RequestTooLarge if it is over the allowance."""
    allowance.check(result.nbytes)
    return b"".join((_head(result.matrix.shape, result.matrix.dtype), result.matrix.data))


@lru_cache(maxsize=256)
def _head(shape: tuple[int, ...], dtype: np.dtype[np.floating]) -> bytes:
    """Return the header before the numbers of a matrix in C order."""
    file = io.BytesIO()
    empty = np.empty(0, dtype)
    header = np.lib.format.header_data_from_array_1_0(empty) | {"shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()
